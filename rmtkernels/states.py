"""States that live on one device and are updated in place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rmtkernels.errors import RangeError, ShapeError
from rmtkernels.ops.sliding_window import check_counts, check_dtype, check_window, window_push_
from rmtkernels.ops.spectrum import spectrum_descriptors


class SlidingWindow:
    """The last `window` activations of `batch` sequences at `layers` layers, and their Gram matrices.

    Attributes:
        ring: (L, B, N, D), gram: (L, B, N, N) float32, seen: (B, 3) int64; see `rmtkernels.window_push_`.
        rows: (B,) int64, rows accepted since the last reset, and rejected: (B,) int64, rows skipped because they were
            not finite or their squared norm is no finite float32. Both are views of `seen`.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        window: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_window(window)
        check_dtype("dtype", dtype)
        if min(layers, batch, dim) < 0:
            raise ShapeError(f"layers, batch and dim must not be negative, got {layers}, {batch} and {dim}")
        self.ring = torch.zeros(layers, batch, window, dim, dtype=dtype, device=device)
        self.gram = torch.zeros(layers, batch, window, window, device=device)
        self.seen = torch.zeros(batch, 3, dtype=torch.int64, device=device)
        self.seen[:, 2] = -1
        self.rows, self.rejected = self.seen[:, 0], self.seen[:, 1]

    def update(self, rows: Sequence[Tensor], mask: Tensor | None = None) -> None:
        """Pushes rows, one (B, D) or (B, T, D) tensor per layer; see `rmtkernels.window_push_`."""
        window_push_(self.ring, self.gram, self.seen, rows, mask)

    def descriptors(self, *, center: bool = True, joint: str | None = None) -> tuple[Tensor, Tensor]:
        """Descriptors and eigenvalues of the windows as they are; see `rmtkernels.spectrum_descriptors`."""
        return spectrum_descriptors(self.gram, self.rows, self.ring.shape[-1], center=center, joint=joint)

    def reset(self, sequences: Tensor | None = None) -> None:
        """Empties all windows, or those where the (B,) bool tensor `sequences` is True. Costs O(B)."""
        if sequences is None:
            self.seen.zero_()
        elif sequences.shape != self.seen.shape[:1] or sequences.dtype != torch.bool:
            raise ShapeError(
                f"sequences must be bool ({len(self.seen)},), got {sequences.dtype} {tuple(sequences.shape)}"
            )
        else:
            self.seen.masked_fill_(sequences[:, None], 0)

    def state_dict(self) -> dict[str, Tensor]:
        """The three tensors, copied."""
        return {name: getattr(self, name).clone() for name in ("ring", "gram", "seen")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a state of the same shape.

        Raises:
            ShapeError: if a tensor is missing or has another shape or dtype.
            RangeError: if `seen` holds what no window comes to. In both cases nothing changes.
        """
        for name in ("ring", "gram", "seen"):
            own, new = getattr(self, name), state.get(name)
            if new is None or new.shape != own.shape or new.dtype != own.dtype:
                found = "nothing" if new is None else f"{new.dtype} {tuple(new.shape)}"
                raise ShapeError(f"{name} must be {own.dtype} {tuple(own.shape)}, got {found}")
        check_counts(state["seen"][:, :2])
        if not state["seen"][:, 2].lt(self.ring.shape[2]).all():
            raise RangeError(f"seen must name slots below {self.ring.shape[2]}")
        for name in ("ring", "gram", "seen"):
            getattr(self, name).copy_(state[name])
