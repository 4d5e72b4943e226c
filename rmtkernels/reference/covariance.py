"""Float64 oracle of covariance."""

import torch
from torch import Tensor

from rmtkernels.errors import RangeError


def covariance_update_ref_(
    mean: Tensor,
    scatter: Tensor,
    totals: Tensor,
    batch: Tensor,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    decay: float = 1.0,
) -> None:
    """`rmtkernels.covariance_update_` in float64, whatever the dtype of `scatter`, which rounds the result only."""
    largest = torch.finfo(scatter.dtype).max
    weight = torch.ones(len(batch), dtype=torch.float64, device=batch.device) if weights is None else weights.double()
    offered = weight > 0 if mask is None else mask & (weight > 0)
    kept = offered & (batch.double().square().sum(1) <= largest)
    rows, weight = batch[kept].double(), weight[kept, None]
    rejected = (offered & ~kept).sum()
    if len(rows) == 0:
        totals[3] += rejected
        return

    fresh = bool(totals[0] == 0)
    old_mean = torch.zeros_like(mean) if fresh else mean
    old_scatter = torch.zeros_like(scatter, dtype=torch.float64) if fresh else decay * scatter.double()
    before, total = decay * totals[0], weight.sum()
    new_mean = (weight * rows).sum(0) / total
    centred = rows - new_mean
    gap = new_mean - old_mean
    between = before * (total / (before + total))
    new_scatter = old_scatter + centred.T @ (weight * centred) + between * torch.outer(gap, gap)
    if not (before >= 0 and before + total < torch.inf and new_scatter.diagonal().sum() <= largest / 2):
        raise RangeError("out of range: the sums would overflow, or the state is not finite")
    lower = torch.ones_like(scatter, dtype=torch.bool).tril()
    scatter[lower] = new_scatter[lower].to(scatter.dtype)
    mean.copy_(old_mean + total / (before + total) * gap)
    change = [total, weight.square().sum(), torch.tensor(len(rows)), rejected, torch.tensor(decay < 1 and not fresh)]
    totals.mul_(totals.new_tensor([decay, decay * decay, 1, 1, 1]))
    totals += torch.stack([value.to(totals) for value in change])
