"""Estimators of the noise variance on simulated noise, with and without planted spikes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtkernels import ShapeError
from rmtkernels.laws import marchenko_pastur_median, marchenko_pastur_quantile, noise_variance

SIZES = [(64, 4096), (100, 400), (150, 150), (200, 80)]
METHODS = ["median", "trace", "quantile", "fit"]
VARIANCE = 3.7


def spectra(n: int, dim: int, spikes: int = 0, draws: int = 12) -> np.ndarray:
    """Eigenvalues of n x n covariances of `dim` samples, noise VARIANCE and spikes of 2 to 20 thresholds."""
    rng = np.random.default_rng(2)
    scale = np.full(n, VARIANCE)
    scale[:spikes] *= np.linspace(2, 20, spikes) * (1 + math.sqrt(n / dim))
    rows = rng.standard_normal((draws, n, dim)) * np.sqrt(scale)[:, None]
    return np.linalg.eigvalsh(rows @ rows.swapaxes(-1, -2) / dim)


@pytest.mark.parametrize(("n", "dim"), SIZES)
@pytest.mark.parametrize("method", ["median", "trace", "fit"])
def test_noise_alone(n: int, dim: int, method: str) -> None:
    q = n / dim
    found = np.array([noise_variance(values, q, method) for values in spectra(n, dim)])
    # The trace, the best of unbiased estimators, has the relative standard deviation sqrt(2 / (n dim))
    error = VARIANCE * math.sqrt(2 / (n * dim)) * {"trace": 1, "median": 3, "fit": 2}[method]
    assert found.mean() == pytest.approx(
        VARIANCE, abs=3 * error / math.sqrt(found.size) + VARIANCE * 0.2 / (n * dim) ** 0.5
    )
    assert found.std() < 2 * error


@pytest.mark.parametrize(("n", "dim"), SIZES[:3])
@pytest.mark.parametrize("tau", [0.4, 0.5])
def test_the_raw_quantile_is_the_laws(n: int, dim: int, tau: float) -> None:
    found = np.mean([noise_variance(values, n / dim, "quantile", tau) for values in spectra(n, dim)])
    assert found == pytest.approx(VARIANCE * marchenko_pastur_quantile(tau, n / dim), rel=3 / n)


def test_the_raw_quantile_may_fall_among_structural_zeros() -> None:
    values = spectra(200, 80)[0]
    assert noise_variance(values, 2.5, "quantile", 0.5) == pytest.approx(0, abs=1e-12)
    assert noise_variance(values, 2.5, "fit", 0.5) == pytest.approx(VARIANCE, rel=0.05)


@pytest.mark.parametrize(("n", "dim"), SIZES[:3])
def test_a_tenth_of_spikes(n: int, dim: int) -> None:
    q = n / dim
    found = {
        method: np.mean([noise_variance(values, q, method) for values in spectra(n, dim, spikes=n // 10)])
        for method in METHODS
    }
    assert found["median"] == pytest.approx(VARIANCE, rel=0.03 + 0.12 * math.sqrt(q))
    assert found["median"] > VARIANCE
    # The spikes take their directions from the bulk: a share f of them lowers it by f q.
    assert found["fit"] == pytest.approx(VARIANCE * (1 - 0.1 * q), rel=0.01 + 0.02 * q)
    assert found["trace"] > 1.8 * VARIANCE


@pytest.mark.parametrize("tau", [0.2, 0.4, 0.6, 0.8])
def test_the_fit_forgets_its_start(tau: float) -> None:
    values = spectra(100, 400, spikes=10)[0]
    assert noise_variance(values, 0.25, "fit", tau) == pytest.approx(noise_variance(values, 0.25, "fit"), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(min_value=-60, max_value=60), seed=st.integers(min_value=0, max_value=99))
def test_scale_and_order(method: str, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    values, q = rng.gamma(1.0, size=n), float(10 ** rng.uniform(-3, 1))
    expected = noise_variance(values, q, method)
    scale = 2.0**exponent
    assert noise_variance(rng.permutation(values) * scale, q, method) == pytest.approx(expected * scale, rel=1e-13)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("q", [0.1, 1.0, 3.0])
def test_zeros(method: str, q: float) -> None:
    assert noise_variance(np.zeros(12), q, method) == 0
    assert noise_variance([0.0], q, method) == 0
    assert isinstance(noise_variance([1, 2, 3], q, method), float)


@pytest.mark.parametrize("method", ["median", "fit"])
def test_one_spike_among_zeros_is_no_noise(method: str) -> None:
    assert noise_variance([0.0] * 9 + [5.0], 0.1, method) == 0
    assert noise_variance([-1e-7] * 9 + [5.0], 0.1, method) == 0  # rounding


def test_known_values() -> None:
    assert noise_variance([1.0, 5.0, 3.0], 0.5, "trace") == 3
    assert noise_variance([1.0, 5.0, 3.0], 0.5) == pytest.approx(3 / marchenko_pastur_median(0.5))
    assert noise_variance([0.0, 0.0, 1.0, 3.0], 2.0) == pytest.approx(2 / marchenko_pastur_median(2.0))
    assert noise_variance([1.0, 2.0, 3.0], 0.5, "quantile", 0.25) == 1.5


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], 3.0, [1.0, math.nan], [1.0, math.inf], [1.0, -0.1], [-1.0, -1.0]])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_spectrum_is_refused(values, method: str) -> None:
    with pytest.raises(ShapeError, match="eigenvalues"):
        noise_variance(values, 0.5, method)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ShapeError, match="method"):
        noise_variance([1.0], 0.5, "mean")
    for quantile in (0.0, 1.0, math.nan):
        with pytest.raises(ShapeError, match="quantile"):
            noise_variance([1.0], 0.5, "quantile", quantile)
    for q in (0.0, math.nan, math.inf):
        with pytest.raises(ShapeError, match="ratio"):
            noise_variance([1.0], q)
