"""What the monitor keeps of a generation: buffers on the model's device that grow by doubling, never per token."""

import torch
from torch import Tensor


class History:
    """Per step of one request, step first: descriptors, eigenvalues, tokens, the windows' `seen` as it was then, and
    the risk if there is a detector."""

    def __init__(
        self,
        batch: int,
        spectra: int,
        features: int,
        window: int,
        device: torch.device,
        capacity: int = 256,
        risk: bool = False,
    ) -> None:
        self.steps = 0
        self.descriptors = torch.empty(capacity, spectra, batch, features, device=device)
        self.eigenvalues = torch.empty(capacity, spectra, batch, window, device=device)
        self.tokens = torch.empty(capacity, batch, dtype=torch.int64, device=device)
        self.seen = torch.empty(capacity, batch, 3, dtype=torch.int64, device=device)
        self.risk = torch.empty(capacity, batch if risk else 0, device=device)

    @property
    def watched(self) -> Tensor:
        """(capacity, B) bool: who took part."""
        return took_part(self.seen)

    def next_step(self) -> int:
        """Index of a new step, with room made for it. It counts once `steps` says so, when it has been filled."""
        if self.steps == len(self.tokens):
            for name in ("descriptors", "eigenvalues", "tokens", "seen", "risk"):
                old = getattr(self, name)
                with torch.inference_mode(False):
                    setattr(self, name, torch.cat([old, torch.empty_like(old)]))
        return self.steps

    def read(self, name: str) -> Tensor:
        """A copy of one field, sequence first: (B, T) or (B, T, S, ...); NaN where a sequence took no part."""
        steps = self.steps  # another thread may be adding to it
        values: Tensor = getattr(self, name)[:steps]
        values = values.t() if values.dim() == 2 else values.permute(2, 0, 1, 3)
        values = values.clone(memory_format=torch.contiguous_format)
        if values.is_floating_point():
            values[~self.watched[:steps].t()] = torch.nan
        return values


def took_part(seen: Tensor) -> Tensor:
    """(..., B) bool from the windows' (..., B, 3) `seen`: whose row was accepted."""
    return seen[..., 2] >= 0
