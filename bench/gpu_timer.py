"""Times on a GPU: events around each call, a cold cache, every function in turn."""

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from bench.timer import Times

COLD_BYTES = 256 << 20  # written before each call: more than any second-level cache holds


def interleave_cold(functions: Mapping[str, Callable[[], object]], rounds: int, device: str) -> Times:
    """Seconds per call, (rounds,) for each function. What a call needs of launches is queued while the GPU is busy with
    the cache, and so hidden where it is short. On the CPU the wall clock."""
    for function in functions.values():
        function()
    if device == "cpu":
        return {name: np.array([_wall(function)]) for name, function in functions.items()}
    cold = torch.empty(COLD_BYTES // 4, device=device)
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cold.zero_()
            start.record()
            function()
            end.record()
            pairs[name].append((start, end))
    torch.cuda.synchronize()
    return {name: np.array([a.elapsed_time(b) / 1e3 for a, b in events]) for name, events in pairs.items()}


def captured(function: Callable[[], object]) -> Callable[[], object] | None:
    """The same call as a CUDA graph, or None if it cannot be captured: it waits for the device, or asks it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _wall(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
