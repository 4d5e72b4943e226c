"""The Marchenko-Pastur law against quadrature of its density and against simulated spectra."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate

from rmtkernels import ShapeError
from rmtkernels.laws import marchenko_pastur_edges, marchenko_pastur_median


def mass_below(x: float, q: float) -> float:
    """Mass of the unit law of ratio q < 1 in [lower edge, x], by quadrature of the density."""
    low, high = (1 - math.sqrt(q)) ** 2, (1 + math.sqrt(q)) ** 2

    def density(t: float) -> float:
        return math.sqrt(max((high - t) * (t - low), 0.0)) / (2 * math.pi * q * t)

    return float(integrate.quad(density, low, x, limit=400, epsabs=1e-12)[0])


@pytest.mark.parametrize("q", [1e-3, 0.01, 0.1, 0.25, 0.5, 0.9, 0.99])
def test_the_median_halves_the_density(q: float) -> None:
    median = marchenko_pastur_median(q)
    low, high = marchenko_pastur_edges(q)
    assert low < median < high
    assert mass_below(high, q) == pytest.approx(1, abs=1e-6)
    assert mass_below(median, q) == pytest.approx(0.5, abs=1e-7)


def test_known_values() -> None:
    assert marchenko_pastur_edges(1.0) == (0.0, 4.0)
    assert marchenko_pastur_edges(0.25) == (0.25, 2.25)
    assert marchenko_pastur_edges(4.0) == (1.0, 9.0)
    # q = 1: x = 4 cos^2(theta / 2) with theta - sin(theta) = pi / 2
    theta = 2.3098814600100575
    assert theta - math.sin(theta) == pytest.approx(math.pi / 2)
    assert marchenko_pastur_median(1.0) == pytest.approx(4 * math.cos(theta / 2) ** 2, rel=1e-12)


@pytest.mark.parametrize("q", [1e-12, 1e-9, 1e-6, 1e-4])
def test_a_thin_law_has_its_median_near_one(q: float) -> None:
    assert marchenko_pastur_median(q) == pytest.approx(1 - q / 3, abs=0.1 * math.sqrt(q))


def test_the_median_falls_steadily_and_is_continuous_at_one() -> None:
    medians = [marchenko_pastur_median(n / 1000) for n in range(1, 1001)]
    assert all(b < a for a, b in itertools.pairwise(medians))
    assert marchenko_pastur_median(1 - 1e-9) == pytest.approx(marchenko_pastur_median(1 + 1e-9), rel=1e-7)


@pytest.mark.parametrize("q", [1.5, 4.0, 40.0])
def test_beyond_one_the_median_is_that_of_the_transposed_problem(q: float) -> None:
    assert marchenko_pastur_median(q) == pytest.approx(q * marchenko_pastur_median(1 / q), rel=1e-15)


@pytest.mark.parametrize(("n", "dim"), [(64, 4096), (128, 256), (128, 128), (128, 32), (60, 7)])
def test_simulated_noise_has_this_median_and_stays_within_the_edges(n: int, dim: int) -> None:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal(
        (100, min(n, dim), max(n, dim)), dtype=np.float32
    )  # the shorter side: no structural zeros
    eigenvalues = np.linalg.eigvalsh(rows @ rows.swapaxes(-1, -2)) / dim
    q = n / dim
    assert np.median(eigenvalues, axis=1).mean() == pytest.approx(
        marchenko_pastur_median(q), rel=0.02 if min(n, dim) > 30 else 0.06
    )
    low, high = marchenko_pastur_edges(q)
    assert np.mean((eigenvalues >= 0.9 * low - 0.02) & (eigenvalues <= 1.1 * high)) > 0.98


@pytest.mark.parametrize("q", [0.0, -1.0, math.nan])
def test_a_ratio_that_is_not_positive_is_refused(q: float) -> None:
    with pytest.raises(ShapeError):
        marchenko_pastur_median(q)
