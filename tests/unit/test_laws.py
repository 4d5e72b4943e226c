"""The Marchenko-Pastur law against quadrature of its density and against simulated spectra."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize

from rmtkernels import ShapeError
from rmtkernels.laws import (
    marchenko_pastur_atom,
    marchenko_pastur_cdf,
    marchenko_pastur_cell_means,
    marchenko_pastur_density,
    marchenko_pastur_edges,
    marchenko_pastur_median,
    marchenko_pastur_quantile,
)

RATIOS = [1e-12, 1e-7, 1e-4, 0.01, 0.0432, 0.25, 0.9, 0.999, 1 - 1e-6, 1 - 1e-12, 1.0]
BEYOND_ONE = [1 + 1e-9, 1.5, 4.0, 1e3]


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


@pytest.mark.parametrize("q", [1e-7, 1e-5, 1e-3, 0.1, 1.0, 3.0])
def test_the_median_is_the_quantile_of_half_the_bulk(q: float) -> None:
    atom = marchenko_pastur_atom(q)
    assert marchenko_pastur_median(q) == pytest.approx(marchenko_pastur_quantile(atom + 0.5 * (1 - atom), q), rel=5e-13)


@pytest.mark.parametrize("q", [1e-3, 0.1, 0.5, 0.99, 1.0, 2.0, 50.0])
def test_the_density_has_the_moments_of_the_law(q: float) -> None:
    low, high = marchenko_pastur_edges(q)
    # x = middle + radius cos takes the roots out of both edges, and most of the pole out of q = 1
    moments = [
        integrate.quad(
            lambda t, k=k: (
                marchenko_pastur_density(1 + q + 2 * math.sqrt(q) * math.cos(t), q)
                * (1 + q + 2 * math.sqrt(q) * math.cos(t)) ** k
                * (2 * math.sqrt(q) * math.sin(t))
            ),
            0,
            math.pi,
            limit=400,
        )[0]
        for k in range(3)
    ]
    assert moments == pytest.approx([min(1, 1 / q), 1, 1 + q], rel=1e-8)
    assert moments[0] + marchenko_pastur_atom(q) == pytest.approx(1, rel=1e-8)
    assert marchenko_pastur_density(np.array([low - 0.01, high + 0.01, -1.0]), q).tolist() == [0, 0, 0]


def test_the_density_at_its_pole() -> None:
    assert marchenko_pastur_density(0.0, 1.0) == math.inf
    assert marchenko_pastur_density(1e-12, 1.0) == pytest.approx(1e6 / math.pi)  # 1 / (pi sqrt x)
    assert marchenko_pastur_density(4.0, 1.0) == 0
    assert math.isnan(marchenko_pastur_density(math.nan, 0.5))


def mass_beyond(angle: float, q: float, side: int) -> float:
    """Mass between the upper (side 1) or lower (-1) edge and the point `angle` away from it, by quadrature."""
    root = math.sqrt(q)

    def integrand(t: float) -> float:
        x = (1 + side * root) ** 2 - 4 * side * root * math.sin(t / 2) ** 2
        return 2 / math.pi * math.sin(t) ** 2 / x if x > 0 else 2 / math.pi

    pole = -math.log(root) if q < 1 else 0.0  # where the integrand turns
    cuts = [0.0, *(c for c in (pole, 8 * pole, 64 * pole, 512 * pole) if 0 < c < angle), angle]
    return sum(integrate.quad(integrand, a, b, epsabs=0, epsrel=1e-13)[0] for a, b in itertools.pairwise(cuts))


@pytest.mark.parametrize("q", RATIOS)
def test_the_cdf_is_the_integral_of_the_density(q: float) -> None:
    root = math.sqrt(q)
    low, high = marchenko_pastur_edges(q)
    for angle in (1e-3, 0.1, 0.7, 1.5):
        if q >= 1e-4:  # in thinner laws x itself, near 1, has too few digits
            from_above = 1 - marchenko_pastur_cdf(high - 4 * root * math.sin(angle / 2) ** 2, q)
            assert from_above == pytest.approx(mass_beyond(angle, q, 1), abs=1e-13)
            from_below = marchenko_pastur_cdf(low + 4 * root * math.sin(angle / 2) ** 2, q)
            assert from_below == pytest.approx(mass_beyond(angle, q, -1), rel=1e-11, abs=1e-13)
        else:
            assert marchenko_pastur_cdf(1 + q - 2 * root * math.cos(angle), q) == pytest.approx(
                mass_beyond(angle, q, -1), abs=4e-16 / root
            )


@pytest.mark.parametrize("q", RATIOS + BEYOND_ONE)
def test_the_cdf_is_exact_at_the_edges_and_never_falls(q: float) -> None:
    low, high = marchenko_pastur_edges(q)
    atom = marchenko_pastur_atom(q)
    assert marchenko_pastur_cdf(np.array([-math.inf, -1.0, low, high, math.inf]), q).tolist() == [0, 0, atom, 1, 1]
    assert marchenko_pastur_cdf(-1e-300, q) == 0
    assert marchenko_pastur_cdf(0.0, q) == atom
    values = marchenko_pastur_cdf(np.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 20001), q)
    assert np.all(np.diff(values) >= 0)
    assert math.isnan(marchenko_pastur_cdf(math.nan, q))


@given(
    st.floats(min_value=-7, max_value=4).map(lambda e: 10.0**e) | st.sampled_from(RATIOS),
    st.floats(min_value=0, max_value=1) | st.floats(min_value=-300, max_value=-1).map(lambda e: 10.0**e),
)
def test_quantile_and_cdf_invert_each_other(q: float, u: float) -> None:
    low, high = marchenko_pastur_edges(q)
    x = marchenko_pastur_quantile(u, q)
    atom = marchenko_pastur_atom(q)
    if u <= atom and atom > 0:
        assert x == 0
        return
    assert low <= x <= high
    # A last bit of x is worth the density times 2e-16 of mass
    with np.errstate(invalid="ignore"):
        grain = x * min(marchenko_pastur_density(x, q), 1e300) * 4e-16 if x > 0 else 0.0
    assert marchenko_pastur_cdf(x, q) == pytest.approx(u, rel=1e-13, abs=1e-15 + 2 * grain)


@pytest.mark.parametrize("q", [0.2, 1.0, 3.0])
def test_quantiles_of_arrays_end_at_the_edges(q: float) -> None:
    low, high = marchenko_pastur_edges(q)
    atom = marchenko_pastur_atom(q)
    u = np.array([[0.0, atom], [np.nextafter(atom, 1), 1.0]])
    x = marchenko_pastur_quantile(u, q)
    assert x.shape == (2, 2)
    assert x[0, 0] == (low if q <= 1 else 0)
    assert x[1, 0] == pytest.approx(low, abs=1e-9)
    assert x[1, 1] == high
    assert isinstance(marchenko_pastur_quantile(0.3, q), float)
    assert [marchenko_pastur_quantile(v, q) for v in u.ravel()] == x.ravel().tolist()


def cell_means_by_quadrature(n: int, q: float) -> list[float]:
    """From root finding on quadratures, each half of the law measured from its own edge."""
    half = mass_beyond(math.pi / 2, q, 1)
    moments = []  # first moment above each border, and below it
    for i in range(1, n):
        side, mass = (1, i / n) if i / n <= half else (-1, (n - i) / n)
        angle = optimize.brentq(
            lambda t, s=side, m=mass: mass_beyond(t, q, s) - m, 0, math.pi / 2, xtol=1e-16, rtol=1e-15
        )
        moment = integrate.quad(lambda t: 2 / math.pi * math.sin(t) ** 2, 0, angle, epsabs=0, epsrel=1e-13)[0]
        moments.append((side, moment))
    borders = [(1, 0.0), *moments, (-1, 0.0)]
    return [n * (abs(b - a) if s == t else 1 - a - b) for (s, a), (t, b) in itertools.pairwise(borders)]


@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize("q", RATIOS)
def test_cell_means_against_quadrature(n: int, q: float) -> None:
    np.testing.assert_allclose(marchenko_pastur_cell_means(n, q), cell_means_by_quadrature(n, q), rtol=1e-12)


@pytest.mark.parametrize("q", RATIOS + BEYOND_ONE)
def test_cell_means_descend_average_to_the_mean_and_refine_each_other(q: float) -> None:
    low, high = marchenko_pastur_edges(q)
    for n in (1, 3, 32, 64, 128, 500):
        means, finer = marchenko_pastur_cell_means(n, q), marchenko_pastur_cell_means(2 * n, q)
        assert means.shape == (n,)
        assert means.mean() == pytest.approx(max(1, q), rel=1e-14)
        assert np.all(np.diff(means) < 0) or q < 1e-11
        assert means[0] <= high * (1 + 1e-13) and means[-1] >= low * (1 - 1e-13)
        np.testing.assert_allclose(finer.reshape(n, 2).mean(axis=1), means, rtol=n * 5e-15)


@pytest.mark.parametrize(("n", "dim"), [(40, 400), (40, 40)])
def test_simulated_eigenvalues_lie_at_the_cell_means(n: int, dim: int) -> None:
    rng = np.random.default_rng(8)
    rows = rng.standard_normal((400, n, dim))
    average = np.linalg.eigvalsh(rows @ rows.swapaxes(-1, -2) / dim).mean(axis=0)[::-1]
    means = marchenko_pastur_cell_means(n, n / dim)
    assert np.abs((average - means) / np.gradient(means)).max() < 0.3  # in distances between neighbours


def test_cell_means_for_a_whole_window_cost_milliseconds() -> None:
    times = []
    for _ in range(5):
        start = time.process_time()
        for n in range(1, 65):
            marchenko_pastur_cell_means(n, n / 576)
        times.append(time.process_time() - start)
    assert min(times) < 0.03  # 0.012; it is paid at the first token


@pytest.mark.parametrize(
    "call",
    [
        marchenko_pastur_edges,
        marchenko_pastur_atom,
        marchenko_pastur_median,
        lambda q: marchenko_pastur_density(1.0, q),
        lambda q: marchenko_pastur_cdf(1.0, q),
        lambda q: marchenko_pastur_quantile(0.5, q),
        lambda q: marchenko_pastur_cell_means(3, q),
    ],
)
@pytest.mark.parametrize("q", [0.0, -1.0, math.nan, math.inf])
def test_a_ratio_that_is_not_positive_is_refused(call, q: float) -> None:
    with pytest.raises(ShapeError, match="ratio"):
        call(q)


@pytest.mark.parametrize("u", [-1e-9, 1.1, math.nan, [0.5, 2.0]])
def test_a_probability_out_of_range_is_refused(u) -> None:
    with pytest.raises(ShapeError, match="probabilities"):
        marchenko_pastur_quantile(u, 0.5)


def test_no_cells_are_refused() -> None:
    with pytest.raises(ShapeError, match="cells"):
        marchenko_pastur_cell_means(0, 0.5)
