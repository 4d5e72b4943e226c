"""The Marchenko-Pastur law: the spectrum of pure noise.

Unit variance throughout; scale by sigma^2. `q` is the ratio (number of eigenvalues) / (number of samples behind each),
so q = n / D for the dual form that `spectrum_descriptors` uses. WeightWatcher's Q is 1 / q. For q > 1 the law has an
atom 1 - 1/q at zero, and the rest of it is q times the law of ratio 1/q.

With r = sqrt(q), the bulk is x = 1 + q + 2 r cos(theta) = (1 - r)^2 + 4 r sin^2(psi / 2), psi = pi - theta. In these
angles the law is (2/pi) sin^2 / x, and its first moment (2/pi) sin^2: smooth to the edges, with closed integrals.
"""

import math
from functools import lru_cache
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rmtkernels.errors import ShapeError
from rmtkernels.laws._arrays import Array, like

_GRID = np.linspace(0, math.pi / 2, 33)


def marchenko_pastur_edges(q: float) -> tuple[float, float]:
    """Edges (1 - sqrt q)^2, (1 + sqrt q)^2 of the bulk, in units of sigma^2."""
    check_ratio(q)
    root = math.sqrt(q)
    return (1 - root) ** 2, (1 + root) ** 2


def marchenko_pastur_atom(q: float) -> float:
    """Mass at zero: max(0, 1 - 1/q)."""
    check_ratio(q)
    return max(0.0, 1 - 1 / q)


def marchenko_pastur_median(q: float) -> float:
    """Median of the eigenvalues that are not structurally zero, in units of sigma^2.

    For q <= 1 that is the law's median. For q > 1 the law has an atom 1 - 1/q at zero; what is left are the eigenvalues
    of the transposed problem, q times those of ratio 1/q.

    Raises:
        ShapeError: if q is not positive and finite.
    """
    check_ratio(q)
    if q > 1:
        return q * marchenko_pastur_median(1 / q)
    if q < 1e-6:  # the closed form below divides by q; the next term of this series is below the last bit
        return 1 - q / 3 - 4 * q**2 / 405
    low, high = 0.0, math.pi
    for _ in range(60):  # bisection to the last bit; importing SciPy's would cost the first token 0.3 s
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _mass_above(middle, q) < 0.5 else (low, middle)
    return 1 + q + 2 * math.sqrt(q) * math.cos(0.5 * (low + high))


@overload
def marchenko_pastur_density(x: float, q: float) -> float: ...
@overload
def marchenko_pastur_density(x: ArrayLike, q: float) -> float | Array: ...
def marchenko_pastur_density(x: ArrayLike, q: float) -> float | Array:
    """Continuous part sqrt((b - x)(x - a)) / (2 pi q x) between the edges a and b, 0 elsewhere; x in units of sigma^2.

    It integrates to 1 for q <= 1 and to 1/q for q > 1. At q = 1 it is infinite at x = 0.

    Source: Marchenko and Pastur 1967; Bai and Silverstein 2010, eq. 3.1.1.
    """
    low, high = marchenko_pastur_edges(q)
    points = np.asarray(x, dtype=np.float64)
    outside = (points < low) | (points > high)
    inner = np.where(outside, 1.0, points)
    with np.errstate(divide="ignore", invalid="ignore"):
        # At q = 1 the factor x is cancelled first, so that the pole is one of 1/sqrt(x), not 0/0.
        shape = np.sqrt((high - inner) * (inner - low)) / inner if low > 0 else np.sqrt((high - inner) / inner)
    return like(x, np.where(outside, 0.0, shape / (2 * math.pi * q)))


@overload
def marchenko_pastur_cdf(x: float, q: float) -> float: ...
@overload
def marchenko_pastur_cdf(x: ArrayLike, q: float) -> float | Array: ...
def marchenko_pastur_cdf(x: ArrayLike, q: float) -> float | Array:
    """Mass of the law, atom included, in (-inf, x]; x in units of sigma^2. Exact at and beyond the edges."""
    check_ratio(q)
    points = np.asarray(x, dtype=np.float64)
    if q > 1:
        below = marchenko_pastur_cdf(points / q, 1 / q)
        return like(x, np.where(points < 0, 0.0, marchenko_pastur_atom(q) + below / q))
    root = math.sqrt(q)
    low, high = marchenko_pastur_edges(q)
    inner = np.clip(points, low, high)
    upper = inner > 1 + q
    distance = np.where(upper, high - inner, inner - low)
    mass = _mass_beyond(2 * np.arcsin(np.sqrt(distance / (4 * root))), root, upper)
    mass = np.where(upper, 1 - mass, mass)
    return like(x, np.where(points <= low, 0.0, np.where(points >= high, 1.0, mass)) + 0 * inner)


