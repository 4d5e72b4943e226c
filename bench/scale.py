"""How time and memory grow with each size of an operator: curves, and exponents of fit and theory.

A sweep changes one size and holds the others. Its points are timed in turn, smallest and largest in the same rounds, so
that a machine whose speed drifts does not bend the curve. The exponent is fitted to the upper half of the sizes: below
it, calls cost what Python costs. Memory is measured, not computed: the most that the process has resident while the
arguments are made and one call runs, beyond what it had before.
"""

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmtkernels
from bench.timer import interleave, median_interval

Call = Callable[[], object]
ROUNDS, BLOCK_MS = 9, 5.0


@dataclass(frozen=True)
class Sweep:
    """One operator against one size.

    Attributes:
        make: a size -> a call with everything it needs made.
        theory: exponent of the time in that size, where the size rules.
        memory: exponent of the bytes.
    """

    axis: str
    sizes: tuple[int, ...]
    make: Callable[[int], Call]
    theory: float
    memory: float


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def push(layers: int = 10, batch: int = 1, window: int = 32, width: int = 1024) -> Call:
    state = rmtkernels.SlidingWindow(layers, batch, window, width)
    token = [rows(batch, width) for _ in range(layers)]
    return lambda: state.update(token)


def window_gram(length: int = 256, window: int = 32, width: int = 1024) -> Call:
    hidden = rows(1, length, width)
    return lambda: rmtkernels.window_gram(hidden, window)


def eigvalsh(count: int = 32, n: int = 32) -> Call:
    gram = rows(count, n, 2 * n)
    gram = gram @ gram.mT
    return lambda: rmtkernels.spectrum_eigvalsh(gram)


def descriptors(count: int = 32, n: int = 32) -> Call:
    gram = rows(count, 1, n, 2 * n)
    gram, seen = gram @ gram.mT, torch.tensor([n])
    return lambda: rmtkernels.spectrum_descriptors(gram, seen, 2 * n)


def covariance(n: int = 2048, d: int = 512) -> Call:
    batch, state = rows(n, d), rmtkernels.StreamingCovariance(d)
    return lambda: state.update(batch)


def multiply(d: int) -> Call:
    matrix, block = rows(d, d), rows(8, d)
    return lambda: rmtkernels.lanczos_multiply(matrix, block)


def multiply_gram(n: int = 2048, d: int = 1024) -> Call:
    samples, block = rows(n, d), rows(8, d)
    return lambda: rmtkernels.lanczos_multiply_gram(samples, block)


def top(d: int = 1024, k: int = 32) -> Call:
    """Eigenvalues 2^(-i / k): however many are wanted, as many products find them."""
    turn = torch.linalg.qr(rows(d, d)).Q
    matrix = (turn * 2.0 ** (-torch.arange(d) / k)) @ turn.T
    matrix = (matrix + matrix.T) / 2
    return lambda: rmtkernels.lanczos_eigh(matrix, k)


def lowrank(count: int = 1, d: int = 2048, k: int = 128) -> Call:
    x, down, up = rows(count, d), rows(k, d), rows(d, k)
    return lambda: rmtkernels.lowrank_linear(x, down, up)


def threaded(make: Callable[[], Call]) -> Callable[[int], Call]:
    """Of the number of threads. Each call sets it, which costs less than a microsecond."""

    def with_threads(threads: int) -> Call:
        call = make()

        def inner() -> object:
            torch.set_num_threads(threads)
            return call()

        return inner

    return with_threads


