"""EigenTrack: watches the spectra of a language model's hidden states while it generates."""

import inspect
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eigentrack.cache import CacheThread
from eigentrack.clock import Clock, Overhead
from eigentrack.errors import EigenTrackError, TapError, UnsupportedGenerationError
from eigentrack.files import Settings
from eigentrack.history import History
from eigentrack.recording import Recording, current_versions
from eigentrack.step import Step, read_step
from eigentrack.taps import find_blocks, hidden_state, module_names, refuse_unsupported, select_layers
from rmtkernels import DESCRIPTORS, SlidingWindow, spectrum_descriptors_
from rmtkernels.ops.sliding_window import MAX_WINDOW

if TYPE_CHECKING:  # it imports transformers, which the monitor alone does not need
    from eigentrack.stopping import StopWhen


class EigenTrack:
    """Context manager that watches a decoder-only transformers model.

    Each watched layer keeps the last `window` hidden states of each sequence as a Gram matrix; after every step its
    eigenvalues and their descriptors are stored. The model's outputs are bit-identical, no gradient graph is kept, and
    every hook is gone when the block ends. A request ends where another cache comes, or none, or with start="answer" a
    pass of several tokens; the last request is kept for reading.

    Args:
        model: the model, not yet compiled.
        layers: "every:k" (each k-th block, counted from the last), "all", or block indices.
        spectra: "per_layer" for one spectrum per layer, "joint" for one of the layers' summed Gram matrices.
        window: N, the number of activations per window, 1 to 128.
        start: "answer" watches what is generated (each token fed with a cache behind it), "prompt" every token.
        modules: modules to watch instead of blocks; each must return a (B, T, D) hidden state.
        center: subtract the window's mean activation.
        layer_scale: for joint spectra, "trace" divides each layer's Gram matrix by its own trace, "none" does not (the
            paper's concatenation, which sees the loudest layer only).
        end_tokens: tokens that end a sequence or pad it; by default those of the model's generation config. Name them
            here if you give generate() others. Tokens from the end on are not watched, so that a sequence's result does
            not depend on the others in its batch.
        on_token: called with a `Step` after each watched step, when the forward pass is over (with start="prompt", once
            for each token of the prompt). What it raises ends the generation. May be set later: `track.on_token = fn`.

    Raises:
        TapError, UnsupportedModelError: on entry, before any hook is set.
        UnsupportedGenerationError: while generating, for beam search, assisted decoding or generation without a cache.

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
        modules: Sequence[nn.Module] | None = None,
        center: bool = True,
        layer_scale: str = "trace",
        end_tokens: Sequence[int] | None = None,
        on_token: Callable[[Step], object] | None = None,
    ) -> None:
        _check_choice("spectra", spectra, ("per_layer", "joint"))
        _check_choice("start", start, ("answer", "prompt"))
        _check_choice("layer_scale", layer_scale, ("trace", "none"))
        if not isinstance(window, int) or not 1 <= window <= MAX_WINDOW:
            raise EigenTrackError(f"window must be 1 to {MAX_WINDOW}, got {window}")
        self.model = model
        if modules is None:
            blocks = find_blocks(model)
            self.layers = select_layers(layers, len(blocks))
            self._taps = [blocks[index] for index in self.layers]
            self._tap_names = [f"layer{index}" for index in self.layers]
        else:
            self.layers = list(range(len(modules)))
            self._taps = list(modules)
            self._tap_names = module_names(model, self._taps)
        self.spectra = spectra
        self.window = window
        self.center = center
        self.on_token = on_token
        self.start = start
        self.layer_scale = layer_scale
        self._joint = layer_scale if spectra == "joint" else None
        self._prompt_too = start == "prompt"
        self._end_tokens = _end_tokens(model) if end_tokens is None else list(end_tokens)
        self._hooks: list[Any] = []
        self._thread = CacheThread(None, 0, 0)
        self._state: SlidingWindow | None = None
        self._history: History | None = None
        self._alive: Tensor | None = None
        self._rows: list[Any] = []  # outputs of the taps in the running forward pass; empty if it is not watched
        self._missing = 0
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._forwards = 0
        self._requests = 0
        self._told = 0  # steps that on_token has been called for
        self._clock = Clock()

    # What the user reads

    @property
    def names(self) -> list[str]:
        """Names of the F descriptors: "layer12.entropy", or "entropy" for joint spectra; modules by their own names."""
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
        return self._history is not None

    @property
    def steps(self) -> int:
        """T: steps of the running request watched so far."""
        return 0 if self._history is None else self._history.steps

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
        return Settings(
            model=type(self.model).__name__,
            names=tuple(self.names),
            taps=tuple(self._tap_names),
            layers=tuple(self.layers),
            window=self.window,
            spectra=self.spectra,
            start=self.start,
            center=self.center,
            layer_scale=self.layer_scale,
            end_tokens=tuple(self._end_tokens),
        )

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
            OSError: if the file cannot be written.
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
        self._history, self._told = None, 0
        if self._state is not None:
            self._state.reset()

    def stop_when(self, fn: Callable[[Step], bool | Tensor]) -> "StopWhen":
        """A stopping criterion: `model.generate(..., stopping_criteria=[track.stop_when(fn)])`. Needs transformers.

        `fn` is asked once for each watched step and returns a bool, or a (B,) bool tensor on any device; True ends that
        sequence for good, and it is not watched on. The token chosen after that step is still part of the output: it
        was there before it could be judged. Until a token has been watched, all sequences go on. In a batch, generate()
        feeds a sequence that has ended with padding only if there is an end token; else it goes on in the output.

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
        self._signature = inspect.signature(self.model.forward)
        self._forwards = 0
        self._hooks.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        for position, module in enumerate(self._taps):
            self._hooks.append(module.register_forward_hook(self._tap(position)))
        self._hooks.append(self.model.register_forward_hook(self._after_forward))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._rows, self._ids, self._mask, self._state = [], None, None, None  # the history stays, to be read
        self._thread = CacheThread(None, 0, 0)
        if kind is None and not self._forwards:
            warnings.warn(
                "EigenTrack saw no forward pass. A model that was compiled before never calls its hooks: "
                "attach first, or call torch._dynamo.reset()",
                RuntimeWarning,
                stacklevel=2,
            )

    # What runs inside the model's forward pass

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = time.perf_counter_ns()
        self._forwards += 1
        given = self._signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        fed: Any = given.get("inputs_embeds") if ids is None else ids
        batch, steps = fed.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        follows = past > 0 and self._thread.follows(cache, past, batch)
        decoding = follows and steps == 1
        if not decoding and not self._prompt_too and not self._uses_cache(given):
            raise UnsupportedGenerationError(
                "without a key-value cache every step feeds the whole text again: generate with use_cache=True, "
                'or watch single passes with start="prompt"'
            )
        if not follows or not (decoding or self._prompt_too):
            self._begin(batch, fed.device)
        self._told = self.steps
        self._ids, self._mask = ids, self._row_mask(given.get("attention_mask"), ids, steps, decoding)
        self._rows = [None] * len(self._taps) if decoding or self._prompt_too else []
        self._missing = len(self._taps)
        self._thread = CacheThread(cache, past + steps, batch)
        self._clock.begin_step(entered, decoding)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        entered = time.perf_counter_ns()
        self._thread.remember()
        if self._rows:
            idle = [name for name, row in zip(self._tap_names, self._rows, strict=True) if row is None]
            self._rows = []
            raise TapError(f"watched modules that did not run in a forward pass: {', '.join(idle)}")
        self._clock.add_since(entered)
        if self.on_token is not None:
            self._tell()

    def _tell(self) -> None:
        """Calls on_token for each step of the last pass; the rest of them is forgotten if it resets the monitor."""
        history, callback = self._history, self.on_token
        while history is not None and history is self._history and self._told < history.steps and callback:
            self._told += 1
            callback(read_step(history, self._told - 1))

    def _tap(self, position: int) -> Callable[[nn.Module, Any, Any], None]:
        def collect(module: nn.Module, args: Any, output: Any) -> None:
            rows = self._rows
            if not rows:  # a pass that is not watched, or recomputation after it
                return
            entered = time.perf_counter_ns()
            if rows[position] is not None:
                raise EigenTrackError(
                    f"{type(module).__name__} ran twice in one forward pass; watch its callers instead"
                )
            rows[position] = output
            self._missing -= 1
            if not self._missing:
                self._rows = []
                self._push([hidden_state(row) for row in rows])
            self._clock.add_since(entered)

        return collect

    @torch.no_grad()
    def _push(self, rows: list[Tensor]) -> None:
        """Takes the (B, T, D) hidden states of one forward pass, one per tap, token by token."""
        if self._history is None:
            self._allocate(rows[0])
        state, history = self._state, self._history
        assert state is not None and history is not None
        tokens, mask, steps = self._ids, self._mask, rows[0].shape[1]
        for t in range(steps):
            one = slice(t, t + 1)
            step = history.next_step()
            state.update(
                rows if steps == 1 else [row[:, one] for row in rows],
                mask if mask is None or steps == 1 else mask[:, one],
            )
            spectrum_descriptors_(
                history.descriptors[step],
                history.eigenvalues[step],
                state.gram,
                state.rows,
                rows[0].shape[2],
                center=self.center,
                joint=self._joint,
            )
            torch.ge(state.seen[:, 2], 0, out=history.watched[step])
            history.tokens[step] = -1 if tokens is None else tokens[:, t]

    def _row_mask(self, attention_mask: Any, ids: Tensor | None, steps: int, decoding: bool) -> Tensor | None:
        """(B, T) bool: rows to push. Padding is not, nor is anything from a sequence's end token on."""
        assert self._alive is not None
        if decoding:
            if ids is not None:
                torch.ne(ids[:, :1], self._ends, out=self._differs)
                torch.all(self._differs, 1, out=self._goes_on)
                self._alive.logical_and_(self._goes_on)
            return self._alive[:, None]
        self._alive.fill_(True)  # a new turn: everybody takes part again
        if attention_mask is None or not self._prompt_too:
            return None
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            return attention_mask[:, -steps:].bool()
        if len(self._alive) > 1:
            raise UnsupportedGenerationError(
                'start="prompt" needs the (B, T) attention mask to leave padding out, but the model was given a '
                'prepared one, as a static cache does: use start="answer", a dynamic cache, or one sequence at a time'
            )
        return None

    # State

    @torch.inference_mode(False)  # what outlives a request must not be an inference tensor
    def _begin(self, batch: int, device: torch.device) -> None:
        """A new request: empty windows, empty history."""
        self._alive = torch.ones(batch, dtype=torch.bool, device=device)
        self._ends = torch.tensor(self._end_tokens, dtype=torch.int64, device=device)
        # Scratch of _row_mask, so that a decode step allocates nothing.
        self._differs = torch.empty(batch, len(self._end_tokens), dtype=torch.bool, device=device)
        self._goes_on = torch.empty(batch, dtype=torch.bool, device=device)
        self._requests += 1
        self.reset()

    def _end(self, ended: Tensor) -> None:
        """Sequences that are over: what is fed to them from now on is not watched."""
        assert self._alive is not None
        self._alive.logical_and_(~ended.to(self._alive.device))

    @torch.inference_mode(False)
    def _allocate(self, rows: Tensor) -> None:
        shape = (len(self._taps), rows.shape[0], self.window, rows.shape[2])
        state = self._state
        known = None if state is None else (state.ring.shape, state.ring.dtype, state.ring.device)
        if known != (shape, rows.dtype, rows.device):
            self._state = SlidingWindow(*shape, dtype=rows.dtype, device=rows.device)
        spectra = len(self._taps) if self._joint is None else 1
        self._history = History(rows.shape[0], spectra, len(DESCRIPTORS), self.window, rows.device)

    def _read(self, name: str) -> Tensor:
        if self._history is None:
            raise EigenTrackError(
                'nothing has been watched yet; with start="answer" that begins when the first generated token is fed'
            )
        return self._history.read(name)

    def _uses_cache(self, kwargs: dict[str, Any]) -> bool:
        use_cache = kwargs.get("use_cache")
        return bool(getattr(getattr(self.model, "config", None), "use_cache", True) if use_cache is None else use_cache)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise EigenTrackError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _end_tokens(model: nn.Module) -> list[int]:
    """End and padding tokens of the model's generation config: what generate() feeds once a sequence is over."""
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    tokens: set[int] = set()
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        tokens.update(value if isinstance(value, (list, tuple)) else () if value is None else (value,))
    return sorted(tokens)
