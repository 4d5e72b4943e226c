"""Float64 oracle of sliding_window."""

import torch
from torch import Tensor

_FLOAT32_MAX = torch.finfo(torch.float32).max


def window_push_ref_(ring: Tensor, gram: Tensor, seen: Tensor, rows: list[Tensor], mask: Tensor | None = None) -> None:
    """`rmtkernels.window_push_` one row at a time, inner products in float64. `gram` may be float64."""
    batch, window = ring.shape[1], ring.shape[2]
    stacked = torch.stack([row if row.dim() == 3 else row[:, None] for row in rows])  # (L, B, T, D)
    keep = torch.ones(stacked.shape[1:3], dtype=torch.bool) if mask is None else mask.reshape(batch, -1)
    for t in range(stacked.shape[2]):
        for b in range(batch):
            seen[b, 2] = -1
            if not keep[b, t]:
                continue
            new = stacked[:, b, t].double()
            if not (new.square().sum(-1) <= _FLOAT32_MAX).all():
                seen[b, 1] += 1
                continue
            slot = int(seen[b, 0]) % window
            used = min(int(seen[b, 0]) + 1, window)
            ring[:, b, slot] = stacked[:, b, t]
            dots = (ring[:, b, :used].double() @ new[:, :, None]).squeeze(-1)
            gram[:, b, slot, :used] = dots.to(gram.dtype)
            gram[:, b, :used, slot] = dots.to(gram.dtype)
            seen[b, 0] += 1
            seen[b, 2] = slot


def window_gram_ref(
    hidden: Tensor, window: int, stride: int = 1, mask: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """`rmtkernels.window_gram` by pushing row after row; `dtype` is that of the Gram matrices."""
    batch, steps, dim = hidden.shape
    ring = hidden.new_zeros(1, batch, window, dim)
    gram = torch.zeros(1, batch, window, window, dtype=dtype, device=hidden.device)
    seen = torch.zeros(batch, 3, dtype=torch.int64, device=hidden.device)
    grams, counts = [], []
    for t in range(steps):
        window_push_ref_(ring, gram, seen, [hidden[:, t]], None if mask is None else mask[:, t])
        if (t + 1) % stride == 0:
            grams.append(gram[0].clone())
            counts.append(seen[:, 0].clone())
    if not grams:
        return gram.new_zeros(batch, 0, window, window), seen.new_zeros(batch, 0)
    return torch.stack(grams, 1), torch.stack(counts, 1)
