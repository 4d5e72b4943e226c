"""Tracy-Widom's law against Painleve's equation, its determinant, its tail and moments, and simulated matrices."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, linalg, special, stats

from rmtkernels import ShapeError, laws
from rmtkernels.laws import tracy_widom
from rmtkernels.laws.tracy_widom import (
    TRACY_WIDOM_MEAN,
    TRACY_WIDOM_VARIANCE,
    tracy_widom_cdf,
    tracy_widom_center_scale,
    tracy_widom_density,
    tracy_widom_log_survival,
    tracy_widom_quantile,
    tracy_widom_survival,
)

SEAM = 12.0


def log_survival_by_determinant(s: float) -> float:
    """ln(1 - det(I - Ai(x + y + s))) by a double exponential rule, x = exp(t - e^-t), which is not the table's."""
    t, step = np.linspace(-3.6, math.log(40), 110, retstep=True)
    x = np.exp(t - np.exp(-t))
    root = np.sqrt(x * (1 + np.exp(-t)) * step)
    matrix = root[:, None] * special.airy(x[:, None] + x + s)[0] * root
    return math.log(-math.expm1(np.log1p(-np.linalg.eigvalsh(matrix)).sum()))


def log_tail_by_quadrature(s: float) -> float:
    """ln of (1/2) int_s^inf Ai, which 1 - F1 is up to a factor 1 + exp(-(2/3) s^(3/2))."""
    zeta = 2 / 3 * s**1.5
    width = 60 / math.sqrt(s)
    value = integrate.quad(
        lambda t: special.airye(t)[0] * math.exp(zeta - 2 / 3 * t**1.5), s, s + width, epsabs=0, epsrel=1e-12
    )[0]
    return math.log(0.5 * value) - zeta


def test_against_painleve() -> None:
    """F1 = exp(-(1/2) int_s^inf (x - s) u^2 + u dx), u'' = s u + 2 u^3, u ~ Ai: no determinant anywhere."""

    def slopes(s: float, y: np.ndarray) -> list[float]:
        u, du, _, _, square = y
        return [du, s * u + 2 * u**3, -u, -square, -(u**2)]

    start = 6.0
    ai, slope = special.airy(start)[:2]
    first = integrate.quad(lambda t: special.airy(t)[0], start, 30, epsabs=0)[0]
    second = integrate.quad(lambda t: (t - start) * special.airy(t)[0] ** 2, start, 30, epsabs=0)[0]
    square = integrate.quad(lambda t: special.airy(t)[0] ** 2, start, 30, epsabs=0)[0]
    points = np.arange(5.97, -5, -0.31)
    solution = integrate.solve_ivp(
        slopes, (start, -5), [ai, slope, first, second, square], "DOP853", points, rtol=1e-12, atol=1e-16
    )
    expected = -0.5 * (solution.y[2] + solution.y[3])
    np.testing.assert_allclose(tracy_widom_cdf(points), np.exp(expected), atol=4e-8, rtol=0)
    np.testing.assert_allclose(tracy_widom_cdf(points), np.exp(expected), rtol=1e-4)


def test_between_the_points_of_the_table() -> None:
    points = np.random.default_rng(3).uniform(-6, SEAM, 150)
    expected = np.array([log_survival_by_determinant(s) for s in points])
    found = tracy_widom_log_survival(points)
    np.testing.assert_allclose(found, expected, atol=1e-7, rtol=0)
    plain = expected < -0.1
    np.testing.assert_allclose(found[plain], expected[plain], rtol=5e-7)


@pytest.mark.parametrize("s", [8.0, 11.9, SEAM, SEAM + 0.1, 15.0, 40.0, 300.0])
def test_the_right_tail(s: float) -> None:
    assert tracy_widom_log_survival(s) == pytest.approx(log_tail_by_quadrature(s), abs=4e-7 if s < 10 else 1e-7)


