"""The one projection of a residual stream, in axes that the norm layers of a narrower network can live with."""

import math

import torch
from torch import Tensor

from rmtkd.neurons import select
from rmtkd.rank import leading_eigenvectors


def layer_norm_basis(moment: Tensor, width: int) -> Tensor:
    """P, whose columns are the directions that a stream read through LayerNorms keeps: h becomes Pᵀ h.

    LayerNorm subtracts the mean over the axes. The direction of that mean, 1/√d, is kept beside the leading
    eigenvectors of what is left without it, and becomes the direction of the mean over the new axes: so a narrow norm
    subtracts what the wide one did.

    The axes are free otherwise, and are turned as near as can be to those axes of the old stream that have the largest
    leverage (orthogonal Procrustes): gains and offsets act axis by axis, and lose what other axes would mix.

    Args:
        moment: (d, d) second moment of the stream, not centred.
        width: k, 1 to d.

    Returns:
        (d, k) float64, orthonormal columns. The identity for k = d, where any basis would do.
    """
    d = len(moment)
    if width == d:
        return torch.eye(d, dtype=torch.float64, device=moment.device)
    old_mean, new_mean = _mean_direction(d, moment), _mean_direction(width, moment)
    if width == 1:
        return old_mean[:, None]
    without = moment - moment.mean(0, keepdim=True)
    without = without - without.mean(1, keepdim=True)
    leading = leading_eigenvectors(without, width - 1).double()
    spanning = _orthonormal(torch.column_stack((old_mean, leading)))  # its first column is the mean's direction
    axes = _complement(new_mean)
    near = select(spanning.T, width)
    turn = _polar(spanning[near, 1:].T @ axes)
    return torch.outer(old_mean, new_mean) + spanning[:, 1:] @ turn @ axes.T


def rms_norm_basis(moment: Tensor, width: int, gains: Tensor) -> Tensor:
    """P, whose columns are the directions that a stream read through RMSNorms keeps: h becomes Pᵀ h.

    RMSNorm without gains commutes with any orthogonal matrix, so the span is that of the leading eigenvectors and its
    axes are free. Gains move into the layers that read them, but for the last norm's, where there is no such layer, or
    one tied to the embeddings. The axes are the eigenvectors of Pᵀ diag(gains) P: there the gains are diagonal again.

    Args:
        moment: (d, d) second moment of the stream, not centred.
        width: k, 1 to d.
        gains: (d,) of the last norm.

    Returns:
        (d, k) float64, orthonormal columns. The identity for k = d, where any basis would do.
    """
    if width == len(moment):
        return torch.eye(width, dtype=torch.float64, device=moment.device)
    leading = _orthonormal(leading_eigenvectors(moment, width).double())
    axes: Tensor = torch.linalg.eigh(leading.T @ (gains.double()[:, None] * leading)).eigenvectors
    return leading @ axes


def norm_gain(moment: Tensor, basis: Tensor) -> float:
    """How much larger a norm's gains must be in the new axes: √(d/k · share of the energy that is kept).

    A norm divides by the root mean square over its axes. Over the k that are left it is √(d/k · kept) times the old.
    """
    d, k = basis.shape
    if k == d:
        return 1.0
    kept = (basis.T @ moment @ basis).trace() / moment.trace().clamp(min=torch.finfo(moment.dtype).tiny)
    return math.sqrt(d / k * float(kept))


def _mean_direction(size: int, like: Tensor) -> Tensor:
    return torch.full((size,), size**-0.5, dtype=torch.float64, device=like.device)


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def _complement(direction: Tensor) -> Tensor:
    """(k, k - 1): orthonormal columns orthogonal to a direction."""
    size = len(direction)
    identity = torch.eye(size, dtype=direction.dtype, device=direction.device)
    return _orthonormal(torch.column_stack((direction, identity[:, : size - 1])))[:, 1:]


def _polar(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to a square one."""
    left, _, right = torch.linalg.svd(matrix)
    nearest: Tensor = left @ right
    return nearest
