"""EigenTrack: watches the spectra of a language model's hidden states while it generates."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eigentrack.attachment import Attachment
from eigentrack.cache import CacheView
from eigentrack.candidates import Candidates
from eigentrack.clock import Clock, Overhead
from eigentrack.errors import EigenTrackError, TapError
from eigentrack.files import CHOICES, Settings
from eigentrack.passes import Pass
from eigentrack.recording import Recording, current_versions
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
)
from eigentrack.windows import Windows
from rmtkernels import DESCRIPTORS
from rmtkernels.ops.sliding_window import MAX_WINDOW

if TYPE_CHECKING:  # it imports transformers, which the monitor alone does not need
    from eigentrack.stopping import StopWhen


class EigenTrack:
    """Context manager that watches a transformers model, or any `nn.Module`.

    Each watched layer keeps the last `window` hidden states of each sequence as a Gram matrix; after every step its
    eigenvalues and their descriptors are stored. The model's outputs are bit-identical, no gradient graph is kept, and
    every hook is gone when the block ends. A request ends where another cache comes, or none, or with start="answer" a
    pass of several tokens; the last request is kept for reading. Tokens proposed by an assistant are watched once they
    are accepted.

    A monitor watches the thread that entered it, and threads that entered none on this model, one request at a time.

    Args:
        model: the model. Enter before it is compiled: what is compiled inside the block is watched.
        layers: "every:k" (each k-th block, counted from the last), "all", or block indices.
        spectra: "per_layer" for one spectrum per layer, "joint" for one of the layers' summed Gram matrices.
        window: N, the number of activations per window, 1 to 128.
        start: "answer" watches what is generated (each token fed with a cache behind it), "prompt" every token.
        tap: "residual" for the residual stream behind each block, "mlp" for what the block's feed-forward part adds.
        modules: modules to watch instead of blocks; each must return a (B, T, D) hidden state.
        normalize: "rms" divides each activation by its root mean square first, as the model's own norms do; None leaves
            it as it is, so that the longest rows rule the spectrum.
        center: subtract the window's mean activation.
        noise: the noise variance: "median" eigenvalue over the law's median, or "trace" for the mean eigenvalue.
        layer_scale: for joint spectra, "trace" divides each layer's Gram matrix by its own trace, "none" does not (the
            paper's concatenation, which sees the loudest layer only).
        end_tokens: tokens that end a sequence or pad it; by default those of the model's generation config. Name them
            here if you give generate() others. Tokens from the end on are not watched, so that a sequence's result does
            not depend on the others in its batch.
        on_token: called with a `Step` after each watched step, when the forward pass is over (with start="prompt", once
            for each token of the prompt). What it raises ends the generation. May be set later: `track.on_token = fn`.

    Raises:
        TapError, UnsupportedModelError: on entry, before any hook is set.
        UnsupportedGenerationError: while generating, where the text cannot be followed (docs/compatibility.md).

    Source: EigenTrack (arXiv 2509.15735) sections III-A and III-B.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[int] = "every:3",
        spectra: str = "per_layer",
        window: int = 32,
        start: str = "answer",
        *,
        tap: str = "residual",
        modules: Sequence[nn.Module] | None = None,
        normalize: str | None = "rms",
        center: bool = True,
        noise: str = "median",
        layer_scale: str = "trace",
        end_tokens: Sequence[int] | None = None,
        on_token: Callable[[Step], object] | None = None,
    ) -> None:
        _check_choice("spectra", spectra, CHOICES["spectra"])
        _check_choice("start", start, CHOICES["start"])
        _check_choice("tap", tap, ("residual", "mlp"))
        _check_choice("normalize", normalize, CHOICES["normalize"])
        _check_choice("noise", noise, CHOICES["noise"])
        _check_choice("layer_scale", layer_scale, CHOICES["layer_scale"])
        if type(window) is not int or not 1 <= window <= MAX_WINDOW:
            raise EigenTrackError(f"window must be 1 to {MAX_WINDOW}, got {window}")
        self.model = model
        if modules is None:
            blocks = find_blocks(model)
            self.layers = select_layers(layers, len(blocks))
            self._taps = [blocks[index] if tap == "residual" else find_mlp(blocks[index]) for index in self.layers]
            self._tap_names = [f"layer{index}" + (".mlp" if tap == "mlp" else "") for index in self.layers]
        elif tap != "residual":
            raise TapError("give either tap or modules: modules are watched as they are")
        else:
            self.layers = list(range(len(modules)))
            self._taps = list(modules)
            self._tap_names = module_names(model, self._taps)
        self.on_token = on_token
        self._joint = layer_scale if spectra == "joint" else None
        self._prompt_too = start == "prompt"
        self._end_tokens = end_tokens_of(model) if end_tokens is None else list(end_tokens)
        self._settings = Settings(
            model=type(model).__name__,
            names=tuple(self.names),
            taps=tuple(self._tap_names),
            layers=tuple(self.layers),
            window=window,
            spectra=spectra,
            start=start,
            normalize=normalize,
            center=center,
            noise=noise,
            layer_scale=layer_scale,
            end_tokens=tuple(self._end_tokens),
        )
        self._hooks: Attachment | None = None
        self._passes: int | None = None  # how many the last block saw
        self._request = Request(self._end_tokens, self._prompt_too)
        self._candidates: Candidates | None = None
        self._windows = Windows(
            len(self._taps), window, center=center, joint=self._joint, normalize=normalize, noise=noise
        )
        self._told = 0  # steps that on_token has been called for
        self._clock = Clock()

    # What the user reads

    @property
    def names(self) -> list[str]:
        """Names of the F descriptors: "layer12.entropy", "layer12.mlp.entropy" for tap="mlp", "entropy" if joint."""
        if self._joint is not None:
            return list(DESCRIPTORS)
        return [f"{tap}.{name}" for tap in self._tap_names for name in DESCRIPTORS]

    @property
    def descriptors(self) -> Tensor:
        """(B, T, F) float32; [:, t] belongs to the token fed at step t. NaN where a sequence was not watched."""
        return self._read("descriptors").flatten(2)

    @property
    def eigenvalues(self) -> Tensor:
        """(B, T, S, N) float32, largest first, S the number of watched layers, or 1 for joint spectra."""
        return self._read("eigenvalues")

    @property
    def tokens(self) -> Tensor:
        """(B, T) int64: the token fed at each step; -1 where the model was fed embeddings."""
        return self._read("tokens")

    @property
    def watching(self) -> bool:
        """Whether a token of the running request has been watched yet; until then there is nothing to read."""
        self._settle()
        return self._windows.history is not None

    @property
    def steps(self) -> int:
        """T: steps of the running request watched so far."""
        self._settle()
        return self._windows.steps

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: how many steps of each sequence were watched."""
        return self._read("watched").sum(1)

    @property
    def watched(self) -> Tensor:
        """(B, T) bool: in which steps each sequence took part."""
        return self._read("watched")

    @property
    def settings(self) -> Settings:
        """What this monitor is set to: what `save` writes beside the values."""
        return self._settings

    @property
    def window(self) -> int:
        """As given, and so are the next six: what a monitor is set to stays so."""
        return self._settings.window

    @property
    def spectra(self) -> str:
        return self._settings.spectra

    @property
    def start(self) -> str:
        return self._settings.start

    @property
    def normalize(self) -> str | None:
        return self._settings.normalize

    @property
    def center(self) -> bool:
        return self._settings.center

    @property
    def noise(self) -> str:
        return self._settings.noise

    @property
    def layer_scale(self) -> str:
        return self._settings.layer_scale

    def recording(self) -> Recording:
        """The request as it stands, copied to the CPU.

        Raises:
            EigenTrackError: if nothing has been watched yet.
        """
        values = {name: getattr(self, name).cpu() for name in ("descriptors", "eigenvalues", "tokens", "watched")}
        return Recording(**values, settings=self.settings, versions=current_versions())

    def save(self, path: str | Path) -> None:
        """Writes the request as it stands to one safetensors file, whole or not at all; read it with `eigentrack.load`.

        Raises:
            EigenTrackError: if nothing has been watched yet.
            OSError: if the file cannot be written, or `path` names no file.
        """
        self.recording().save(path)

    def overhead(self) -> Overhead:
        """What the monitor cost per decoded token, over all requests so far."""
        return self._clock.overhead()

    # Acting on it

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


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise EigenTrackError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