def test_the_right_tail_never_underflows() -> None:
    value = tracy_widom_log_survival(1e9)
    assert value == pytest.approx(-2 / 3 * 1e9**1.5, rel=1e-11)
    assert tracy_widom_log_survival(math.inf) == -math.inf
    assert tracy_widom_survival(100.0) == pytest.approx(math.exp(tracy_widom_log_survival(100.0)), rel=1e-12)
    assert tracy_widom_survival(100.0) > 0


def test_the_seams_are_closed() -> None:
    before, after = tracy_widom_log_survival(np.array([np.nextafter(SEAM, 0), SEAM]))
    assert after == pytest.approx(before, abs=1e-7)
    assert tracy_widom.TAIL_START == SEAM
    left = laws.TRACY_WIDOM_TABLE_START + laws.TRACY_WIDOM_TABLE_STEP
    assert tracy_widom_log_survival(np.nextafter(left, -9)) == 0
    assert -2e-16 < tracy_widom_log_survival(left) < 0


def test_the_rule_that_kernels_repeat() -> None:
    """Written out once more, one number at a time."""
    table = laws.TRACY_WIDOM_LOG_SURVIVAL

    def rule(s: float) -> float:
        position = (s - laws.TRACY_WIDOM_TABLE_START) / laws.TRACY_WIDOM_TABLE_STEP
        if position < 1:
            return 0.0
        if position >= len(table) - 2:
            y = s**-1.5
            tail = sum(c * y ** (k + 1) for k, c in enumerate(laws.TRACY_WIDOM_TAIL_SERIES))
            return -2 / 3 / y - 0.75 * math.log(s) - math.log(4 * math.sqrt(math.pi)) + tail
        i = int(position)
        t = position - i
        return (
            -t * (t - 1) * (t - 2) / 6 * table[i - 1]
            + (t + 1) * (t - 1) * (t - 2) / 2 * table[i]
            - (t + 1) * t * (t - 2) / 2 * table[i + 1]
            + (t + 1) * t * (t - 1) / 6 * table[i + 2]
        )

    points = np.concatenate([np.linspace(-10, 14, 1001), [-math.inf, -8.9375, 11.9375, 12.0, 1e6]])
    np.testing.assert_allclose([rule(s) for s in points], tracy_widom_log_survival(points), rtol=1e-13, atol=1e-30)


def test_it_never_rises() -> None:
    points = np.linspace(-10, 20, 100_001)
    assert np.all(np.diff(tracy_widom_log_survival(points)) <= 0)
    assert np.all(np.diff(tracy_widom_cdf(points)) >= 0)
    assert all(b < a for a, b in itertools.pairwise(laws.TRACY_WIDOM_LOG_SURVIVAL))


def test_mean_and_variance() -> None:
    left, right = np.linspace(-10, 0, 1001), np.linspace(0, 14, 1401)
    below, above = tracy_widom_cdf(left), tracy_widom_survival(right)
    mean = integrate.simpson(above, right) - integrate.simpson(below, left)
    square = 2 * integrate.simpson(right * above, right) - 2 * integrate.simpson(left * below, left)
    assert mean == pytest.approx(-1.2065335745820, abs=1e-7)
    assert square - mean**2 == pytest.approx(1.607781034581, abs=5e-7)
    assert (TRACY_WIDOM_MEAN, TRACY_WIDOM_VARIANCE) == (-1.2065335745820, 1.6077810345810)


def test_the_density_is_that_of_the_cdf() -> None:
    s = np.linspace(-8, 14, 501)
    h = 1e-4
    slope = (tracy_widom_cdf(s + h) - tracy_widom_cdf(s - h)) / (2 * h)
    np.testing.assert_allclose(tracy_widom_density(s), slope, atol=4e-6)
    total = integrate.trapezoid(tracy_widom_density(np.linspace(-9, 14, 5001)), np.linspace(-9, 14, 5001))
    assert total == pytest.approx(1, abs=1e-6)
    assert tracy_widom_density(np.array([-math.inf, -20.0, math.inf])).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("u", "s"), [(0.5, -1.2686), (0.90, 0.4501), (0.95, 0.9793), (0.99, 2.0234), (0.01, -3.8954), (0.05, -3.1804)]
)
def test_known_quantiles(u: float, s: float) -> None:
    assert tracy_widom_quantile(u) == pytest.approx(s, abs=6e-5)


