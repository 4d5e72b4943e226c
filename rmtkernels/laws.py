"""The Marchenko-Pastur law: the spectrum of pure noise.

Unit variance throughout; scale by sigma^2. `q` is the ratio (number of eigenvalues) / (number of samples behind each),
so q = n / D for the dual form that `spectrum_descriptors` uses. WeightWatcher's Q is 1 / q.
"""

import math

from rmtkernels.errors import ShapeError


def marchenko_pastur_edges(q: float) -> tuple[float, float]:
    """Edges (1 - sqrt q)^2, (1 + sqrt q)^2 of the bulk."""
    root = math.sqrt(q)
    return (1 - root) ** 2, (1 + root) ** 2


def marchenko_pastur_median(q: float) -> float:
    """Median of the eigenvalues that are not structurally zero.

    For q <= 1 that is the law's median. For q > 1 the law has an atom 1 - 1/q at zero; what is left are the eigenvalues
    of the transposed problem, q times those of ratio 1/q.

    Raises:
        ShapeError: if q is not positive.
    """
    if not q > 0:
        raise ShapeError(f"the Marchenko-Pastur ratio must be positive, got {q}")
    if q > 1:
        return q * marchenko_pastur_median(1 / q)
    low, high = 0.0, math.pi
    for _ in range(60):  # bisection to the last bit; importing SciPy's would cost the first token 0.3 s
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _mass_above(middle, q) < 0.5 else (low, middle)
    return 1 + q + 2 * math.sqrt(q) * math.cos(0.5 * (low + high))


def _mass_above(theta: float, q: float) -> float:
    """Mass above x = 1 + q + 2 sqrt(q) cos(theta), 0 <= theta <= pi.

    In theta the density is (2/pi) sin^2 / (a + b cos) with a = 1 + q, b = 2 sqrt q; this is its integral from 0.
    """
    a, b, root = 1 + q, 2 * math.sqrt(q), math.sqrt(q)
    angle = math.atan((1 - root) / (1 + root) * math.tan(theta / 2))
    return 2 / math.pi * ((a * theta - 2 * (1 - q) * angle) / b**2 - math.sin(theta) / b)
