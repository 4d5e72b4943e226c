"""Ranks from spectra that are known: planted outliers, pure noise, subspaces, zeros."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from rmtkd.config import Config
from rmtkd.errors import ConfigError
from rmtkd.rank import choose, kept_energy, leading_eigenvectors, round_rank
from rmtkernels.errors import ShapeError
from rmtkernels.laws import marchenko_pastur_cell_means, marchenko_pastur_median

PLAIN: dict[str, Any] = {"multiple": 1, "min_ratio": 0.0}


def noise(dim: int, rows: int, spikes: tuple[float, ...] = (), variance: float = 2.0) -> np.ndarray:
    """The law's own eigenvalues, with some replaced by outliers; in a shuffled order."""
    spectrum = variance * marchenko_pastur_cell_means(dim, dim / rows)
    spectrum[: len(spikes)] = spikes
    return np.random.default_rng(0).permutation(spectrum)


@pytest.mark.parametrize("method", ["median", "fit"])
def test_planted_outliers_are_counted(method: str) -> None:
    edge = 2 * (1 + math.sqrt(0.1)) ** 2
    spectrum = noise(400, 4000, (900.0, 50.0, 1.1 * edge))
    choice = choose(spectrum, 4000, Config(noise=method, **PLAIN))
    assert choice.raw_rank == choice.rank == choice.outliers[method] == 3
    assert choice.q == 0.1
    assert choice.sigma2[method] == pytest.approx(2, rel=0.03)
    assert choice.edges[method] == choice.sigma2[method] * (1 + math.sqrt(0.1)) ** 2


def test_every_method_has_its_own_definition() -> None:
    spectrum = np.random.default_rng(0).permutation(1 / np.arange(1, 401))
    choice = choose(spectrum, 4000, Config(quantile=0.3, **PLAIN))
    assert choice.sigma2["trace"] == pytest.approx(spectrum.mean(), rel=1e-12)
    assert choice.sigma2["quantile"] == np.quantile(spectrum, 0.3)
    assert choice.sigma2["median"] == pytest.approx(np.median(spectrum) / marchenko_pastur_median(0.1), rel=1e-12)
    for method in ("quantile", "median", "trace", "fit"):
        assert choice.outliers[method] == (spectrum > choice.edges[method]).sum()
    assert choice.raw_rank == choice.outliers["quantile"] > choice.outliers["median"] > choice.outliers["trace"]


def test_the_quantile_sets_the_rank_of_a_power_law() -> None:
    """papers.md 2.5: d = 768, n = 40000, eigenvalues 1/i: about 47 % are kept at .4, 39 % at .5, 31 % at .6."""
    spectrum = 1 / np.arange(1, 769)
    for quantile, share in ((0.4, 0.47), (0.5, 0.39), (0.6, 0.31)):
        choice = choose(spectrum, 40_000, Config(quantile=quantile, **PLAIN))
        assert choice.raw_rank / 768 == pytest.approx(share, abs=0.011)
        assert choice.raw_rank == sum(
            value > np.quantile(spectrum, quantile) * (1 + math.sqrt(768 / 40_000)) ** 2 for value in spectrum
        )


def test_spikes_are_counted_without_a_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4096, 512, generator=generator, dtype=torch.float64) * torch.linspace(1, 2, 512)
    rows[:, :4] *= 6
    spectrum = torch.linalg.eigvalsh(rows.T @ rows / 4096)
    choice = choose(spectrum, 4096, Config(noise="spikes", **PLAIN))
    assert choice.raw_rank == choice.spikes == 4
    assert choose(spectrum[1:], 4096, Config()).spikes is None


def test_spikes_need_a_width() -> None:
    with pytest.raises(ConfigError, match=r"at least 512 dimensions, and there are some of 384.*median"):
        choose(noise(384, 4000), 4000, Config(noise="spikes"))


