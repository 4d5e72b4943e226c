"""What one step of a watched generation shows, while the model generates."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from eigentrack.files import Settings
from eigentrack.history import History, took_part


@dataclass(frozen=True, eq=False)
class Step:
    """One watched step. The tensors are copies on the model's device: they may be kept and changed.

    Attributes:
        index: t, counted from 0 in each request.
        tokens: (B,) int64, the tokens fed; -1 where the model was fed embeddings.
        descriptors: (B, F) float32, as `track.descriptors[:, t]`; NaN where a sequence took no part.
        watched: (B,) bool, which sequences took part.
        rows: (B,) int64, how many activations each window holds, 0 to N.
        settings: the monitor's.
        risk: (B,) float32, as `track.risk[:, t]`; None without a detector.
        eigenvalues: (B, S, N) float32, as `track.eigenvalues[:, t]`.
    """

    index: int
    tokens: Tensor
    descriptors: Tensor
    watched: Tensor
    rows: Tensor
    settings: Settings | None = None
    risk: Tensor | None = None
    eigenvalues: Tensor = field(default_factory=lambda: torch.empty(0))


def read_step(history: History, index: int, settings: Settings | None = None) -> Step:
    """Step `index` of a history."""
    seen = history.seen[index]
    watched = took_part(seen)
    descriptors = history.descriptors[index].transpose(0, 1).flatten(1)  # (S, B, F) -> (B, S * F)
    window = history.eigenvalues.shape[-1]
    risk = history.risk[index].masked_fill(~watched, float("nan")) if history.risk.shape[1] else None
    return Step(
        index,
        history.tokens[index].clone(),
        descriptors.masked_fill(~watched[:, None], float("nan")),
        watched,
        seen[:, 0].clamp(max=window),
        settings,
        risk,
        history.eigenvalues[index].transpose(0, 1).masked_fill(~watched[:, None, None], float("nan")),
    )
