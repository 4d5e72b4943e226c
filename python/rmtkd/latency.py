"""Latency: functions timed in turn, so that what else the machine does falls on all of them alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

_BUDGET = 0.2  # seconds for a comparison, and
_ROUNDS = 5, 200  # how many rounds it has at least and at most


def milliseconds(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median wall time of a call of each, in milliseconds, after one call each that does not count.

    They are called in turn, forwards and backwards, with PyTorch's present number of threads, without gradients, and
    accelerators are waited for. At least 5 rounds; more, up to 200, as long as all rounds take 0.2 seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    with torch.no_grad():
        for function in functions.values():
            _timed(function)
        start, order = time.perf_counter(), list(functions)
        for done in range(_ROUNDS[1]):
            if done >= _ROUNDS[0] and time.perf_counter() - start > _BUDGET:
                break
            for name in order:
                times[name].append(_timed(functions[name]))
            order.reverse()
    return {name: median(taken) for name, taken in times.items()}


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) * 1e3
