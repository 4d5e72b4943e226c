"""Sessions of many tokens, and monitors that come and go; a program for the test.

    python -m tests.integration.soak TOKENS CYCLES

prints JSON. Each is measured in a process of its own: what others have left in the heap would be filled first, and hide
a leak. Planted are memory that is kept and a hook that is left over.
"""

import gc
import json
import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.state import resident
from eigentrack import EigenTrack
from eigentrack.attachment import Attachment
from rmtkernels import DESCRIPTORS
from tests.integration.conftest import tiny_llama
from tests.integration.test_monitor import hooks_of, prompt

WINDOW, WIDTH, TAPS = 8, 16, 2
REQUEST = 1000  # tokens of a request
PLANTED = 4096  # bytes that the planted leak keeps of each cycle


class Layers(nn.Module):
    """Rows go through as they are: all time goes to the monitor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(TAPS))

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            rows = layer(rows)
        return rows


def growth(work: Callable[[int], object], times: int) -> int:
    """Resident bytes that so many calls leave behind, after as many as fill pools and caches."""
    for index in range(max(20, times // 20)):
        work(index)
    before = resident()
    for index in range(times):
        work(index)
    return resident() - before


def session(tokens: int) -> dict[str, int]:
    """Requests without end through one monitor, then all these tokens in one request."""
    model, rows = Layers(), torch.randn(1, REQUEST, WIDTH, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"modules": list(model.layers), "start": "prompt", "window": WINDOW}
    with EigenTrack(model, **options) as track:
        grown = growth(lambda _: model(rows), tokens // REQUEST)
        assert track.steps == REQUEST and track.descriptors.isfinite().all()
    before = resident()
    one = rows.repeat(1, tokens // REQUEST, 1)
    held = resident()
    with EigenTrack(model, **options) as track:
        model(one)
        history = resident() - held
        assert track.steps == tokens
    return {"requests": grown, "history": history, "rows": held - before, "documented": tokens * documented()}


def documented() -> int:
    """Bytes of a token in the history: descriptors, eigenvalues, the token itself, and the counts of its window."""
    return TAPS * (len(DESCRIPTORS) + WINDOW) * 4 + 8 + 3 * 8


def attachments(cycles: int, keep: Callable[[EigenTrack], object] = lambda track: None) -> dict[str, int]:
    """Monitors that come and go on one model; every third is left by an exception."""
    model, ids = tiny_llama(depth=2), prompt(1, 2)

    def cycle(index: int) -> None:
        try:
            with EigenTrack(model, layers="all", window=4, start="prompt") as track, torch.no_grad():
                model(ids)
                keep(track)
                if index % 3 == 0:
                    raise ConnectionError
        except ConnectionError:
            pass

    grown = growth(cycle, cycles)
    gc.collect()
    alive = sum(isinstance(found, EigenTrack | Attachment) for found in gc.get_objects())
    return {"grown": grown, "hooks": hooks_of(model), "alive": alive}


def leaking(cycles: int) -> dict[str, int]:
    """Planted: something is kept of each monitor."""
    kept: list[bytearray] = []
    return attachments(cycles, lambda _: kept.append(bytearray(PLANTED)))


def with_a_hook_left_over(cycles: int) -> dict[str, int]:
    """Planted: a hook stays when a monitor goes."""
    sound = Attachment.remove

    def remove(self: Attachment) -> None:
        self._hooks.pop()
        sound(self)

    Attachment.remove = remove  # type: ignore[method-assign]
    return attachments(cycles)


def main(tokens: int, cycles: int) -> None:
    torch.set_num_threads(1)
    work = [(session, tokens), (attachments, cycles), (leaking, cycles), (with_a_hook_left_over, 20)]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as fresh:
        print(json.dumps({task.__name__: fresh.apply(task, (size,)) for task, size in work}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
