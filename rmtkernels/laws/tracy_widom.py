"""The Tracy-Widom law of real matrices (beta = 1): the largest eigenvalue of pure noise.

For n eigenvalues with `dim` samples behind each, (dim * lambda_1 / sigma^2 - center) / scale follows it, with
`center, scale = tracy_widom_center_scale(n, dim)`.

One table holds ln(1 - F1) on a uniform grid, and one rule reads it (a kernel repeats both): with
position = (s - TABLE_START) / TABLE_STEP and i its integer part, the cubic through the points i - 1 ... i + 2; 0 where
i < 1, left of -8.9, where F1 < 2e-16; the asymptotic series where i >= len - 2, from s = 12 on. ln(1 - F1) is right to
1e-7 absolute, so 1 - F1 has that relative error, however small it is. F1 is right to 4e-8 absolute, with relative error
3e-4 at F1 = 1e-6 and more below. `tools/tracy_widom_table.py` made the table and says how.
"""

import math
from functools import lru_cache
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from rmtkernels.errors import ShapeError
from rmtkernels.laws._arrays import Array, like
from rmtkernels.laws.tracy_widom_table import LOG_SURVIVAL, TABLE_START, TABLE_STEP, TAIL_SERIES

_FIRST = TABLE_START + TABLE_STEP
TAIL_START = TABLE_START + TABLE_STEP * (len(LOG_SURVIVAL) - 2)

# Integrals of the determinant itself, not of the table; Bornemann 2010, table 10, has the same digits.
TRACY_WIDOM_MEAN = -1.2065335745820
TRACY_WIDOM_VARIANCE = 1.6077810345810


@overload
def tracy_widom_log_survival(s: float) -> float: ...
@overload
def tracy_widom_log_survival(s: ArrayLike) -> float | Array: ...
def tracy_widom_log_survival(s: ArrayLike) -> float | Array:
    """ln P(TW1 > s), finite up to s = 1e200: about -(2/3) s^(3/2) far to the right."""
    points = np.asarray(s, dtype=np.float64)
    values, weights, _ = _stencil(points)
    inner = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return like(s, np.where(points >= TAIL_START, _tail(points)[0], np.where(points < _FIRST, 0.0, inner)))


@overload
def tracy_widom_survival(s: float) -> float: ...
@overload
def tracy_widom_survival(s: ArrayLike) -> float | Array: ...
def tracy_widom_survival(s: ArrayLike) -> float | Array:
    """P(TW1 > s), with relative error 1e-7; 0 beyond s = 107, where `tracy_widom_log_survival` is still finite."""
    return like(s, np.exp(tracy_widom_log_survival(s)))


@overload
def tracy_widom_cdf(s: float) -> float: ...
@overload
def tracy_widom_cdf(s: ArrayLike) -> float | Array: ...
def tracy_widom_cdf(s: ArrayLike) -> float | Array:
    """F1(s) = P(TW1 <= s), with absolute error 4e-8; 0 left of the table, where it is below 1e-16."""
    return like(s, -np.expm1(tracy_widom_log_survival(s)))


@overload
def tracy_widom_density(s: float) -> float: ...
@overload
def tracy_widom_density(s: ArrayLike) -> float | Array: ...
def tracy_widom_density(s: ArrayLike) -> float | Array:
    """F1'(s), with absolute error 2e-6: the slope of the table's cubics, so it has steps of that size at the grid."""
    points = np.asarray(s, dtype=np.float64)
    values, _, slopes = _stencil(points)
    inner = sum(slope * value for slope, value in zip(slopes, values, strict=True)) / TABLE_STEP
    slope = np.where(points >= TAIL_START, _tail(points)[1], np.where(points < _FIRST, 0.0, inner))
    return like(s, np.where(np.isinf(points), 0.0, -slope) * tracy_widom_survival(points))


