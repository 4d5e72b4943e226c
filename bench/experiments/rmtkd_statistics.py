"""Paired intervals: of a difference over seeds, and over the sentences of a test set."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

DRAWS = 10_000


class Difference(NamedTuple):
    """Of two accuracies, in their unit.

    Attributes:
        mean: over seeds.
        seeds: half width of the 95 % t-interval over seeds; NaN of one seed.
        low, high: 95 % of a bootstrap over items, which are drawn the same for both and for all seeds.
    """

    mean: float
    seeds: float
    low: float
    high: float


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % t-interval of the mean); the latter is NaN of one value."""
    found = np.asarray(values, dtype=np.float64)
    if found.size < 2:
        return float(found.mean()), float("nan")
    half = stats.t.ppf(0.975, found.size - 1) * found.std(ddof=1) / np.sqrt(found.size)
    return float(found.mean()), float(half)


def paired(ours: ArrayLike, theirs: ArrayLike, draws: int = DRAWS) -> Difference:
    """Difference of the shares of ones in two (seeds, items) tables of the same seeds and items.

    Raises ValueError if the tables are not of one shape.
    """
    if np.shape(ours) != np.shape(theirs) or np.ndim(ours) != 2:
        raise ValueError(f"two tables (seeds, items) of one shape, got {np.shape(ours)} and {np.shape(theirs)}")
    gap = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    mean, seeds = over_seeds(gap.mean(1).tolist())
    per_item = gap.mean(0)
    drawn = np.random.default_rng(0).integers(0, per_item.size, (draws, per_item.size))
    low, high = np.percentile(per_item[drawn].mean(1), [2.5, 97.5])
    return Difference(mean, seeds, float(low), float(high))
