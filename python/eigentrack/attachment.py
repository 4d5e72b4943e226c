"""The hooks of a monitor: they collect what it needs of each forward pass of its model, and of no other."""

import inspect
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from threading import Lock, get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from eigentrack.cache import CacheView, cache_of, keys_of, length_of, read_length
from eigentrack.compiled import enlist
from eigentrack.errors import EigenTrackError, TapError, UnsupportedGenerationError
from eigentrack.passes import Pass
from eigentrack.taps import hidden_state


class Monitor(Protocol):
    """What an attachment calls, in this order."""

    def _begin_pass(self, given: Pass, view: CacheView, entered: int) -> bool: ...

    def _take(self, rows: list[Tensor], entered: int) -> None: ...

    def _end_pass(self, view: CacheView, entered: int) -> None: ...


_lock = Lock()  # hooks get their numbers from a counter that is not thread-safe
_threads: weakref.WeakKeyDictionary[nn.Module, Counter[int]] = weakref.WeakKeyDictionary()


class Attachment:
    """Hooks on a model and on the modules watched in it.

    A pass belongs to the monitor if the thread that entered the monitor runs it, or a thread that has entered none on
    this model, as the one that generates for a streamer.
    """

    def __init__(
        self, monitor: Monitor, model: nn.Module, taps: Sequence[nn.Module], names: Sequence[str], needs_mask: bool
    ) -> None:
        self.passes = 0
        self._monitor = monitor
        self._model = model
        self._names = names
        self._needs_mask = needs_mask
        self._depth = _depth(model)
        parameters = inspect.signature(model.forward).parameters.values()
        self._parameters = [parameter.name for parameter in parameters]
        if parameters and next(iter(parameters)).kind is inspect.Parameter.VAR_POSITIONAL:
            self._parameters = ["input_ids"]  # forward(*args, **kwargs) around a model
        self._rows: list[Any] = []  # outputs of the taps in the running pass; empty if it is not watched
        self._missing = 0
        self._runner = 0  # the thread that runs the pass
        self._traced: dict[int, Tensor] = {}  # outputs of the taps while torch.compile traces
        self._anchor = enlist(self)
        self._owner = get_ident()
        with _lock:
            self._others = _threads.setdefault(model, Counter())
            self._others[self._owner] += 1
            self._hooks: list[Any] = [model.register_forward_pre_hook(self._before(), with_kwargs=True)]
            for position, module in enumerate(taps):
                self._hooks.append(module.register_forward_hook(self._tap(position, module)))
            self._hooks.append(model.register_forward_hook(self._after(), with_kwargs=True))

    def remove(self) -> None:
        """Takes the hooks off. Graphs compiled with them stay, and do nothing."""
        with _lock:
            for hook in self._hooks:
                hook.remove()
            self._others[self._owner] -= 1
            if not self._others[self._owner]:
                del self._others[self._owner]
        self._hooks.clear()
        self._rows, self._runner = [], 0

    # Hooks. They are closures that know their module, so that those of a copied model do nothing. PyTorch registers a
    # hook before it notes that the hook wants keywords: a pass of another thread in between calls it without them, and
    # is none of ours.

    def _before(self) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if module is not self._model or kwargs is None:
                return
            traced = is_compiling()
            entered = 0 if traced else time.perf_counter_ns()
            given = self._arguments(args, kwargs)
            ids, cache = given.get("input_ids"), given.get("past_key_values")
            fed = given.get("inputs_embeds") if ids is None else ids
            mask = _tensor_mask(given.get("attention_mask")) if self._needs_mask else None
            keys = keys_of(cache)
            length, on_device = length_of(cache)
            cached = _uses_cache(module, given)
            kept = given.get("logits_to_keep")
            candidates = kept - 1 if cached and isinstance(kept, int) and kept > 1 else 0
            if traced:
                self._traced.clear()
                torch.ops.eigentrack.begin_pass_(
                    self._anchor, fed, ids is not None, mask, keys, length, on_device, candidates, cached
                )
            else:
                self.begin(
                    Pass(cache, fed, ids is not None, mask, keys, length, on_device, candidates, cached), entered
                )

        return before

    def _tap(self, position: int, watched: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        def collect(module: nn.Module, args: Any, output: Any) -> None:
            if is_compiling():
                if module is watched:
                    self._trace(position, hidden_state(output).detach())
                return
            rows = self._rows
            if not rows or module is not watched or get_ident() != self._runner:
                return  # a pass that is not watched, or recomputation after it
            entered = time.perf_counter_ns()
            if rows[position] is not None:
                raise _ran_twice(self._names[position])
            rows[position] = output
            self._missing -= 1
            if not self._missing:
                self._rows = []
                self._monitor._take([hidden_state(row) for row in rows], entered)

        return collect

    def _after(self) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
            if module is not self._model or not output:
                return
            traced = is_compiling()
            entered = 0 if traced else time.perf_counter_ns()
            cache = cache_of(*output)
            if cache is None:
                cache = self._arguments(args, kwargs).get("past_key_values")
            keys = keys_of(cache)
            if traced:
                torch.ops.eigentrack.end_pass_(self._anchor, keys)
            else:
                self.end(CacheView(cache, keys), entered)

        return after

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._parameters, args, strict=False)) | kwargs if args else kwargs

    def _trace(self, position: int, rows: Tensor) -> None:
        """While torch.compile traces, tap by tap; the last one puts them all into the graph."""
        if position in self._traced:
            raise _ran_twice(self._names[position])
        self._traced[position] = rows
        if len(self._traced) == len(self._names):
            torch.ops.eigentrack.take_rows_(self._anchor, [self._traced[i] for i in range(len(self._names))])
            self._traced.clear()

    # The same for hooks and for compiled graphs

    def begin(self, given: Pass, entered: int) -> None:
        """The model is called."""
        thread = get_ident()
        if not self._hooks or (thread != self._owner and thread in self._others):
            return
        depth = _depth(self._model)
        if depth < self._depth:
            # transformers does not put it back after an exception
            self._model.config.num_hidden_layers = self._depth  # type: ignore[union-attr]
            raise UnsupportedGenerationError(
                f"a pass runs {depth} of the model's {self._depth} blocks, as self-speculative decoding does: its "
                "drafts cannot be told from the answer; generate without assistant_early_exit (a separate "
                "assistant_model can be watched)"
            )
        self.passes += 1
        self._runner, self._rows, self._missing = thread, [], len(self._names)
        several = given.fed is not None and given.fed.shape[1] > 1
        length = read_length(given.length, given.on_device, may_wait=several)
        if self._monitor._begin_pass(given, CacheView(given.cache, given.keys, length), entered):
            self._rows = [None] * self._missing

    def deliver(self, rows: list[Tensor]) -> None:
        """All watched modules have run, in a compiled graph."""
        if not self._rows or get_ident() != self._runner:
            return
        self._rows = []
        self._monitor._take(rows, time.perf_counter_ns())

    def end(self, view: CacheView, entered: int) -> None:
        """The model returns."""
        if get_ident() != self._runner:
            return
        self._runner = 0
        if self._rows:
            idle = [name for name, row in zip(self._names, self._rows, strict=True) if row is None]
            self._rows = []
            raise TapError(
                f"watched modules that did not run in a forward pass: {', '.join(idle)}; if they did, then in a graph "
                "that torch.compile made before their hooks were set, maybe for another model of this class: call "
                "torch.compiler.reset(), or set torch._dynamo.config.skip_nnmodule_hook_guards = False beforehand"
            )
        self._monitor._end_pass(view, entered)


def _depth(model: Any) -> int:
    """How many blocks the model's config says that a pass runs; 0 if it does not say."""
    return getattr(getattr(model, "config", None), "num_hidden_layers", None) or 0


def _uses_cache(model: nn.Module, given: dict[str, Any]) -> bool:
    use_cache = given.get("use_cache")
    return bool(getattr(getattr(model, "config", None), "use_cache", True) if use_cache is None else use_cache)


def _tensor_mask(mask: Any) -> Tensor | None:
    """The attention mask, or of several prepared ones that of full attention."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    return mask if isinstance(mask, Tensor) else None


def _ran_twice(name: str) -> EigenTrackError:
    return EigenTrackError(f"{name} ran twice in one forward pass; watch its callers instead")
