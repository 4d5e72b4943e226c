"""What a compiled model calls instead of hooks: opaque operators that find their monitor again by a number.

torch.compile traces hooks into its graph, and what they do would be compiled too. While it traces, they only hand what
they see to these operators, which run the same Python as hooks do in eager mode. A graph outlives the monitor it was
traced with; then they do nothing.
"""

import itertools
import time
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from eigentrack.cache import CacheView
from eigentrack.passes import Pass


class Watcher(Protocol):
    """What the operators call: the attachment of a monitor."""

    def begin(self, given: Pass, entered: int) -> None: ...

    def deliver(self, rows: list[Tensor]) -> None: ...

    def end(self, view: CacheView, entered: int) -> None: ...


_watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_LIBRARY = torch.library.Library("eigentrack", "DEF")
_LIBRARY.define(
    "begin_pass_(Tensor(a!) anchor, Tensor? fed, bool has_ids, Tensor? mask, Tensor? keys, SymInt length, "
    "Tensor? on_device, SymInt candidates, bool cached) -> ()",
    tags=_TAGS,
)
_LIBRARY.define("take_rows_(Tensor(a!) anchor, Tensor[] rows) -> ()", tags=_TAGS)
_LIBRARY.define("end_pass_(Tensor(a!) anchor, Tensor? keys) -> ()", tags=_TAGS)


@torch.inference_mode(False)
def enlist(watcher: Watcher) -> Tensor:
    """The tensor by which compiled graphs find the watcher as long as it lives: it holds a number.

    The operators are said to write to it, so that a graph keeps them, and in order. A tensor's value is not compiled
    into a graph, so that other monitors can use the graph too.
    """
    number = next(_numbers)
    _watchers[number] = watcher
    return torch.tensor(number)


@torch.library.impl("eigentrack::begin_pass_", "CompositeExplicitAutograd")
def _begin_pass(anchor: Tensor, *given: Any) -> None:
    watcher = _watchers.get(int(anchor))
    if watcher is not None:
        entered = time.perf_counter_ns()
        watcher.begin(Pass(None, *given), entered)


@torch.library.impl("eigentrack::take_rows_", "CompositeExplicitAutograd")
def _take_rows(anchor: Tensor, rows: list[Tensor]) -> None:
    watcher = _watchers.get(int(anchor))
    if watcher is not None:
        watcher.deliver(rows)


@torch.library.impl("eigentrack::end_pass_", "CompositeExplicitAutograd")
def _end_pass(anchor: Tensor, keys: Tensor | None) -> None:
    watcher = _watchers.get(int(anchor))
    if watcher is not None:
        watcher.end(CacheView(None, keys), time.perf_counter_ns())


@torch.library.register_fake("eigentrack::begin_pass_")
@torch.library.register_fake("eigentrack::take_rows_")
@torch.library.register_fake("eigentrack::end_pass_")
def _nothing(*args: Any) -> None:
    """Tracing moves no data."""
