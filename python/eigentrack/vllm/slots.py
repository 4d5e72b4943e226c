"""Which window belongs to which request. Plain Python: nothing of vLLM or PyTorch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush


@dataclass(eq=False)
class Tracked:
    """A request: where its answer begins, the position of the row that comes next, and its slot once it has one."""

    prompt: int
    next: int
    slot: int = -1
    lost: bool = False


@dataclass(eq=False)
class Push:
    """The rows of one engine step that go into windows, one for each of its requests.

    Attributes:
        requests: ids, in the order of the batch.
        rows: index of each row among the packed rows of the pass.
        slots: of each request.
        emptied: slots that have been given back since the last push; they must be empty before this one.
        lost: requests that are not watched from here on.
    """

    requests: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    emptied: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class Slots:
    """A window for each request whose answer is being generated, out of a fixed number.

    A row belongs to the answer from position `prompt` on, and each position is pushed once: what a preempted request
    computes again is passed over, whether its blocks were cached or not. A slot is taken with the first row of an
    answer and kept while the request is preempted. Where none is free, the request that has waited longest loses its
    own, and is not watched from there on: its earlier rows would have to come back, and cached ones never do.

    Args:
        count: how many; the engine's maximum of running requests, so that one that runs always gets one.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))  # a heap: slots in use lie close together, mostly in the order of the batch
        self._given_back: list[int] = []  # since the last push
        self._tracked: dict[str, Tracked] = {}
        self._holders: dict[str, None] = {}  # least recently scheduled first

    @property
    def in_use(self) -> int:
        return len(self._holders)

    def begin(self, request: str, prompt: int) -> None:
        """A request with a prompt of so many tokens is scheduled for the first time, or anew with a longer prompt."""
        self.end([request])
        self._tracked[request] = Tracked(prompt, prompt)

    def end(self, requests: Iterable[str]) -> None:
        """Requests are finished or aborted; unknown ones are passed over."""
        for request in requests:
            gone = self._tracked.pop(request, None)
            if gone is not None and gone.slot >= 0:
                self._give_back(request, gone)

    def push(self, order: Iterable[str], scheduled: Mapping[str, int], computed: Mapping[str, int]) -> Push:
        """What a pass brings.

        Args:
            order: ids of the batch, in the order in which their rows are packed.
            scheduled: how many rows each has in the pass.
            computed: position of the first of them.
        """
        push = Push()
        row = 0
        for request in order:
            count, tracked = scheduled[request], self._tracked.get(request)
            if tracked is not None and not tracked.lost and computed[request] + count > tracked.next:
                if computed[request] + count == tracked.next + 1:
                    self._add(push, request, tracked, row + count - 1, scheduled)
                else:
                    self._lose(push, request, tracked)  # several new rows at once: some were never seen
            row += count
        if push.rows:
            push.emptied, self._given_back = self._given_back, []
        return push

    def _add(self, push: Push, request: str, tracked: Tracked, row: int, scheduled: Mapping[str, int]) -> None:
        if tracked.slot < 0:
            if not self._free:
                waiting = next(holder for holder in self._holders if holder not in scheduled)
                self._lose(push, waiting, self._tracked[waiting])
            tracked.slot = heappop(self._free)
        self._holders.pop(request, None)
        self._holders[request] = None
        push.requests.append(request)
        push.rows.append(row)
        push.slots.append(tracked.slot)
        tracked.next += 1

    def _lose(self, push: Push, request: str, tracked: Tracked) -> None:
        push.lost.append(request)
        tracked.lost = True
        if tracked.slot >= 0:
            self._give_back(request, tracked)

    def _give_back(self, request: str, tracked: Tracked) -> None:
        del self._holders[request]
        heappush(self._free, tracked.slot)
        self._given_back.append(tracked.slot)
        tracked.slot = -1
