"""Float64 oracle of spectrum. The formulas are those of docs/conventions.md, written once more and independently."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from rmtkernels.laws import (
    marchenko_pastur_edges,
    marchenko_pastur_median,
    tracy_widom_center_scale,
    tracy_widom_log_survival,
)

_RESOLUTION = 2.0**-20
_DESCRIPTORS = 24
_SMALLEST_TRACE = torch.finfo(torch.float32).tiny
_BINS, _BIN_START, _BIN_STEP, _BIN_FLOOR = 64, -4.0, 0.25, 2.0**-10


def spectrum_eigvalsh_ref(matrices: Tensor) -> Tensor:
    """Eigenvalues, ascending, float64. Reads the lower triangle."""
    finite = matrices.isfinite().all(-1).all(-1)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None, None], matrices, 0.0).double())
    return torch.where(finite[..., None], eigenvalues, torch.nan)


def spectrum_descriptors_ref(
    gram: Tensor,
    seen: Tensor,
    dim: int,
    *,
    center: bool = True,
    joint: str | None = None,
    normalize: str | None = None,
    noise: str = "median",
) -> tuple[Tensor, Tensor]:
    """`rmtkernels.spectrum_descriptors` in float64: gram (L, B, N, N), seen (B,) -> (L or 1, B, F), (L or 1, B, N)."""
    layers, batch, window, _ = gram.shape
    descriptors, eigenvalues = [], []
    for layer in range(layers) if joint is None else [slice(None)]:
        for b in range(batch):
            rows = min(int(seen[b]), window)
            blocks = gram[layer, b, :rows, :rows].double().reshape(layers if joint else 1, rows, rows)
            broken = 0.0 if blocks.isfinite().all() else math.nan
            blocks = blocks.nan_to_num()
            log_trace = _log_trace(_centred(blocks, center), dim, joint)
            if normalize == "rms":
                blocks = _normalised(blocks, dim)
            mean_share = _mean_share(blocks, joint)
            lam, width, total = _window_spectrum(_centred(blocks, center), dim, center, joint)
            overlap = _overlap(total, (int(seen[b]) - 1) % window, center) if rows > 1 else 0.0
            descriptors.append(_descriptors(lam, (log_trace, mean_share, overlap), width, noise) + broken)
            eigenvalues.append(torch.cat([lam + broken, lam.new_zeros(window - len(lam))]))
    spectra = layers if joint is None else 1
    if not descriptors:
        return gram.new_zeros(spectra, batch, _DESCRIPTORS).double(), gram.new_zeros(spectra, batch, window).double()
    return torch.stack(descriptors).reshape(spectra, batch, -1), torch.stack(eigenvalues).reshape(
        spectra, batch, window
    )


def _normalised(blocks: Tensor, dim: int) -> Tensor:
    norms = blocks.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, math.sqrt(dim) / norms, 0.0)
    return blocks * inverse[:, :, None] * inverse[:, None, :]


def _centred(blocks: Tensor, center: bool) -> Tensor:
    rows = blocks.shape[-1]
    if not center or not rows:
        return blocks
    projector = _centring(rows, blocks)
    centred = projector @ blocks @ projector
    equal_rows = _traces(centred) <= _RESOLUTION * _traces(blocks)  # all that is left is rounding
    return torch.where(equal_rows[:, None, None], 0.0, centred)


def _log_trace(blocks: Tensor, dim: int, joint: str | None) -> float:
    traces = _traces(blocks) / dim
    if joint == "trace":
        return float(traces.clamp_min(_SMALLEST_TRACE).log().mean())
    return math.log(max(float(traces.mean()), _SMALLEST_TRACE))


def _mean_share(blocks: Tensor, joint: str | None) -> float:
    """rows |mean|^2 over the sum of |row|^2."""
    if not blocks.shape[-1]:
        return 0.0
    in_mean, energy = blocks.mean(-1).sum(-1), _traces(blocks)
    if joint == "trace":
        return float(torch.where(energy > 0, in_mean / energy, 0.0).clamp(0, 1).mean())
    return float((in_mean.sum() / energy.sum()).clamp(0, 1)) if energy.sum() > 0 else 0.0


def _window_spectrum(blocks: Tensor, dim: int, center: bool, joint: str | None) -> tuple[Tensor, int, Tensor]:
    """Of (layers, rows, rows) centred blocks of one window: λ = eig(G / D), descending, D, and G itself."""
    layers, rows = blocks.shape[0], blocks.shape[-1]
    traces = _traces(blocks)
    scaled = blocks
    if joint == "trace":
        scaled = torch.where(traces[:, None, None] > 0, blocks / traces[:, None, None], 0.0)
    width, total = dim * layers, scaled.sum(0)
    lam = torch.linalg.eigvalsh(total / width).flip(0).clamp_min(0) if rows else blocks.new_zeros(0)
    return (lam[: rows - 1] if center and rows else lam), width, total


def _centring(rows: int, like: Tensor) -> Tensor:
    return torch.eye(rows, dtype=torch.float64, device=like.device) - 1.0 / rows


def _traces(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0)


def _overlap(gram: Tensor, newest: int, center: bool) -> float:
    """Cosine between the covariances of all rows and of all but the newest, by their Gram and cross-Gram matrices."""
    others = [i for i in range(len(gram)) if i != newest]
    before, cross = gram[others][:, others], gram[others]
    if center:
        projector = _centring(len(others), gram)
        before, cross = projector @ before @ projector, projector @ cross
    squares, rest = float(gram.square().sum()), float(before.square().sum())
    if rest <= _RESOLUTION**2 * squares:
        return 0.0
    return float(cross.square().sum()) / math.sqrt(squares * rest)


def _descriptors(lam: Tensor, facts: tuple[float, float, float], width: int, noise: str) -> Tensor:
    log_trace, mean_share, overlap = facts
    n, trace = len(lam), float(lam.sum())
    five = torch.cat([lam, lam.new_zeros(5)])[:5]
    if trace <= 0:
        return torch.tensor([0.0] * 6 + [1.0] * 4 + [log_trace, mean_share] + [0.0] * 12, dtype=torch.float64)
    p, floor = lam / trace, _RESOLUTION * float(lam[0])
    floored = five.clamp_min(floor)
    ratios = floored[:4] / floored[1:]
    ratios[max(n - 1, 0) :] = 1.0
    bulk, q = lam[: min(n, width)], n / width
    median = float(bulk.quantile(0.5))
    variance = max(median / marchenko_pastur_median(q) if noise == "median" else trace / n, floor)
    relative = n * p
    center, scale = tracy_widom_center_scale(n, width)
    statistic = (width * float(lam[0]) / variance - center) / scale
    scalars = [
        log_trace,
        mean_share,
        float(-torch.xlogy(p, p).sum()),
        1 / float(p.square().sum()),
        float(relative.var(correction=0)),
        float((relative - 1).pow(3).mean()) / (float(relative.var(correction=0)) + _RESOLUTION**2) ** 1.5,
        math.log(max(median, floor) / float(lam.mean())),
        2 * float((p.cumsum(0) - torch.arange(1, n + 1, dtype=lam.dtype) / n).mean()),
        _divergence(bulk / variance, q),
        math.log1p(float((bulk / variance - _cell_means(len(bulk), q)).abs().mean())),
        math.asinh(statistic),
        tracy_widom_log_survival(statistic),
        overlap,
        float((lam > variance * marchenko_pastur_edges(q)[1]).sum()),
    ]
    return torch.cat([five / trace, five.sum()[None] / trace, ratios, torch.tensor(scalars, dtype=torch.float64)])


def _divergence(x: Tensor, q: float) -> float:
    """Kullback-Leibler divergence of the histogram of ln x from that of the law."""
    mass = _histogram(x, torch.full_like(x, 1 / len(x)))
    law = (1 - _BIN_FLOOR) * _law_histogram(q) + _BIN_FLOOR / _BINS
    return float((torch.xlogy(mass, mass) - mass * law.log()).sum())


def _histogram(x: Tensor, weights: Tensor) -> Tensor:
    """Hat functions on the points of the grid, constant beyond its ends."""
    position = ((x.log() - _BIN_START) / _BIN_STEP).clamp(0, _BINS - 1)
    hats = (1 - (position[:, None] - torch.arange(_BINS)).abs()).clamp_min(0)
    return weights @ hats


@lru_cache(maxsize=256)
def _law_histogram(q: float) -> Tensor:
    return _histogram(*_quadrature(q))


@lru_cache(maxsize=256)
def _quadrature(q: float, points: int = 20000) -> tuple[Tensor, Tensor]:
    """Points, descending, and weights of the bulk: in theta its mass is sin^2 / x at x = 1 + q + 2 √q cos theta."""
    ratio = min(q, 1 / q)
    theta = (torch.arange(points, dtype=torch.float64) + 0.5) * math.pi / points
    x = 1 + ratio + 2 * math.sqrt(ratio) * theta.cos()
    weights = theta.sin().square() / x
    return x * max(q, 1.0), weights / weights.sum()


@lru_cache(maxsize=256)
def _cell_means(count: int, q: float) -> Tensor:
    """Means of the bulk of the law over `count` cells of equal mass, descending."""
    x, weights = _quadrature(q)
    ends = torch.arange(count + 1, dtype=torch.float64) / count
    mass = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    moment = torch.cat([weights.new_zeros(1), (weights * x).cumsum(0)])
    after = torch.searchsorted(mass, ends).clamp(1, len(x))
    share = (ends - mass[after - 1]) / (mass[after] - mass[after - 1])
    return (moment[after - 1] + share * (moment[after] - moment[after - 1])).diff() * count
