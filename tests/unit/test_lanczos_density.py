"""lanczos: quadrature of the density against exact moments and the law; spikes planted in white and coloured noise."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rmtkernels import lanczos_density, lanczos_multiply, spike_count
from rmtkernels.laws import bbp_threshold, marchenko_pastur_cdf, spike_to_sample, tracy_widom_center_scale
from rmtkernels.ops.lanczos_basis import random_source
from rmtkernels.ops.lanczos_density import jacobi
from rmtkernels.ops.lanczos_multiply import LinearMap
from rmtkernels.reference import lanczos_density_ref, lanczos_matrix_ref
from tests.helpers import normal, same_bits

DOUBLE = torch.float64


def covariance(n: int, population: Tensor, seed: int) -> Tensor:
    """A sample covariance, in the population's own axes: random starts do not care."""
    samples = normal(n, len(population), seed=seed) * population.sqrt().float()
    return samples.mT @ samples / n


def levels(kind: str, d: int) -> Tensor:
    """Population eigenvalues of noise: white, two levels, or the spectrum of an autoregression with coefficient 0.5."""
    if kind == "two":
        return torch.where(torch.arange(d) < d // 2, 1.0, 3.0).double()
    if kind == "autoregressive":
        return 0.75 / (1.25 - ((torch.arange(d).double() + 0.5) * math.pi / d).cos())
    return torch.ones(d, dtype=DOUBLE)


def smallest_seen(population: Tensor, q: float) -> float:
    """The population eigenvalue beyond which a spike leaves the bulk: q mean((t / (a - t))^2) = 1."""
    low, high = float(population.max()) * (1 + 1e-9), 20 * float(population.max())
    for _ in range(100):
        middle = (low + high) / 2
        seen = q * float((population / (middle - population)).square().mean()) < 1
        low, high = (low, middle) if seen else (middle, high)
    return high


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_moments_are_exact_for_each_start(dtype: torch.dtype, isa: str) -> None:
    samples = normal(90, 40, dtype=dtype)
    matrix = (samples.mT @ samples / 90).to(dtype)
    nodes, weights = lanczos_density(matrix, steps=5, probes=3, seed=7)
    start = torch.randn(3, 40, generator=random_source(7), dtype=dtype).double()
    start /= start.norm(dim=1, keepdim=True)
    for moment in range(10):
        want = torch.einsum("pi,ij,pj->p", start, torch.linalg.matrix_power(matrix.double(), moment), start).mean()
        assert abs(float((weights * nodes**moment).sum() / want) - 1) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("gram", [False, True])
def test_all_steps_give_the_eigenvalues(gram: bool) -> None:
    samples = normal(60, 30, dtype=DOUBLE) + 5
    matrix = samples if gram else samples.mT @ samples
    nodes, weights = lanczos_density(matrix, steps=30, probes=2, gram=gram, center=gram)
    want, share = lanczos_density_ref(matrix, gram=gram, center=gram)
    assert torch.allclose(nodes.view(-1, 2).mean(1), want, rtol=1e-8, atol=1e-8)
    assert torch.allclose(weights.sum(), share.sum())


def test_weights_sum_to_one_and_nodes_are_sorted() -> None:
    for matrix in (torch.eye(50), torch.zeros(50, 50), torch.full((1, 1), 3.0), torch.ones(20, 20)):
        nodes, weights = lanczos_density(matrix, steps=min(9, len(matrix)), probes=4)
        assert abs(float(weights.sum()) - 1) < 1e-12 and (weights >= 0).all() and (nodes.diff() >= 0).all()
        trace = float((nodes * weights).sum())
        if (matrix == matrix[0, 0] * torch.eye(len(matrix))).all():  # else probes estimate the trace
            assert abs(trace - float(matrix[0, 0])) <= 1e-5
    nodes, weights = lanczos_density(3 * torch.eye(50), steps=9)
    assert weights[(nodes - 3).abs() < 1e-5].sum() > 1 - 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_are_not_the_samples_of_the_same_seed(dtype: torch.dtype) -> None:
    """Else the starts lie in the few directions that samples of that seed span, and see none of the zeros."""
    torch.manual_seed(3)
    samples = torch.randn(100, 1000, dtype=dtype)
    nodes, weights = lanczos_density(samples, steps=20, probes=8, gram=True, seed=3)
    assert abs(float((nodes * weights).sum()) / float(samples.square().sum() / 1000) - 1) < 0.3


def test_the_density_of_noise_is_the_law() -> None:
    n, d = 2000, 1000
    nodes, weights = lanczos_density(covariance(n, levels("white", d), 0), steps=40, probes=8)
    law = torch.from_numpy(np.asarray(marchenko_pastur_cdf(nodes.numpy(), d / n)))
    assert (weights.cumsum(0) - weights / 2 - law).abs().max() < 0.04


def test_seeds_decide_every_bit() -> None:
    matrix = covariance(300, levels("two", 100), 0)
    first, again, other = (lanczos_density(matrix, steps=20, seed=seed) for seed in (1, 1, 2))
    assert all(map(same_bits, first, again)) and not same_bits(first[0], other[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(same_bits, first, lanczos_density(matrix, steps=20, seed=1)))


def test_jacobi_matrix_is_the_projection() -> None:
    matrix = covariance(80, levels("two", 50), 3).double()
    diagonal, beside = jacobi(LinearMap(matrix, False, False, None), 12, 2, 0)
    unit = torch.randn(2, 50, generator=random_source(0), dtype=DOUBLE)
    krylov = torch.stack([unit[0] @ torch.linalg.matrix_power(matrix / 3, power) for power in range(12)])
    basis = torch.linalg.qr(krylov.mT)[0].mT
    basis *= (basis * lanczos_multiply(matrix, basis).roll(1, 0)).sum(1, keepdim=True).sign()
    projected = basis @ matrix @ basis.mT
    assert torch.allclose(projected.diagonal(), diagonal[0], atol=1e-6)
    assert torch.allclose(projected.diagonal(1).abs(), beside[0, :-1], atol=1e-6)


@pytest.mark.parametrize("kind", ["white", "two", "autoregressive"])
def test_planted_spikes_are_counted(kind: str) -> None:
    """Of five matrices one may be missed: the rates are in docs/conventions.md."""
    n, d = 1024, 512
    population = levels(kind, d)
    threshold = smallest_seen(population, d / n)
    for factors, want in (((), 0), ((0.8, 0.8), 0), ((1.6,), 1), ((1.5, 2.0, 4.0), 3)):
        spiked = population.clone()
        spiked[: len(factors)] = threshold * torch.tensor(factors, dtype=DOUBLE)
        right = sum(spike_count(covariance(n, spiked, seed), seed=seed).count == want for seed in range(5))
        assert right >= 4, (kind, factors, right)


def test_edge_scale_and_values_in_white_noise() -> None:
    n, d, spikes = 2048, 1024, torch.tensor([9.0, 4.0])
    assert spikes.min() > bbp_threshold(d / n)
    population = levels("white", d)
    population[:2] = spikes
    matrix = covariance(n, population, 1)
    found = spike_count(matrix)
    center, scale = tracy_widom_center_scale(d, n)
    assert abs(found.edge * n - center) < 4 * scale and abs(found.scale * n / scale - 1) < 0.3
    assert found.count == 2 and found.threshold > found.edge
    assert torch.allclose(found.eigenvalues, torch.linalg.eigvalsh(matrix.double()).flip(0)[:2], rtol=1e-5)
    assert np.allclose(found.eigenvalues, spike_to_sample(spikes.numpy(), d / n), rtol=0.2)


def test_spikes_of_samples_without_their_covariance() -> None:
    samples = normal(600, 800)
    samples[:, 0] *= 4
    samples += 100 * normal(1, 800, seed=5)
    one = spike_count(samples, gram=True, center=True)
    assert one.count == 1
    dense = spike_count(lanczos_matrix_ref(samples, gram=True, center=True).float())
    assert dense.count == 1 and abs(dense.edge / one.edge - 1) < 1e-3


@pytest.mark.parametrize("matrix", [torch.zeros(600, 600), torch.eye(600), torch.ones(600, 600)])
def test_a_matrix_without_a_bulk(matrix: Tensor) -> None:
    found = spike_count(matrix)
    assert found.count <= 1 and math.isfinite(found.threshold) and found.scale == 0
