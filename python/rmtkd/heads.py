"""Which attention heads stay."""

import torch
from torch import Tensor

from rmtkd.neurons import DAMPING


def choose_heads(moment: Tensor, output: Tensor, heads: int, count: int) -> list[int]:
    """The heads that stay: one after the other goes, always the one that those left make up for best.

    The output layer reads the context of all heads, a, and writes W a. Without some heads it is fitted to the others,
    A a_S, with the least E‖W a − A a_S‖². Without head j too that error is larger by tr(A_j P_jj⁻¹ A_jᵀ), P being the
    inverse of E[a_S a_Sᵀ]: the optimal brain surgeon for blocks of weights (Kurtic et al., arXiv 2203.07259).

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
    fitted = output.double() * size
    size = torch.where(size > 0, size, 1)
    damping = DAMPING * torch.eye(len(moment), dtype=size.dtype, device=size.device)
    inverse = torch.linalg.inv(moment / size / size[:, None] + damping)
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


def _energy(written: Tensor, inverse: Tensor) -> float:
    """tr(A P⁻¹ Aᵀ)."""
    return float((torch.linalg.solve(inverse, written.T).T * written).sum())
