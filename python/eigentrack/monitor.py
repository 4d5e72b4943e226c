"""EigenTrack: watches the spectra of a language model's hidden states while it generates."""

import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eigentrack.attachment import Attachment
from eigentrack.cache import CacheView
from eigentrack.candidates import Candidates
from eigentrack.clock import Clock, Overhead
from eigentrack.detector import Detector
from eigentrack.errors import EigenTrackError
from eigentrack.options import NOT_GIVEN, chosen_options, settings_of_monitor
from eigentrack.passes import Pass
from eigentrack.readings import Readings
from eigentrack.request import Request
from eigentrack.step import Step, read_step
from eigentrack.taps import (
    check_rows,
    end_tokens_of,
    find_blocks,
    find_mlp,
    module_names,
    refuse_unsupported,
    select_layers,
    without_adapter,
)
from eigentrack.windows import Windows

if TYPE_CHECKING:  # it imports transformers, which the monitor alone does not need
    from eigentrack.stopping import StopWhen


class EigenTrack(Readings):
    """Context manager that watches a transformers model, or any `nn.Module`.

    Each watched layer keeps the last `window` hidden states of each sequence as a Gram matrix; after every step its
    eigenvalues and their descriptors are stored. The model's outputs are bit-identical, no gradient graph is kept, and
    every hook is gone when the block ends. A request ends where another cache comes, or none, or with start="answer" a
    pass of several tokens; the last request is kept for reading. Tokens proposed by an assistant are watched once they
    are accepted.

    A monitor watches the thread that entered it, and threads that entered none on this model, one request at a time.

    Layers, window, and how spectra are made are the detector's if there is one and they are not given.

    Args:
        model: the model. Enter before it is compiled: what is compiled inside the block is watched. Of a wrapper of
            PEFT, the model inside.
        layers: "every:k" (each k-th block, counted from the last; default "every:3"), "all", or block indices.
        spectra: "per_layer" (default) for one spectrum per layer, "joint" for one of the layers' summed Gram matrices.
        window: N, the number of activations per window, 1 to 128; default 32.
        start: "answer" (default) watches what is generated (each token fed with a cache behind it), "prompt" every
            token.
        tap: "residual" (default) for the residual stream behind each block, "mlp" for what the block's feed-forward
            part adds.
        modules: modules to watch instead of blocks; each must return a (B, T, D) hidden state.
        normalize: "rms" (default) divides each activation by its root mean square first, as the model's own norms do;
            None leaves it as it is, so that the longest rows rule the spectrum.
        center: subtract the window's mean activation (default True).
        noise: the noise variance: "median" eigenvalue over the law's median (default), or "trace" for the mean
            eigenvalue.
        layer_scale: for joint spectra, "trace" (default) divides each layer's Gram matrix by its own trace, "none" does
            not (the paper's concatenation, which sees the loudest layer only).
        detector: turns the descriptors of each step into a risk: `risk`, `Step.risk`, `stop_above`.
        tokenizer: of the model, to be compared with the one that the detector was trained with; not kept.
        end_tokens: tokens that end a sequence or pad it; by default those of the model's generation config. Name them
            here if you give generate() others. Tokens from the end on are not watched, so that a sequence's result does
            not depend on the others in its batch.
        on_token: called with a `Step` after each watched step, when the forward pass is over (with start="prompt", once
            for each token of the prompt). What it raises ends the generation. May be set later: `track.on_token = fn`.

    Raises:
        MismatchError: if the detector is for another model, or for a monitor that is set otherwise.
        NotFittedError: if the detector has not been fitted.
        TapError, UnsupportedModelError: on entry, before any hook is set.
        UnsupportedGenerationError: while generating, where the text cannot be followed (docs/compatibility.md).

    Source: EigenTrack (arXiv 2509.15735) sections III-A and III-B.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[int] = NOT_GIVEN,
        spectra: str = NOT_GIVEN,
        window: int = NOT_GIVEN,
        start: str = NOT_GIVEN,
        *,
        tap: str = NOT_GIVEN,
        modules: Sequence[nn.Module] | None = None,
        normalize: str | None = NOT_GIVEN,
        center: bool = NOT_GIVEN,
        noise: str = NOT_GIVEN,
        layer_scale: str = NOT_GIVEN,
        detector: Detector | None = None,
        tokenizer: Any = None,
        end_tokens: Sequence[int] | None = None,
        on_token: Callable[[Step], object] | None = None,
    ) -> None:
        given = {
            "layers": layers,
            "spectra": spectra,
            "window": window,
            "start": start,
            "tap": tap,
            "modules": modules,
            "normalize": normalize,
            "center": center,
            "noise": noise,
            "layer_scale": layer_scale,
        }
        model = without_adapter(model)
        if detector is not None:
            detector.check_model(model, tokenizer, stacklevel=3)
        options = chosen_options(model, detector, given)
        self.model, self.detector, self.on_token = model, detector, on_token
        self._choose_taps(options["layers"], options["tap"], options["modules"])
        joint = options["layer_scale"] if options["spectra"] == "joint" else None
        self._prompt_too = options["start"] == "prompt"
        self._end_tokens = end_tokens_of(model) if end_tokens is None else list(end_tokens)
        self._settings = settings_of_monitor(
            type(model).__name__, self._tap_names, self.layers, self._end_tokens, options
        )
        if detector is not None:
            detector.stepper(torch.device("cpu"), self._settings)  # says now what does not fit
        how = {name: options[name] for name in ("center", "normalize", "noise")}
        self._windows = Windows(len(self._taps), self._settings, detector, joint=joint, **how)
        self._hooks: Attachment | None = None
        self._passes: int | None = None  # how many the last block saw
        self._request = Request(self._end_tokens, self._prompt_too)
        self._candidates: Candidates | None = None
        self._told = 0  # steps that on_token has been called for
        self._clock = Clock()

    def _choose_taps(self, layers: str | Sequence[int], tap: str, modules: Sequence[nn.Module] | None) -> None:
        if modules is None:
            blocks = find_blocks(self.model)
            self.layers = select_layers(layers, len(blocks))
            self._taps = [blocks[index] if tap == "residual" else find_mlp(blocks[index]) for index in self.layers]
            self._tap_names = [f"layer{index}" + (".mlp" if tap == "mlp" else "") for index in self.layers]
        else:
            self.layers = list(range(len(modules)))
            self._taps = list(modules)
            self._tap_names = module_names(self.model, self._taps)

    # Acting on it

    def overhead(self) -> Overhead:
        """What the monitor cost per decoded token, over all requests so far."""
        return self._clock.overhead()

    def reset(self) -> None:
        """Forgets windows and history in mid-generation: the next token fed is step 0 of an empty window.

        The text goes on: sequences that have ended stay so, and in start="answer" what follows is still the answer.
        """
        self._candidates, self._told = None, 0
        self._windows.reset()

    def stop_when(self, fn: Callable[[Step], bool | Tensor]) -> "StopWhen":
        """A stopping criterion: `model.generate(..., stopping_criteria=[track.stop_when(fn)])`. Needs transformers.

        `fn` is asked once for each step watched from now on and returns a bool, or a (B,) bool tensor on any device;
        True ends that sequence until another request or, on a kept cache, another turn, and it is not watched on. The
        token chosen after that step is still part of the output: it was there before it could be judged. Until a token
        has been watched, all sequences go on. In a batch, generate() feeds a sequence that has ended with padding only
        if there is an end token; else it goes on in the output.

        Raises:
            CallbackError: while generating, if `fn` returns anything else.
            EigenTrackError: while generating, if the monitor is not attached.
        """
        from eigentrack.stopping import StopWhen

        return StopWhen(self, fn)

    def stop_above(self, p: float | None = None) -> "StopWhen":
        """A stopping criterion as of `stop_when`: ends a sequence once its risk exceeds `p`; by default the detector's
        threshold, which so many right sequences exceed as `calibrate` was told.

        Raises:
            EigenTrackError: if there is no detector, or `p` is not from 0 to 1.
            NotFittedError: if `p` is not given and the detector has no threshold.
        """
        if self.detector is None:
            raise EigenTrackError("no risk without a detector: EigenTrack(model, detector=...)")
        limit = self.detector.threshold if p is None else p
        if not 0 <= limit <= 1:
            raise EigenTrackError(f"a risk is from 0 to 1, so p must be, got {p!r}")
        return self.stop_when(lambda step: step.risk > limit)  # type: ignore[operator]

    # Attaching

    def __enter__(self) -> "EigenTrack":
        if self._hooks:
            raise EigenTrackError("this EigenTrack is attached already")
        refuse_unsupported(self.model, needs_cache=not self._prompt_too)
        self._passes = None
        self._hooks = Attachment(self, self.model, self._taps, self._tap_names, needs_mask=self._prompt_too)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hooks is not None
        self._hooks.remove()
        self._passes, self._hooks = self._hooks.passes, None
        unseen = False
        try:
            if kind is None:
                self._settle()
                self._tell()
                unseen = self._request.missed_passes()
        finally:
            self._candidates = None
            self._windows.release()
            self._request.forget()
        if kind is None and (unseen or not self._passes):
            warnings.warn(_UNSEEN if unseen else _NO_PASS, RuntimeWarning, stacklevel=2)

    # What runs inside the model's forward pass

    def _begin_pass(self, given: Pass, view: CacheView, entered: int) -> bool:
        """Whether rows of this pass are wanted."""
        candidates = self._candidates
        if candidates is not None:
            self._settle()
            self._tell()
            self._request.cache_holds(candidates.held())
            self._candidates = None
        if self._request.begin_pass(given, view):
            self.reset()
        self._told = self._windows.steps
        self._clock.begin_step(entered, self._request.decoding)
        return self._request.decoding or self._prompt_too or self._request.candidates > 0

    @torch.no_grad()
    def _take(self, rows: list[Tensor], entered: int) -> None:
        """The (B, T, D) hidden states of the running pass, one per tap."""
        request = self._request
        watched, offered = request.split(rows[0])
        if self._windows.history is None:
            check_rows(self._tap_names, rows)
        if request.decoding or self._prompt_too:
            for t in range(watched):
                one = rows if watched + offered == 1 else [row[:, t : t + 1] for row in rows]
                self._windows.push(one, request.tokens(t), request.row_mask(t))
        if offered:
            self._candidates = Candidates([row[:, watched:] for row in rows], request.ids, request.length)
        self._clock.add_since(entered)

    def _end_pass(self, view: CacheView, entered: int) -> None:
        if self._candidates is not None:
            self._candidates.cache = view.cache
        self._request.end_pass(view)
        self._clock.add_since(entered)
        if self.on_token is not None:
            self._tell()

    @torch.no_grad()
    def _settle(self) -> None:
        """Brings windows and history to what the cache says of the candidates; cropped later, it may say less."""
        candidates = self._candidates
        if candidates is None or candidates.pushed == candidates.accepted():
            return
        alive = self._request.alive
        assert alive is not None
        if candidates.pushed:
            self._windows.restore(candidates.before)
            alive.copy_(candidates.alive)
        else:
            candidates.before = self._windows.snapshot()
            candidates.alive = alive.clone()
        candidates.pushed = candidates.accepted()
        for t in range(candidates.pushed):
            ids = candidates.tokens(t)
            self._windows.push(candidates.row(t), ids, self._request.go_on(ids))

    def _tell(self) -> None:
        """Calls on_token for each step of the last pass; the rest of them is forgotten if it resets the monitor."""
        history, callback = self._windows.history, self.on_token
        steps = self._windows.steps  # reading in the callback may settle candidates
        while history is not None and history is self._windows.history and self._told < steps and callback:
            self._told += 1
            callback(read_step(history, self._told - 1, self._settings))

    def _read(self, name: str) -> Tensor:
        self._settle()
        if self._request.missed_passes():
            raise EigenTrackError(_UNSEEN)
        history = self._windows.history
        if history is None:
            if (self._passes if self._hooks is None else self._hooks.passes) == 0:
                raise EigenTrackError(_NO_PASS)
            raise EigenTrackError(
                'nothing has been watched yet; with start="answer" that begins when the first generated token is fed'
            )
        return history.read(name)


_NO_PASS = (
    "EigenTrack saw no forward pass of its model. A model that was compiled before never calls the hooks: enter "
    "EigenTrack before the compiled model is called for the first time"
)

_UNSEEN = (
    "the cache of the watched text has grown in passes that EigenTrack did not see. A graph that was compiled before, "
    "from the model or from what calls it, never calls the hooks: enter EigenTrack before that is called for the first "
    "time"
)
