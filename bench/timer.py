"""The timer: every function in turn, round after round, so that a machine whose speed drifts is fair to all."""

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

Times = dict[str, np.ndarray]
LARGEST_COPY = 1 << 28


def interleave(functions: Mapping[str, Callable[[], object]], rounds: int, block_ms: float = 2.0) -> Times:
    """Seconds per call, (rounds,) for each function. A round runs each for a block of about `block_ms`.

    Every second round goes backwards: whoever is always first after another's data pays some 2 % for it. A function
    that fits its block more than once is run before its block as well, untimed: the others' data may have filled the
    cache.
    """
    calls = {}
    for name, function in functions.items():
        function()
        began = time.perf_counter()
        function()
        calls[name] = max(1, int(block_ms / 1e3 / (time.perf_counter() - began)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for count in range(rounds):
        order = list(functions.items())
        for name, function in order if count % 2 == 0 else reversed(order):
            if calls[name] > 1:
                function()
            began = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - began) / calls[name])
    return {name: np.array(values) for name, values in times.items()}


def ratio(times: Times, peer: str, ours: str = "ours") -> tuple[float, float, float]:
    """Median of the ratios peer / ours, round by round, and the interval that holds 90 % of them."""
    low, middle, high = np.percentile(times[peer] / times[ours], [5, 50, 95])
    return float(middle), float(low), float(high)


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % confidence limits of the median, by order statistics; of fewer than six values all of their range."""
    ordered = np.sort(values)
    outside = max(0, int(len(values) / 2 - 0.98 * len(values) ** 0.5))
    return float(ordered[outside]), float(ordered[-1 - outside])


def copy_of(footprint: int) -> tuple[Callable[[], object], int]:
    """A copy between two buffers of `footprint` / 2 bytes, and the bytes that it reads and writes.

    Beyond what any cache holds the speed no longer changes: larger footprints are cut to LARGEST_COPY.
    """
    source = torch.ones(max(min(footprint, LARGEST_COPY) // 8, 1), dtype=torch.float32)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel() * 4


def gemm_of(dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A matrix product that fits the cache, with the threads in force, and its operations."""
    size = 384
    matrix = torch.ones(size, size, dtype=dtype)
    return lambda: matrix @ matrix, 2 * size**3