@overload
def marchenko_pastur_quantile(u: float, q: float) -> float: ...
@overload
def marchenko_pastur_quantile(u: ArrayLike, q: float) -> float | Array: ...
def marchenko_pastur_quantile(u: ArrayLike, q: float) -> float | Array:
    """Smallest x with cdf(x) >= u, in units of sigma^2: 0 within the atom; the edges at u = atom + 0 and u = 1.

    Raises:
        ShapeError: if q is not positive and finite, or a probability lies outside [0, 1].
    """
    check_ratio(q)
    level = np.asarray(u, dtype=np.float64)
    if not np.all((level >= 0) & (level <= 1)):
        raise ShapeError("probabilities must lie in [0, 1]")
    if q > 1:
        above = np.clip(q * (1 - level), 0.0, 1.0)  # mass above, in the bulk of the transposed problem
        low, high = marchenko_pastur_edges(q)
        bulk = np.clip(q * _from_masses(1 - above, above, 1 / q), low, high)
        return like(u, np.where(level <= marchenko_pastur_atom(q), 0.0, np.where(level < 1, bulk, high)))
    return like(u, _from_masses(level, 1 - level, q))


def marchenko_pastur_cell_means(n: int, q: float) -> Array:
    """Means of the law within n cells of equal mass of the bulk, largest first: (n,), in units of sigma^2.

    They are what n noise eigenvalues are compared with. The atom is left out, so they average to 1 for q <= 1 and to q
    beyond. Relative error about n times 1e-16.

    The mass above an angle is inverted at i / n; the first moment above it is (theta - sin theta cos theta) / pi, so a
    cell's mean is n times a difference of those. The lower half is taken from the lower edge, where eigenvalues can be
    small and differences from 1 would lose their digits.

    Raises:
        ShapeError: if n is not positive, or q is not positive and finite.
    """
    check_ratio(q)
    if n < 1:
        raise ShapeError(f"the number of cells must be positive, got {n}")
    if q > 1:
        return q * marchenko_pastur_cell_means(n, 1 / q)
    root = math.sqrt(q)
    ranks = np.arange(1, n)
    upper = ranks <= n * _mass_of_upper_half(root)
    angles = _angle_of_mass(np.where(upper, ranks, n - ranks) / n, root, upper)
    moments = _beyond_sine(2 * angles) / (2 * math.pi)
    split = int(np.count_nonzero(upper))
    tops, bottoms = np.append(0.0, moments[:split]), np.append(moments[split:], 0.0)
    middle = 1 - tops[-1] - bottoms[0]
    return n * np.concatenate([np.diff(tops), [middle], -np.diff(bottoms)])


def _mass_above(theta: float, q: float) -> float:
    """Mass above x = 1 + q + 2 sqrt(q) cos(theta), 0 <= theta <= pi, in closed form; loses digits as 1/q.

    In theta the density is (2/pi) sin^2 / (a + b cos) with a = 1 + q, b = 2 sqrt q; this is its integral from 0.
    """
    a, b, root = 1 + q, 2 * math.sqrt(q), math.sqrt(q)
    angle = math.atan((1 - root) / (1 + root) * math.tan(theta / 2))
    return 2 / math.pi * ((a * theta - 2 * (1 - q) * angle) / b**2 - math.sin(theta) / b)


