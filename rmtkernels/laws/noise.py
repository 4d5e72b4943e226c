"""Estimators of the noise variance sigma^2 behind a spectrum."""

import math

import numpy as np
from numpy.typing import ArrayLike

from rmtkernels.errors import ShapeError
from rmtkernels.laws._arrays import Array
from rmtkernels.laws.marchenko_pastur import (
    check_ratio,
    marchenko_pastur_atom,
    marchenko_pastur_cdf,
    marchenko_pastur_edges,
    marchenko_pastur_median,
    marchenko_pastur_quantile,
)

METHODS = ("quantile", "median", "trace", "fit")
_NEGATIVE = 2.0**-20  # share of the largest eigenvalue that the rounding of a float32 Gram matrix may turn negative


def noise_variance(eigenvalues: ArrayLike, q: float, method: str = "median", quantile: float = 0.5) -> float:
    """sigma^2 from all eigenvalues of a sample covariance, in their own unit.

    | method       | estimate                                                  | moved by a share f of spikes          |
    |--------------|-----------------------------------------------------------|---------------------------------------|
    | `"median"`   | median of the eigenvalues that are not structurally zero, | a little, up                          |
    |              | over `marchenko_pastur_median(q)`                         |                                       |
    | `"trace"`    | mean of the eigenvalues: their sum over their number      | by f times their excess, unbounded    |
    | `"quantile"` | quantile of all eigenvalues as it is, RMT-KD's start      | a little, up                          |
    | `"fit"`      | RMT-KD's refinement of it, see below                      | down by about f q                     |

    Without spikes all but `"quantile"` are consistent; that one estimates sigma^2 times the law's own quantile (for the
    median 0.97 at q = 0.1, 0.66 at q = 1), and 0 where the quantile falls among structural zeros.

    `"fit"`: RMT-KD (arXiv 2509.15724, eq. 10 and 11) starts from the quantile and minimises the squared distance
    between the histogram of the eigenvalues within [lambda_-, lambda_+] and the law there. Bins, optimiser and what
    becomes of spikes are not published; these are ours. Distribution functions are compared instead of histograms, so
    there are no bins to choose: the mean squared difference, over the eigenvalues up to lambda_+(sigma^2), between the
    law and their own ranks, plus 0.01 times the share left out, so that nothing is left out for nothing. The start is
    divided by the law's quantile. sigma^2 is searched over twice the logarithmic width of the bulk to either side: on a
    grid, then by Brent's method around its best point. Needs SciPy.

    Args:
        eigenvalues: all of them, structural zeros included, in any order; negative only by rounding (2^-20 of the
            largest), which counts as 0.
        q: (number of eigenvalues) / (samples behind each); of n eigenvalues n - n/q are structurally zero if q > 1.
        method: one of the table's.
        quantile: the quantile of `"quantile"` and of the start of `"fit"`; RMT-KD takes 0.4 to 0.6.

    Returns:
        The variance; 0.0 if the eigenvalues it is read from are zero.

    Raises:
        ShapeError: if the eigenvalues are not one row of finite, non-negative numbers, or an argument is out of range.
    """
    check_ratio(q)
    if method not in METHODS:
        raise ShapeError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < quantile < 1:
        raise ShapeError(f"the quantile must lie between 0 and 1, got {quantile}")
    spectrum = _checked(eigenvalues)
    if method == "trace":
        return float(spectrum.mean())
    if method == "quantile":
        return float(np.quantile(spectrum, quantile))
    rank = max(1, min(spectrum.size, round(spectrum.size / q)))
    bulk = spectrum[spectrum.size - rank :]
    if method == "median":
        return float(np.median(bulk)) / marchenko_pastur_median(q)
    return _fit(bulk, q, quantile)


def _checked(eigenvalues: ArrayLike) -> Array:
    """Ascending, clipped at 0."""
    spectrum = np.array(eigenvalues, dtype=np.float64)
    if spectrum.ndim != 1 or spectrum.size == 0:
        raise ShapeError(f"eigenvalues must be one row of at least one number, got shape {spectrum.shape}")
    if not np.isfinite(spectrum).all():
        raise ShapeError("eigenvalues must be finite")
    spectrum.sort()
    if spectrum[0] < -_NEGATIVE * max(spectrum[-1], 0.0):
        raise ShapeError(f"eigenvalues must not be negative beyond rounding, got {spectrum[0]}")
    return np.maximum(spectrum, 0.0)


def _fit(bulk: Array, q: float, quantile: float) -> float:
    """`"fit"` of `noise_variance`, from the ascending eigenvalues that are not structurally zero."""
    from scipy import optimize

    atom = marchenko_pastur_atom(q)
    start = float(np.quantile(bulk, quantile)) / marchenko_pastur_quantile(atom + (1 - atom) * quantile, q)
    if start == 0:
        return 0.0
    units = bulk / start
    edge = marchenko_pastur_edges(q)[1]

    def distance(log_variance: float) -> float:
        inside = units * math.exp(-log_variance)
        inside = inside[inside <= edge]
        law = (np.asarray(marchenko_pastur_cdf(inside, q)) - atom) / (1 - atom)
        ranks = (np.arange(inside.size) + 0.5) / max(inside.size, 1)
        outside = 1 - inside.size / units.size
        return float(np.square(law - ranks).sum()) / max(inside.size, 1) + 0.01 * outside + (inside.size == 0)

    width = 4 * math.log1p(min(math.sqrt(q), 1 / math.sqrt(q)))
    grid = np.linspace(-width, width, 65)
    distances = [distance(point) for point in grid]
    best = int(np.argmin(distances))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)]
    result = optimize.minimize_scalar(distance, bounds=bounds, method="bounded", options={"xatol": 1e-6 * width})
    return start * math.exp(result.x if result.fun < distances[best] else grid[best])
