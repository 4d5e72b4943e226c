"""Which inner neurons stay, and how those that go are made from those that stay."""

from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from rmtkd.rank import leading_eigenvectors

DAMPING = 1e-8  # of the squared size of a neuron: those that never fire, or fire as one, have no inverse


@dataclass(frozen=True)
class Neurons:
    """What becomes of d inner neurons a = φ(W x + b) between two layers.

    Attributes:
        before: (m, d): the layer before becomes (before W, before b).
        after: (d, m): the layer after, V a, becomes (V after) a'.
    """

    before: Tensor
    after: Tensor


def choose_neurons(moment: Tensor, count: int, how: str) -> Neurons:
    """The neurons of a narrower inner layer.

    "leverage": neurons that span the leading eigenvectors best, scaled by the roots of their eigenvalues, by QR with
    column pivoting; all of them are then interpolated from those that stay, a ≈ C a_S, with the least squared error.
    Nonlinearities act neuron by neuron, so those that stay are exact.

    "projection": the leading eigenvectors U themselves, as the paper has it: a ≈ U a', and a' = φ(Uᵀ (W x + b)), as if
    the nonlinearity commuted with U, which it does not.

    Args:
        moment: (d, d) second moment E[a aᵀ] after the nonlinearity, not centred.
        count: m, 1 to d. All neurons stay as they are if it is d.
        how: "leverage" or "projection".

    Returns:
        float64 matrices.
    """
    d = len(moment)
    if count == d:
        identity = torch.eye(d, dtype=torch.float64, device=moment.device)
        return Neurons(identity, identity)
    leading = leading_eigenvectors(moment, count).double()
    if how == "projection":
        return Neurons(leading.T, leading)
    eigenvalues = ((moment.double() @ leading) * leading).sum(0).clamp(min=0)
    kept = select((leading * eigenvalues.sqrt()).T, count)
    return Neurons(_rows(kept, d), interpolation(moment, kept))


def select(features: Tensor, count: int) -> Tensor:
    """(count,) ascending: the columns of (k, d) features that QR with column pivoting takes first."""
    order = scipy.linalg.qr(features.double().cpu().numpy(), mode="r", pivoting=True)[1]
    return torch.from_numpy(order[:count].copy()).long().sort().values.to(features.device)


def interpolation(moment: Tensor, kept: Tensor) -> Tensor:
    """C of least E‖a − C a_S‖²: (d, m) float64, the identity on those that are kept.

    Args:
        moment: (d, d) second moment E[a aᵀ].
        kept: (m,) S.
    """
    weights = regression(moment[:, kept], moment[kept][:, kept])
    weights[kept] = torch.eye(len(kept), dtype=weights.dtype, device=weights.device)
    return weights


def regression(crossed: Tensor, moment: Tensor) -> Tensor:
    """C of least E‖a − C b‖²: (d, m) float64.

    Args:
        crossed: (d, m) E[a bᵀ].
        moment: (m, m) E[b bᵀ].
    """
    moment = moment.double()
    size = moment.diagonal().sqrt()
    size = torch.where(size > 0, size, 1)
    damping = DAMPING * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    factor = torch.linalg.cholesky(moment / size / size[:, None] + damping)
    return torch.cholesky_solve((crossed.double() / size).T, factor).T / size


def _rows(kept: Tensor, d: int) -> Tensor:
    """(m, d): picks entries of a vector."""
    return torch.eye(d, dtype=torch.float64, device=kept.device)[kept]