def _mass_beyond(angle: Array, root: float, upper: NDArray[np.bool_]) -> Array:
    """Mass between an edge and the point `angle` (0 … pi/2) away from it: the upper edge where `upper`, else the lower.

    Both are (2/pi) int_0^angle sin^2 / x. Gauss-Legendre has a relative error below 1e-15 while no pole of the
    integrand is near; the poles lie ln(1/r) beside the lower edge. Further from that edge than they are, a closed form,
    (psi + sin(psi) / r - (1 - q) / q * atan2(r sin psi, 1 - r cos psi)) / pi, does not cancel.
    """
    nodes, weights = _gauss_legendre()
    square = np.sin(np.multiply.outer(0.5 * angle, nodes)) ** 2
    edge = np.where(upper, (1 + root) ** 2, (1 - root) ** 2)[..., None]
    slope = np.where(upper, -4 * root, 4 * root)[..., None]
    with np.errstate(invalid="ignore"):  # q = 1 at its lower edge: 0/0 where the closed form is used
        mass = 8 / math.pi * angle * ((square * (1 - square) / (edge + slope * square)) @ weights)
    far = ~upper & (angle > -math.log(root))
    if root == 1 or far.any():
        tilt = np.arctan2(root * np.sin(angle), 1 - root * np.cos(angle))
        closed = (angle + np.sin(angle) / root - (1 - root**2) / root**2 * tilt) / math.pi
        return np.where(far, closed, mass) if root < 1 else np.where(upper, mass, closed)
    return np.asarray(mass)


def _angle_of_mass(mass: Array, root: float, upper: NDArray[np.bool_]) -> Array:
    """Inverse of `_mass_beyond`, by Halley steps kept within a bracket."""
    tables = _mass_tables(root)
    cube_root = np.cbrt(mass)
    angle = np.where(upper, *(np.interp(cube_root, np.cbrt(table), _GRID) for table in tables))
    low, high = np.zeros_like(angle), np.full_like(angle, math.pi / 2)
    sign = np.where(upper, 1.0, -1.0)
    positive = mass > 0
    for _ in range(100):
        gap = _mass_beyond(angle, root, upper) - mass
        low, high = np.where(gap < 0, angle, low), np.where(gap > 0, angle, high)
        half = np.sin(0.5 * angle) ** 2
        x = (1 + sign * root) ** 2 - 4 * sign * root * half
        sine = np.sin(angle)
        with np.errstate(divide="ignore", invalid="ignore"):
            newton = gap * x * (math.pi / 2) / sine**2
            # ln of the density has the slope 2 cos / sin ± 2 r sin / x: Halley's step uses half of it.
            new = angle - newton / (1 - newton * ((1 - 2 * half) / sine + sign * root * sine / x))
        new = np.where((new >= low) & (new <= high), new, 0.5 * (low + high))
        done = np.all(np.abs(new - angle)[positive] <= 1e-6 * angle[positive])
        angle = new
        if done:  # the error is cubed by each step
            break
    return np.where(positive, angle, 0.0)


def _from_masses(below: Array, above: Array, q: float) -> Array:
    """Points of the law of ratio q <= 1 with these masses below and above them."""
    root = math.sqrt(q)
    upper = above <= _mass_of_upper_half(root)
    square = 4 * root * np.sin(0.5 * _angle_of_mass(np.where(upper, above, below), root, upper)) ** 2
    return np.where(upper, (1 + root) ** 2 - square, (1 - root) ** 2 + square)


@lru_cache(maxsize=1)
def _mass_tables(root: float) -> Array:
    """`_mass_beyond` on the grid, from the upper edge and from the lower one: (2, 33)."""
    return _mass_beyond(np.stack([_GRID, _GRID]), root, np.array([[True], [False]]))


def _mass_of_upper_half(root: float) -> float:
    return float(_mass_tables(root)[0, -1])


def _beyond_sine(x: Array) -> Array:
    """x - sin x for 0 <= x <= pi, without cancellation."""
    small, square = np.minimum(x, 1.0), np.minimum(x, 1.0) ** 2
    series = np.zeros_like(small)
    for k in (17, 15, 13, 11, 9, 7, 5, 3):
        series = (1 - series) * square / (k * (k - 1))
    return np.where(x < 1, small * series, x - np.sin(x))


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[Array, Array]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    return 0.5 * (1 + nodes), 0.5 * weights


def check_ratio(q: float) -> None:
    """Refuses what is no ratio."""
    if not 0 < q < math.inf:
        raise ShapeError(f"the Marchenko-Pastur ratio must be positive and finite, got {q}")
