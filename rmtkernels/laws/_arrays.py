"""Numbers in, numbers out; arrays in, float64 arrays out."""

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]


def like(given: ArrayLike, result: Array) -> float | Array:
    """A float for a number, an array for anything else."""
    return float(result) if np.ndim(given) == 0 else result
