"""lanczos: the 64 largest eigenpairs to a residual of 1e-5, of three kinds of matrices, 2048 and 4096 wide, float32.

The loosest tolerance that brings eigsh there is found first, by powers of ten. lobpcg has the same tolerance. What
svd_lowrank and lobpcg reach is reported: svd_lowrank reaches less.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

import rmtkernels
from bench.activations import activations
from bench.case import Case, case

K, TOLERANCE = 64, 1e-5


def reflected(matrix: Tensor) -> Tensor:
    """The same eigenvalues along other, dense, directions."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        v = torch.randn(len(matrix), generator=generator)
        v /= v.norm()
        matrix = matrix - 2 * torch.outer(v, v @ matrix)
        matrix = matrix - 2 * torch.outer(matrix @ v, v)
    return (matrix + matrix.mT) / 2


def spiked(d: int) -> Tensor:
    """A sample covariance of 2 d rows; 64 population eigenvalues from 100 down to 10, the others 1."""
    samples = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(0))
    samples[:, :K] *= torch.logspace(2, 1, K).sqrt()
    return reflected(samples.mT @ samples / len(samples))


def activation(d: int) -> Tensor:
    states = activations(d)
    states -= states.mean(0)
    return states.mT @ states / len(states)


def slow(d: int) -> Tensor:
    """Eigenvalues 1 / sqrt(i)."""
    return reflected((torch.arange(1, d + 1) ** -0.5).diag())


def residual(matrix: Tensor, values: Any, vectors: Any) -> float:
    """The largest, in float64, over the largest eigenvalue."""
    exact, columns = torch.as_tensor(np.array(values)).double(), torch.as_tensor(np.array(vectors)).double()
    return float((matrix.double() @ columns - columns * exact).norm(dim=0).max() / exact.abs().max())


def top(d: int, make: Callable[[int], Tensor], target: float, rounds: int) -> Case:
    matrix = make(d)
    array, start = matrix.numpy(), np.random.default_rng(0).standard_normal(d).astype(np.float32)

    def arpack(tol: float) -> Any:
        return eigsh(array, K, which="LA", tol=tol, v0=start)

    tol = next(tol for tol in (1e-2, 1e-3, 1e-4, 1e-5) if residual(matrix, *arpack(tol)) <= TOLERANCE)
    peers: dict[str, Callable[[], Any]] = {
        "eigsh": lambda: arpack(tol),
        "eigh": lambda: torch.linalg.eigh(matrix),
        "lobpcg": lambda: torch.lobpcg(matrix, K, tol=TOLERANCE, niter=200),
        "svd_lowrank": lambda: torch.svd_lowrank(matrix, q=K),
    }
    reached: dict[str, float] = {}

    def verify() -> None:
        result = rmtkernels.lanczos_eigh(matrix, K, tol=TOLERANCE)
        assert result.complete, "ours did not converge"
        values, vectors = peers["eigh"]()
        want = values.flip(0)[:K]
        assert residual(matrix, result.eigenvalues, result.eigenvectors) <= TOLERANCE, "ours: wrong eigenvectors"
        assert residual(matrix, want, vectors.flip(1)[:, :K]) <= TOLERANCE, "eigh: wrong eigenvectors"
        assert (result.eigenvalues - want).abs().max() <= TOLERANCE * want[0], "ours: wrong eigenvalues"
        left, singular, _ = peers["svd_lowrank"]()
        reached["residual of ours"] = residual(matrix, result.eigenvalues, result.eigenvectors)
        reached["residual of eigsh"] = residual(matrix, *peers["eigsh"]())
        reached["residual of lobpcg"] = residual(matrix, *peers["lobpcg"]())
        reached["residual of svd_lowrank"] = residual(matrix, singular, left)

    return Case(
        ours=lambda: rmtkernels.lanczos_eigh(matrix, K, tol=TOLERANCE),
        peers=peers,
        verify=verify,
        targets={"eigsh": target, "eigh": 10},
        extra=lambda: reached,
        rounds=rounds,
    )


@case("lanczos.top64_spiked_2048")
def spiked_2048() -> Case:
    return top(2048, spiked, 1, 11)


@case("lanczos.top64_activations_2048")
def activations_2048() -> Case:
    return top(2048, activation, 1, 11)


@case("lanczos.top64_slow_2048")
def slow_2048() -> Case:
    return top(2048, slow, 1, 11)


@case("lanczos.top64_spiked_4096")
def spiked_4096() -> Case:
    return top(4096, spiked, 1, 3)


@case("lanczos.top64_activations_4096")
def activations_4096() -> Case:
    return top(4096, activation, 1, 3)


@case("lanczos.top64_slow_4096")
def slow_4096() -> Case:
    return top(4096, slow, 1, 3)
