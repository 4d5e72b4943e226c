"""What the monitor costs, measured inside its own calls on the host."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Overhead:
    """What the monitor cost while decoding, measured inside its own calls on the host.

    On a GPU the host's time is what it takes to launch the work, not the work itself.
    """

    tokens: int
    monitor_ms_per_token: float
    decode_ms_per_token: float

    @property
    def share(self) -> float:
        """Monitor time over decode time (which includes it)."""
        return self.monitor_ms_per_token / self.decode_ms_per_token if self.tokens else 0.0


class Clock:
    """A decode step lasts from one forward pass to the next; only steps seen to their end are counted."""

    def __init__(self) -> None:
        self._steps = self._decode_ns = self._monitor_ns = 0
        self._in_step = 0
        self._began: int | None = None

    def begin_step(self, entered: int, decoding: bool) -> None:
        """A forward pass began at `entered`; what was measured since the last one becomes a step if it was one."""
        if decoding and self._began is not None:
            self._steps += 1
            self._decode_ns += entered - self._began
            self._monitor_ns += self._in_step
        self._began = entered if decoding else None
        self._in_step = time.perf_counter_ns() - entered

    def add_since(self, entered: int) -> None:
        """Counts the time since `entered` to the running step."""
        self._in_step += time.perf_counter_ns() - entered

    def overhead(self) -> Overhead:
        tokens = max(self._steps, 1)
        return Overhead(self._steps, self._monitor_ns / tokens / 1e6, self._decode_ns / tokens / 1e6)
