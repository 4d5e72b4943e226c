"""Which attention heads stay, and how a head is made narrower from within, with the least error in what they write."""

import torch
from torch import Tensor

from rmtkd.errors import PlanError
from rmtkd.neurons import DAMPING


def count_heads(width: int, heads: int, head_width: int) -> int:
    """How few heads, all of one width, can have this width together.

    Args:
        width: k. Any multiple of `heads` will do.
        heads: H, how many there are.
        head_width: h, none is wider.

    Raises:
        PlanError: if neither H heads can, nor fewer.
    """
    for count in range(1, heads + 1):
        if width % count == 0 and width // count <= head_width:
            return count
    raise PlanError(
        f"{width} cannot be the width of {heads} equal heads, nor of fewer that are at most {head_width} wide; a "
        f"multiple of {heads} can"
    )


def choose_heads(moment: Tensor, output: Tensor, heads: int, count: int) -> list[int]:
    """The heads that stay: one after the other goes, always the one that those left make up for best.

    The output layer reads what all heads pass on, a, and writes W a. Without some heads it is fitted to the others,
    A a_S, with the least E‖W a − A a_S‖². Without head j too that error is larger by tr(A_j P_jj⁻¹ A_jᵀ), P being the
    inverse of E[a_S a_Sᵀ]: the optimal brain surgeon (Hassibi and Stork 1993) for blocks instead of single weights.

    Args:
        moment: (d, d) second moment E[a aᵀ], head by head.
        output: (n, d) W.
        heads: H, which divides d.
        count: 1 to H.

    Returns:
        Their numbers, ascending.
    """
    moment = moment.double()
    size = moment.diagonal().sqrt()
    size = torch.where(size > 0, size, 1)
    damped = moment / size / size[:, None] + DAMPING * torch.eye(len(moment), dtype=size.dtype, device=size.device)
    inverse, fitted = torch.linalg.inv(damped), output.double() * size
    rows = torch.arange(len(moment), device=moment.device).chunk(heads)
    kept = list(range(heads))
    while len(kept) > count:
        blocks = {head: inverse[rows[head]][:, rows[head]] for head in kept}
        worth = {head: _energy(fitted[:, rows[head]], blocks[head]) for head in kept}
        gone = min(kept, key=worth.__getitem__)
        kept.remove(gone)
        others = torch.linalg.solve(blocks[gone], inverse[rows[gone]])
        fitted = fitted - fitted[:, rows[gone]] @ others
        inverse = inverse - inverse[:, rows[gone]] @ others
    return kept


def narrow_scores(queries: Tensor, keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How queries and keys of one head shrink so that their products change least.

    qᵀ k ≈ (Bᵀ q)ᵀ (Dᵀ k), where B Dᵀ of rank r makes E (qᵀ k − qᵀ B Dᵀ k)² least for independent q and k of the given
    second moments: the truncated SVD of M_q^{1/2} M_k^{1/2} in the metric of both, shared evenly between the two
    (balanced truncation). No inverse of a moment is taken, so they may be singular.

    A shift of all keys changes all scores of a query alike, which softmax does not see: give the keys' covariance.

    Args:
        queries: (h, h) second moment of the queries, bias included.
        keys: (h, h) covariance of the keys.
        width: r, 1 to h. A head stays as it is if it is h.

    Returns:
        B and D, (h, r) float64, with Dᵀ B = I on the directions that carry anything.
    """
    if width == len(queries):
        identity = torch.eye(width, dtype=torch.float64, device=queries.device)
        return identity, identity
    query_root, key_root = _root(queries), _root(keys)
    left, values, right = torch.linalg.svd(query_root @ key_root)
    scale = _inverse_root(values[:width])
    return key_root @ right[:width].T * scale, query_root @ left[:, :width] * scale


def narrow_values(values: Tensor, output: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How the values of one head shrink so that what the head adds to the stream changes least.

    O v ≈ O B (Dᵀ v) of rank r with the least E‖O v − O B Dᵀ v‖²: balanced truncation of the values' moment and OᵀO.

    Args:
        values: (h, h) second moment of the values that the head passes on.
        output: (d, h) the head's columns of the output layer.
        width: r, 1 to h.

    Returns:
        B and D, (h, r) float64: the head's output columns become O B, its value rows Dᵀ V.
    """
    output = output.double()
    return narrow_scores(output.T @ output, values, width)


def _energy(written: Tensor, inverse: Tensor) -> float:
    """tr(A P⁻¹ Aᵀ)."""
    return float((torch.linalg.solve(inverse, written.T).T * written).sum())


def _root(moment: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(moment.double())
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _inverse_root(values: Tensor) -> Tensor:
    """values^{-1/2}, and 0 for what is rounding of 0."""
    negligible = values <= 1e-12 * values.max().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(negligible, 0, values.clamp(min=torch.finfo(values.dtype).tiny) ** -0.5)
