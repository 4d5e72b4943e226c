"""Float64 oracle of spectrum. The formulas are those of docs/conventions.md, written once more and independently."""

import math

import torch
from torch import Tensor

from rmtkernels.laws import marchenko_pastur_edges, marchenko_pastur_median

_RESOLUTION = 2.0**-20
_DESCRIPTORS = 13
_SMALLEST_TRACE = torch.finfo(torch.float32).tiny


def spectrum_eigvalsh_ref(matrices: Tensor) -> Tensor:
    """Eigenvalues, ascending, float64. Reads the lower triangle."""
    finite = matrices.isfinite().all(-1).all(-1)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None, None], matrices, 0.0).double())
    return torch.where(finite[..., None], eigenvalues, torch.nan)


def spectrum_descriptors_ref(
    gram: Tensor, seen: Tensor, dim: int, *, center: bool = True, joint: str | None = None
) -> tuple[Tensor, Tensor]:
    """`rmtkernels.spectrum_descriptors` in float64: gram (L, B, N, N), seen (B,) -> (L or 1, B, F), (L or 1, B, N)."""
    layers, batch, window, _ = gram.shape
    descriptors, eigenvalues = [], []
    for layer in range(layers) if joint is None else [slice(None)]:
        for b in range(batch):
            rows = min(int(seen[b]), window)
            blocks = gram[layer, b, :rows, :rows].double().reshape(layers if joint else 1, rows, rows)
            lam, log_trace, width = _window_spectrum(blocks.nan_to_num(), dim, center, joint)
            broken = 0.0 if blocks.isfinite().all() else math.nan
            descriptors.append(_descriptors(lam, log_trace, width) + broken)
            eigenvalues.append(torch.cat([lam + broken, lam.new_zeros(window - len(lam))]))
    spectra = layers if joint is None else 1
    if not descriptors:
        return gram.new_zeros(spectra, batch, _DESCRIPTORS).double(), gram.new_zeros(spectra, batch, window).double()
    return torch.stack(descriptors).reshape(spectra, batch, -1), torch.stack(eigenvalues).reshape(
        spectra, batch, window
    )


def _window_spectrum(blocks: Tensor, dim: int, center: bool, joint: str | None) -> tuple[Tensor, float, int]:
    """Eigenvalues of eig(G / D), descending, ln of the trace, and D; from (layers, rows, rows) blocks of one window."""
    layers, rows = blocks.shape[0], blocks.shape[-1]
    traces = _traces(blocks)
    if center and rows:
        projector = torch.eye(rows, dtype=torch.float64, device=blocks.device) - 1.0 / rows
        blocks = projector @ blocks @ projector
        equal_rows = _traces(blocks) <= _RESOLUTION * traces  # all that is left is rounding
        blocks = torch.where(equal_rows[:, None, None], 0.0, blocks)
        traces = _traces(blocks)
    if joint == "trace":
        scaled = torch.where(traces[:, None, None] > 0, blocks / traces[:, None, None], 0.0)
        log_trace = float((traces / dim).clamp_min(_SMALLEST_TRACE).log().mean())
    else:
        scaled = blocks
        log_trace = math.log(max(float(traces.sum()) / (dim * layers), _SMALLEST_TRACE))
    width = dim * layers
    lam = torch.linalg.eigvalsh(scaled.sum(0) / width).flip(0).clamp_min(0) if rows else blocks.new_zeros(0)
    return (lam[: rows - 1] if center and rows else lam), log_trace, width


def _traces(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0)


def _descriptors(lam: Tensor, log_trace: float, width: int) -> Tensor:
    n, trace = len(lam), float(lam.sum())
    five = torch.cat([lam, lam.new_zeros(5)])[:5]
    if trace <= 0:
        return torch.tensor([0.0] * 5 + [1.0] * 4 + [log_trace, 0.0, 0.0, 0.0], dtype=torch.float64)
    p = lam / trace
    floored = five.clamp_min(_RESOLUTION * float(lam[0]))
    ratios = floored[:4] / floored[1:]
    ratios[max(n - 1, 0) :] = 1.0
    rank = min(n, width)
    variance = float(lam[:rank].quantile(0.5)) / marchenko_pastur_median(n / width)
    edge = max(variance * marchenko_pastur_edges(n / width)[1], _RESOLUTION * float(lam[0]))
    scalars = [log_trace, float(-torch.xlogy(p, p).sum()), 1 / float(p.square().sum()), float((lam > edge).sum())]
    return torch.cat([five / trace, ratios, torch.tensor(scalars, dtype=torch.float64)])
