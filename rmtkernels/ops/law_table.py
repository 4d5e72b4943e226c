"""What the kernels look up: the laws of noise for windows of every size up to N, in one flat float64 table.

Layout, as csrc/include/rmtkernels/spectrum.h reads it: ln survival of Tracy-Widom on a uniform grid, then for each
n = 0 … N eigenvalues of rows of width D (q = n / D) a row of: the Marchenko-Pastur median; centre and scale of
D λ₁; ln of the law's histogram on `BINS` points of ln λ; and the law's means over min(n, D) cells of equal mass, padded
to N. Everything is in units of the noise variance.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rmtkernels import laws
from rmtkernels.laws.tracy_widom_table import LOG_SURVIVAL

BINS, BIN_START, BIN_STEP = 64, -4.0, 0.25
# The share of the law's mass spread evenly over the histogram, so that no bin is empty and the divergence is finite.
FLOOR = 2.0**-10
ROW = 3 + BINS  # and N cell means

Array = NDArray[np.float64]


def law_table_size(window: int) -> int:
    return len(LOG_SURVIVAL) + (window + 1) * (ROW + window)


@lru_cache(maxsize=64)
def law_table(window: int, dim: int) -> Array:
    """The flat table for windows of up to `window` rows of width `dim`."""
    rows = np.zeros((window + 1, ROW + window))
    rows[0, 0] = 1.0
    for n in range(1, window + 1):
        q, rank = n / dim, min(n, dim)
        rows[n, :3] = (laws.marchenko_pastur_median(q), *laws.tracy_widom_center_scale(n, dim))
        rows[n, 3:ROW] = np.log((1 - FLOOR) * law_histogram(q) + FLOOR / BINS)
        rows[n, ROW : ROW + rank] = laws.marchenko_pastur_cell_means(rank, q)
    table = np.concatenate([LOG_SURVIVAL, rows.ravel()])
    table.setflags(write=False)
    return table


def law_histogram(q: float) -> Array:
    """(BINS,) masses of ln x under the bulk of the Marchenko-Pastur law of ratio q, as the kernels histogram values.

    A value's mass is shared linearly between the two points it lies between; integrated by parts, a point's mass is the
    difference of the means, over the steps before and after it, of the mass above.
    """
    shift, ratio = (math.log(q), 1 / q) if q > 1 else (0.0, q)  # beyond q = 1: q times the transposed law
    edges = np.array(laws.marchenko_pastur_edges(ratio))
    points = BIN_START + BIN_STEP * np.arange(BINS) - shift
    x = np.clip(np.exp(points), *edges)
    root = math.sqrt(ratio)
    angle = np.arccos(np.clip((x - 1 - ratio) / (2 * root), -1, 1))  # the mass is smooth in it, to the edges
    nodes, weights = _gauss_legendre()
    start, length = angle[1:, None], (angle[:-1] - angle[1:])[:, None]
    theta = start + 0.5 * length * (1 + nodes)
    inner = 1 + ratio + 2 * root * np.cos(theta)
    above = 1 - laws.marchenko_pastur_cdf(inner, ratio)
    within = (above * np.sin(theta) / np.maximum(inner, 1e-300)) @ weights * length[:, 0] * root
    below = np.clip(math.log(edges[0]) if edges[0] > 0 else -math.inf, points[:-1], points[1:]) - points[:-1]
    mean_above = (within + below) / BIN_STEP
    masses: Array = -np.diff(mean_above, prepend=1.0, append=0.0)
    return masses


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[Array, Array]:
    nodes, weights = np.polynomial.legendre.leggauss(20)
    return nodes, weights
