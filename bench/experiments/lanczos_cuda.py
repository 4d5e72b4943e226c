"""The 64 largest eigenpairs to a residual of 1e-5 on a GPU, against torch.linalg.eigh and torch.lobpcg there.

    python -m bench.experiments.lanczos_cuda [--profile]

Milliseconds, medians (lobpcg: once); float32. With --profile also where the time of one search goes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rmtkernels
from rmtkernels.ops.lanczos_multiply_cuda import multiply
from rmtkernels.ops.lanczos_orthonormalize import orthonormalize

K, TOLERANCE, WIDTHS = 64, 1e-5, (2048, 4096, 8192)


def reflected(matrix: Tensor) -> Tensor:
    """The same eigenvalues along other, dense, directions."""
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(3):
        v = torch.randn(len(matrix), generator=generator, device="cuda")
        v /= v.norm()
        matrix = matrix - 2 * torch.outer(v, v @ matrix)
        matrix = matrix - 2 * torch.outer(matrix @ v, v)
    return (matrix + matrix.mT) / 2


def spiked(d: int) -> Tensor:
    """A sample covariance of 2 d rows; 64 population eigenvalues from 100 down to 10, the others 1."""
    samples = torch.randn(2 * d, d, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    samples[:, :K] *= torch.logspace(2, 1, K, device="cuda").sqrt()
    return reflected(samples.mT @ samples / len(samples))


def slow(d: int) -> Tensor:
    """Eigenvalues 1 / sqrt(i)."""
    return reflected((torch.arange(1, d + 1, device="cuda") ** -0.5).diag())


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what the call returns."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin), result


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    call()
    return statistics.median(timed(call)[0] for _ in range(rounds))


def residual(matrix: Tensor, values: Tensor, vectors: Tensor) -> float:
    """The largest, in float64, over the largest eigenvalue."""
    columns, exact = vectors.double(), values.double()
    return float((matrix.double() @ columns - columns * exact).norm(dim=0).max() / exact.abs().max())


def search(name: str, matrix: Tensor) -> None:
    result = rmtkernels.lanczos_eigh(matrix, K, tol=TOLERANCE, backend="cuda")
    assert result.complete and residual(matrix, result.eigenvalues, result.eigenvectors) <= TOLERANCE
    ours = milliseconds(lambda: rmtkernels.lanczos_eigh(matrix, K, tol=TOLERANCE, backend="cuda"), 7)
    eigh = milliseconds(lambda: torch.linalg.eigh(matrix), 3)
    lobpcg, found = timed(lambda: torch.lobpcg(matrix, K, tol=TOLERANCE, niter=200))
    reached = residual(matrix, *found)
    print(f"{name:12} {ours:8.2f} {eigh:9.1f} {lobpcg:9.1f} {reached:9.1e} {result.steps:6}", flush=True)


def one_step(d: int) -> None:
    """What one product, and one block step on a basis of 256 vectors, take."""
    basis = torch.linalg.qr(torch.randn(d, 256, device="cuda"))[0].mT.contiguous()
    matrix, rows, noise = (torch.randn(n, d, device="cuda") / d**0.5 for n in (d, 8, 8))
    none = torch.zeros((), dtype=torch.float64, device="cuda")
    times = [
        milliseconds(lambda: multiply(matrix, rows), 20),
        *(
            milliseconds(lambda by=by: orthonormalize(rows, basis, noise, none, 1, backend=by), 20)
            for by in ("cuda", "reference")
        ),
    ]
    print(f"{d:6} product {times[0]:7.3f}, block step: kernels {times[1]:7.3f}, PyTorch {times[2]:7.3f}", flush=True)


def profile(matrix: Tensor) -> None:
    rmtkernels.lanczos_eigh(matrix, K)
    with torch.profiler.profile() as profiled:
        rmtkernels.lanczos_eigh(matrix, K)
        torch.cuda.synchronize()
    averages = profiled.key_averages()
    print(averages.table(sort_by="self_device_time_total", row_limit=14, max_name_column_width=60))
    print(averages.table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true")
    wanted = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for d in WIDTHS:
        one_step(d)
    print(f"{'':12} {'ours':>8} {'eigh':>9} {'lobpcg':>9} {'residual':>9} {'steps':>6}")
    for make in (spiked, slow):
        for d in WIDTHS:
            search(f"{make.__name__} {d}", make(d))
    if wanted.profile:
        profile(slow(4096))


if __name__ == "__main__":
    main()