def test_activations_in_a_subspace_are_judged_within_it() -> None:
    inner = noise(100, 4000, (900.0, 50.0))
    padded = np.concatenate([inner, 1e-13 * np.random.default_rng(1).random(300)])
    for method in ("quantile", "median", "trace", "fit"):
        config = Config(noise=method, **PLAIN)
        within, whole = choose(inner, 4000, config), choose(padded, 4000, config)
        assert whole.support == 100 and whole.dim == 400
        assert whole.q == within.q == 100 / 4000
        assert whole.outliers == within.outliers and whole.sigma2 == within.sigma2
        assert whole.raw_rank == within.raw_rank
    assert choose(padded, 4000, Config(min_ratio=0.5, multiple=1, noise="trace")).rank == 50  # of what is filled


def test_fewer_samples_than_dimensions_are_no_subspace() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((100, 400))
    spectrum = np.linalg.eigvalsh(rows.T @ rows / 100)
    choice = choose(spectrum, 100, Config(noise="median", **PLAIN))
    assert choice.support == choice.dim == 400 and choice.q == 4
    assert choice.sigma2["median"] == pytest.approx(1, rel=0.05)
    assert choice.raw_rank <= 2
    assert choose(spectrum, 100, Config(noise="quantile", **PLAIN)).raw_rank <= 100  # the quantile is a zero


@pytest.mark.parametrize(
    ("raw", "dim", "least", "multiple", "rank", "clamped"),
    [
        (17, 64, 0, 8, 24, False),
        (16, 64, 0, 8, 16, False),
        (0, 64, 0, 8, 8, False),
        (63, 64, 0, 8, 64, False),
        (61, 62, 0, 8, 62, False),
        (3, 64, 0.2 * 64, 8, 16, True),
        (10, 64, 0.2 * 64, 8, 16, False),
        (16.1, 64, 0, 8, 24, False),
    ],
)
def test_rounding(raw: float, dim: int, least: float, multiple: int, rank: int, clamped: bool) -> None:
    assert round_rank(raw, dim, least, multiple) == (rank, clamped)


def test_both_multiples_divide_the_rank() -> None:
    choice = choose(noise(384, 40_000, tuple(range(50, 80))), 40_000, Config(noise="fit", multiple=8, min_ratio=0), 12)
    assert choice.raw_rank == 30 and choice.rank == 48


def test_min_ratio_clamps_and_says_so() -> None:
    spectrum = noise(384, 40_000, (90.0,))
    assert (choose(spectrum, 40_000, Config(noise="fit", min_ratio=0.2)).rank, 80) == (80, 80)
    assert choose(spectrum, 40_000, Config(noise="fit", min_ratio=0.2)).clamped
    assert not choose(spectrum, 40_000, Config(noise="fit", min_ratio=0)).clamped


def test_no_activation_at_all_keeps_the_least() -> None:
    choice = choose(np.zeros(64), 1000, Config(min_ratio=0.0))
    assert (choice.raw_rank, choice.rank, choice.kept_energy) == (0, 8, 1.0)
    assert choice.outliers == dict.fromkeys(choice.outliers, 0)


def test_kept_energy() -> None:
    assert kept_energy([1.0, 3.0, 4.0], 2) == 7 / 8
    assert kept_energy([1.0, -1e-9], 1) == 1


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [1.0, -0.5]])
def test_no_spectrum(bad: list[float]) -> None:
    with pytest.raises(ShapeError):
        choose(bad, 100, Config())


@pytest.mark.parametrize("k", [1, 7, 8, 40, 64])  # both sides of the switch between Lanczos and eigh
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_eigenvectors(k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    values = torch.linspace(10, 1, 64, dtype=torch.float64)
    found = leading_eigenvectors(((basis * values) @ basis.T).to(dtype), k)
    assert found.shape == (64, k) and found.dtype == torch.float32 and found.is_contiguous()
    assert (found.double().T @ found.double() - torch.eye(k)).abs().max() < 1e-6
    assert ((found.double() * basis[:, :k]).sum(0).abs() - 1).abs().max() < 1e-6
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()


def test_equal_eigenvalues_still_give_an_orthonormal_basis() -> None:
    found = leading_eigenvectors(torch.eye(96), 12).double()
    assert (found.T @ found - torch.eye(12)).abs().max() < 1e-6
