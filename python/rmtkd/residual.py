"""The one projection of a residual stream, that norm layers of a narrower network can live with."""

import torch
from torch import Tensor

from rmtkd.neurons import select
from rmtkd.rank import leading_eigenvectors


def residual_basis(moment: Tensor, width: int, *, keep_mean: bool) -> Tensor:
    """P, whose columns are the directions that a residual stream keeps: h becomes Pᵀ h.

    The span is that of the leading eigenvectors. Within it the axes are free, and are turned as near as can be to
    axes of the old stream, those of largest leverage (orthogonal Procrustes): gains and offsets of norm layers act
    axis by axis, and lose what a turned basis would mix.

    LayerNorm subtracts the mean over the axes. With `keep_mean` the direction of that mean, 1/√d, is kept beside the
    leading eigenvectors of what is left without it, and becomes the direction of the mean over the new axes: so the
    narrow norm subtracts what the wide one did.

    Args:
        moment: (d, d) second moment of the stream, not centred.
        width: k, 1 to d.
        keep_mean: for LayerNorm; RMSNorm subtracts nothing.

    Returns:
        (d, k) float64, orthonormal columns. The identity for k = d, where any basis would do.
    """
    d = len(moment)
    if width == d:
        return torch.eye(d, dtype=torch.float64, device=moment.device)
    if not keep_mean:
        leading = _orthonormal(leading_eigenvectors(moment, width).double())
        return leading @ _polar(leading[select(leading.T, width)].T)
    old_mean, new_mean = _mean_direction(d, moment), _mean_direction(width, moment)
    rows_without = moment - moment.mean(0, keepdim=True)
    without = rows_without - rows_without.mean(1, keepdim=True)
    if width == 1:
        return old_mean[:, None]
    leading = leading_eigenvectors(without, width - 1).double()
    spanning = _orthonormal(torch.column_stack((old_mean, leading)))  # its first column is the mean's direction
    axes = _complement(new_mean)
    near = select(spanning.T, width)
    turn = _polar(spanning[near, 1:].T @ axes)
    return torch.outer(old_mean, new_mean) + spanning[:, 1:] @ turn @ axes.T


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