THREADS = (1, 2)
SWEEPS: dict[str, list[Sweep]] = {
    "window_push_": [
        Sweep("N", (8, 16, 32, 64, 128), lambda n: push(window=n), 1, 1),
        Sweep("D", (256, 512, 1024, 2048, 4096, 8192), lambda d: push(width=d), 1, 1),
        Sweep("layers", (1, 2, 4, 8, 16, 32), lambda layers: push(layers=layers), 1, 1),
        Sweep("batch", (1, 2, 4, 8, 16, 32), lambda batch: push(batch=batch), 1, 1),
        Sweep("threads", THREADS, threaded(lambda: push(layers=32, batch=8)), -1, 0),
    ],
    "window_gram": [
        Sweep("T", (64, 128, 256, 512, 1024), lambda t: window_gram(length=t), 1, 1),
        Sweep("N", (8, 16, 32, 64, 128), lambda n: window_gram(window=n), 1, 2),
        Sweep("D", (256, 512, 1024, 2048, 4096), lambda d: window_gram(width=d), 1, 1),
    ],
    "spectrum_eigvalsh": [
        Sweep("N", (8, 16, 32, 64, 128), lambda n: eigvalsh(n=n), 3, 2),
        Sweep("batch", (8, 16, 32, 64, 128, 256), lambda count: eigvalsh(count=count), 1, 1),
        Sweep("threads", THREADS, threaded(lambda: eigvalsh(count=64, n=64)), -1, 0),
    ],
    "spectrum_descriptors_": [
        Sweep("N", (8, 16, 32, 64, 128), lambda n: descriptors(n=n), 3, 2),
        Sweep("layers", (8, 16, 32, 64, 128, 256), lambda count: descriptors(count=count), 1, 1),
    ],
    "covariance_update_": [
        Sweep("d", (128, 256, 512, 1024, 2048), lambda d: covariance(d=d), 2, 2),
        Sweep("n", (256, 512, 1024, 2048, 4096), lambda n: covariance(n=n), 1, 1),
        Sweep("threads", THREADS, threaded(lambda: covariance(d=1024)), -1, 0),
    ],
    "lanczos_multiply": [
        Sweep("d", (256, 512, 1024, 2048, 4096), multiply, 2, 2),
    ],
    "lanczos_multiply_gram": [
        Sweep("n", (512, 1024, 2048, 4096, 8192), lambda n: multiply_gram(n=n), 1, 1),
        Sweep("d", (256, 512, 1024, 2048), lambda d: multiply_gram(d=d), 1, 1),
    ],
    "lanczos_eigh": [
        Sweep("d", (256, 512, 1024, 2048), lambda d: top(d=d), 2, 2),
        Sweep("k", (8, 16, 32, 64), lambda k: top(k=k), 1, 0),
    ],
    "lowrank_linear": [
        Sweep("rows", (1, 2, 4, 8, 16), lambda count: lowrank(count=count), 1, 0),
        Sweep("d", (512, 1024, 2048, 4096, 8192), lambda d: lowrank(d=d), 1, 1),
        Sweep("k", (32, 64, 128, 256, 512), lambda k: lowrank(k=k), 1, 1),
    ],
}


def measure(sweeps: list[Sweep]) -> dict[str, Any]:
    """Axis -> sizes, seconds with the 95 % limits of their medians, resident bytes, exponents."""
    return {sweep.axis: _measure_one(sweep) for sweep in sweeps}


def _measure_one(sweep: Sweep) -> dict[str, Any]:
    torch.set_num_threads(1)
    sweep.make(sweep.sizes[0])()  # what the first call of all loads is not this size's memory
    made = [resident_bytes(lambda size=size: sweep.make(size)) for size in sweep.sizes]
    calls = {str(size): call for size, (call, _) in zip(sweep.sizes, made, strict=True)}
    times = interleave(calls, ROUNDS, BLOCK_MS)
    torch.set_num_threads(1)
    seconds = [float(np.median(times[name])) for name in calls]
    fitted, error = exponent(sweep.sizes, seconds)
    found = {
        "sizes": list(sweep.sizes),
        "seconds": seconds,
        "confidence": [median_interval(times[name]) for name in calls],
        "bytes": [count for _, count in made],
        "exponent": {"fitted": fitted, "standard error": error, "theory": sweep.theory, "memory": sweep.memory},
    }
    print(
        f"{sweep.axis:>8} {sweep.sizes[0]} … {sweep.sizes[-1]}: {seconds[0] * 1e6:.1f} … {seconds[-1] * 1e6:.1f} us, "
        f"exponent {fitted:.2f}{'' if error is None else f' ± {error:.2f}'}, theory {sweep.theory:g}",
        flush=True,
    )
    return found


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> tuple[float, float | None]:
    """Slope of ln(seconds) against ln(size) over the upper half of the sizes, and its standard error (None of two)."""
    upper = slice((len(sizes) - 1) // 2, None)
    x, y = np.log(sizes[upper]), np.log(seconds[upper])
    if len(x) < 3:
        return float((y[-1] - y[0]) / (x[-1] - x[0])), None
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), float(covariance[0, 0] ** 0.5)


def resident_bytes(make: Callable[[], Call]) -> tuple[Call, int]:
    """The call that `make` returns, made and called once, and the most that became resident meanwhile.

    The C library keeps freed memory; it is handed back before, so that it is not mistaken for none.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    call = make()
    call()
    return call, _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