@overload
def tracy_widom_quantile(u: float) -> float: ...
@overload
def tracy_widom_quantile(u: ArrayLike) -> float | Array: ...
def tracy_widom_quantile(u: ArrayLike) -> float | Array:
    """s with F1(s) = u: the inverse of `tracy_widom_cdf`. -inf at 0, inf at 1; never less than the table's start else.

    Raises:
        ShapeError: if a probability lies outside [0, 1].
    """
    level = np.asarray(u, dtype=np.float64)
    if not np.all((level >= 0) & (level <= 1)):
        raise ShapeError("probabilities must lie in [0, 1]")
    inner = np.clip(level, 1e-300, 1 - 2**-53)
    target = np.log1p(-inner)
    low, high = np.full_like(level, _FIRST), np.full_like(level, TAIL_START + 2)  # 1 - 2^-53 is at 13.4
    for _ in range(60):
        middle = 0.5 * (low + high)
        right = np.asarray(tracy_widom_log_survival(middle)) <= target
        low, high = np.where(right, low, middle), np.where(right, middle, high)
    return like(u, np.where(level == 0, -math.inf, np.where(level == 1, math.inf, high)))


def tracy_widom_center_scale(n: int, dim: int) -> tuple[float, float]:
    """Center and scale of dim * lambda_1 / sigma^2, for n eigenvalues with `dim` samples behind each.

    center = (a + b)^2 and scale = (a + b) (1/a + 1/b)^(1/3), a = sqrt(n - 1/2), b = sqrt(dim - 1/2); lambda_1 is the
    largest eigenvalue of G / dim, so dim * lambda_1 is that of G. The law holds to O(min(n, dim)^(-2/3)). For centred
    windows n is one less than the rows.

    Source: Johnstone, Ann. Statist. 29, 2001; the halves: Ma, Bernoulli 18, 2012.

    Raises:
        ShapeError: if n or dim is not positive.
    """
    if not (n >= 1 and dim >= 1):
        raise ShapeError(f"eigenvalues and samples must be at least one, got {n} and {dim}")
    a, b = math.sqrt(n - 0.5), math.sqrt(dim - 0.5)
    return (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)


def _stencil(s: Array) -> tuple[list[Array], list[Array], list[Array]]:
    """The four table values around s, the weights of their cubic at s, and of its slope in units of the step."""
    position = np.clip((s - TABLE_START) / TABLE_STEP, 1, len(LOG_SURVIVAL) - 2)
    index = np.minimum(np.nan_to_num(position).astype(np.intp), len(LOG_SURVIVAL) - 3)
    t = position - index
    values = [_table()[index + k] for k in (-1, 0, 1, 2)]
    weights = [
        -t * (t - 1) * (t - 2) / 6,
        (t + 1) * (t - 1) * (t - 2) / 2,
        -t * (t + 1) * (t - 2) / 2,
        t * (t + 1) * (t - 1) / 6,
    ]
    slopes = [
        -(3 * t * t - 6 * t + 2) / 6,
        (3 * t * t - 4 * t - 1) / 2,
        -(3 * t * t - 2 * t - 2) / 2,
        (3 * t * t - 1) / 6,
    ]
    return values, weights, slopes


def _tail(s: Array) -> tuple[Array, Array]:
    """-(2/3) s^(3/2) - (3/4) ln s - ln(4 sqrt pi) + a series in s^(-3/2), which is ln(1 - F1) there, and its slope."""
    s = np.maximum(s, TAIL_START)
    y = s**-1.5
    series, slope = np.zeros_like(s), np.zeros_like(s)
    for k, coefficient in reversed(list(enumerate(TAIL_SERIES, start=1))):
        series = (series + coefficient) * y
        slope = (slope + k * coefficient) * y
    value = -2 / 3 * s**1.5 - 0.75 * np.log(s) - math.log(4 * math.sqrt(math.pi)) + series
    return value, -np.sqrt(s) - (0.75 + 1.5 * slope) / s


@lru_cache(maxsize=1)
def _table() -> Array:
    return np.array(LOG_SURVIVAL)