@given(st.floats(min_value=-8, max_value=7))
def test_quantile_and_cdf_invert_each_other(s: float) -> None:
    u = tracy_widom_cdf(s)
    grain = 2.3e-16 / max(tracy_widom_density(s), 1e-300) if u > 0.5 else 0.0
    assert tracy_widom_quantile(u) == pytest.approx(s, abs=1e-9 + 2 * grain)


def test_quantiles_of_arrays_and_ends() -> None:
    values = tracy_widom_quantile(np.array([[0.0, 1e-300, 0.5, 1.0]]))
    assert values.shape == (1, 4)
    assert values[0, 0] == -math.inf and values[0, 3] == math.inf
    assert -9 < values[0, 1] < -8.9
    assert isinstance(tracy_widom_quantile(0.5), float)


@pytest.mark.parametrize("u", [-0.1, 1.1, math.nan])
def test_a_probability_out_of_range_is_refused(u: float) -> None:
    with pytest.raises(ShapeError, match="probabilities"):
        tracy_widom_quantile(u)


def test_nan_stays() -> None:
    for function in (tracy_widom_cdf, tracy_widom_survival, tracy_widom_log_survival, tracy_widom_density):
        assert np.isnan(function(np.array([math.nan, 0.0]))).tolist() == [True, False]


def largest_wishart_eigenvalues(n: int, dim: int, draws: int, seed: int) -> np.ndarray:
    """Of G = H H', H n x dim standard normal, n <= dim; by its bidiagonal model (Dumitriu and Edelman 2002)."""
    rng = np.random.default_rng(seed)
    diagonal = np.sqrt(rng.chisquare(dim - np.arange(n), (draws, n)))
    below = np.sqrt(rng.chisquare(n - 1 - np.arange(n - 1), (draws, n - 1)))
    main = diagonal**2
    main[:, 1:] += below**2
    off = diagonal[:, :-1] * below
    return np.array(
        [
            linalg.eigvalsh_tridiagonal(a, b, select="i", select_range=(n - 1, n - 1))[0]
            for a, b in zip(main, off, strict=True)
        ]
    )


@pytest.mark.parametrize(("n", "dim"), [(100, 400), (30, 3000)])
def test_the_largest_eigenvalue_of_noise_follows_it(n: int, dim: int) -> None:
    center, scale = tracy_widom_center_scale(n, dim)
    s = (largest_wishart_eigenvalues(n, dim, 2000, seed=11) - center) / scale
    error = math.sqrt(TRACY_WIDOM_VARIANCE / s.size)
    assert s.mean() == pytest.approx(TRACY_WIDOM_MEAN, abs=2.5 * error)
    assert s.var() == pytest.approx(TRACY_WIDOM_VARIANCE, rel=0.12)
    assert stats.kstest(s, tracy_widom_cdf).pvalue > 1e-3


def test_center_and_scale() -> None:
    center, scale = tracy_widom_center_scale(100, 400)
    a, b = math.sqrt(99.5), math.sqrt(399.5)
    assert (center, scale) == pytest.approx(((a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)), rel=1e-15)
    assert tracy_widom_center_scale(400, 100) == pytest.approx((center, scale), rel=1e-15)
    assert center / 400 == pytest.approx(laws.marchenko_pastur_edges(0.25)[1], rel=0.01)
    with pytest.raises(ShapeError):
        tracy_widom_center_scale(0, 10)
    with pytest.raises(ShapeError):
        tracy_widom_center_scale(10, 0)
