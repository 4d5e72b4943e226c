"""lanczos: the spectral density of a large symmetric matrix by Gauss quadrature, and spikes counted from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rmtkernels.errors import ShapeError
from rmtkernels.laws import tracy_widom_quantile
from rmtkernels.ops.lanczos_basis import random_source
from rmtkernels.ops.lanczos_multiply import LinearMap, check_first_product, in_full_precision

_TRANSIENT = 10  # coefficients that still remember the start and the spikes
_MAX_STEPS = 100  # of spike_count, and at most an eighth of the width: beyond, the coefficients no longer fall in line
_SMALLEST = 512


@dataclass(frozen=True)
class SpikeCount:
    """What stands out of a spectrum.

    Attributes:
        count: eigenvalues above `threshold`.
        eigenvalues: (count,) float64, largest first, as accurate as the steps made them.
        threshold: edge + scale * (1 - level) quantile of the Tracy-Widom law, and four roundings of the largest value.
        edge: estimated upper end of the bulk.
        scale: estimated scale on which the largest eigenvalue of the bulk fluctuates about it.
    """

    count: int
    eigenvalues: Tensor
    threshold: float
    edge: float
    scale: float


def lanczos_density(
    matrix: Tensor,
    *,
    steps: int = 64,
    probes: int = 8,
    gram: bool = False,
    center: bool = False,
    seed: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Stochastic Lanczos quadrature: nodes and weights that stand for the distribution of the eigenvalues.

    For each probe q, a random unit vector, the sum of weight * node^m is q'A^m q exactly for m < 2 * steps; the mean
    over probes estimates trace(A^m) / d. Wasserstein error at most t times the width of the spectrum with 12 / t steps
    and O(1 / (d t^2)) probes (arXiv 2105.06595).

    Args:
        matrix: A, (d, d) float32 or float64 and symmetric, or with `gram` the samples X, (n, d), for X'X.
        steps: nodes per probe, 1 to d. probes: random vectors.
        gram, center, backend: as of `lanczos_eigh`.
        seed: of the probes.

    Returns:
        Nodes, ascending, and weights that sum to 1, both (probes * steps,) float64.

    Raises:
        As `lanczos_eigh`.
    """
    multiply = LinearMap(matrix, gram, center, backend)
    diagonal, beside = jacobi(multiply, steps, probes, seed)
    nodes, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
    nodes, order = nodes.flatten().sort()
    return nodes, vectors[:, 0].square().flatten()[order] / probes


def spike_count(
    matrix: Tensor,
    *,
    level: float = 0.01,
    probes: int = 8,
    gram: bool = False,
    center: bool = False,
    seed: int = 0,
    backend: str | None = None,
) -> SpikeCount:
    """Counts the eigenvalues that stand out of the bulk, whatever the bulk: the noise need not be white.

    After a random start the Jacobi coefficients settle, once the spikes have been found, and a_j + 2 b_j is the edge of
    what is left of the bulk after j steps. It falls along a line edge - slope * j, and a Jacobi matrix that does has
    its largest eigenvalue within (b slope^2)^(1/3) of the edge, times a Tracy-Widom variable (the stochastic Airy
    operator): both are read from the coefficients. The idea of counting from them is arXiv 2504.03066's; this variant,
    the line and the scale, is ours. It needs a bulk in one piece that ends like a square root, as that of a covariance
    with any smooth noise does; where the support has a gap the coefficients oscillate, and a heavy tail has no edge.

    Args:
        matrix: A, (d, d), a sample covariance or any matrix with such a bulk, or with `gram` X of X'X; d >= 512.
        level: chance of counting something where there is no spike, in theory; docs/conventions.md has measured rates.
        probes: random starts, whose coefficients are averaged.
        gram, center, seed, backend: as of `lanczos_eigh`.

    Raises:
        ShapeError: if d < 512, or an argument is out of range; else as `lanczos_eigh`.
    """
    if not 0 < level < 1:
        raise ShapeError(f"level must lie between 0 and 1, got {level}")
    multiply = LinearMap(matrix, gram, center, backend)
    if multiply.dim < _SMALLEST:
        raise ShapeError(f"spike_count needs a width of {_SMALLEST} or more, got {multiply.dim}")
    if probes < 3:
        raise ShapeError(f"probes must be 3 or more, got {probes}: the outermost two are left out")
    diagonal, beside = jacobi(multiply, min(_MAX_STEPS, multiply.dim // 8), probes, seed)
    edges = (diagonal + 2 * beside).sort(0).values[1:-1].mean(0)
    edge, slope = _robust_line(edges[_TRANSIENT:])
    coupling = float(beside[:, _TRANSIENT:].median())
    edge -= slope * _TRANSIENT
    scale = (coupling * max(-slope, 0.0) ** 2) ** (1 / 3)
    values = torch.linalg.eigvalsh(_tridiagonal(diagonal, beside)).flip(1)
    rounding = 4 * torch.finfo(multiply.dtype).eps * float(values.abs().max())
    threshold = edge + scale * tracy_widom_quantile(1 - level) + rounding
    best = int((values > threshold).sum(1).argmax())  # values never exceed eigenvalues: the highest count is the truest
    found = values[best][values[best] > threshold]
    return SpikeCount(len(found), found, threshold, edge, scale)


@in_full_precision
def jacobi(multiply: LinearMap, steps: int, probes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Diagonals and what lies beside them, (probes, steps) float64, of the Jacobi matrices of random unit vectors.

    The last entry of the latter couples to a step that was not made. Fully reorthogonalised; a probe whose Krylov space
    ends is followed by zeros that are not coupled to it.
    """
    if not 1 <= steps <= multiply.dim or probes < 1:
        raise ShapeError(f"steps must be 1 to {multiply.dim} and probes positive, got {steps} and {probes}")
    generator = random_source(seed)
    unit = torch.randn(probes, multiply.dim, generator=generator, dtype=multiply.dtype).to(multiply.device)
    unit /= unit.norm(dim=1, keepdim=True)
    basis = unit.new_zeros(probes, steps, multiply.dim)
    diagonal, beside = (unit.new_zeros(probes, steps, dtype=torch.float64) for _ in range(2))
    scale = unit.new_zeros(probes, dtype=torch.float64)
    for step in range(steps):
        basis[:, step] = unit
        known = basis[:, : step + 1]
        image = multiply(unit)
        if step == 0:
            check_first_product(unit, image)
        scale = torch.maximum(scale, image.norm(dim=1, dtype=torch.float64))
        diagonal[:, step] = (image.double() * unit.double()).sum(1)
        for _ in range(2):
            image = torch.baddbmm(image[:, None], torch.bmm(image[:, None], known.mT), known, alpha=-1)[:, 0]
        norms = image.norm(dim=1, dtype=torch.float64)
        goes_on = norms > 16 * torch.finfo(unit.dtype).eps * scale
        beside[:, step] = torch.where(goes_on, norms, 0.0)
        unit = torch.where(goes_on[:, None], image / norms[:, None].to(image), 0.0)
    multiply.check_scale(float(scale.max()))
    return diagonal.cpu(), beside.cpu()


def _tridiagonal(diagonal: Tensor, beside: Tensor) -> Tensor:
    upper = torch.diag_embed(beside[:, :-1], offset=1)
    return torch.diag_embed(diagonal) + upper + upper.mT


def _robust_line(y: Tensor) -> tuple[float, float]:
    """Intercept and slope of y over 0, 1, ...: least squares, points beyond two deviations weighted down (Huber)."""
    x, weights = torch.arange(len(y), dtype=y.dtype), torch.ones_like(y)
    for _ in range(30):
        center, level = (weights @ x) / weights.sum(), (weights @ y) / weights.sum()
        slope = (weights @ ((x - center) * (y - level))) / (weights @ (x - center).square())
        off = (y - level - slope * (x - center)).abs()
        deviation = 1.4826 * off.median()
        weights = torch.where(off < 4 * deviation, (2 * deviation / off).clamp_max(1.0), 0.0)
        if float(weights.sum()) < 0.5 * len(y):  # more than half on the line exactly
            break
    return float(level - slope * center), float(slope)
