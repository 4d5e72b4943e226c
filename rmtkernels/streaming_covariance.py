"""StreamingCovariance: mean and covariance of a stream, mergeable, also across processes."""

import torch
import torch.distributed as dist
from torch import Tensor

from rmtkernels.errors import DeviceError, DtypeError, RangeError, ShapeError, StateError
from rmtkernels.ops.covariance import SCATTER_DTYPES, TOTALS, covariance_update_

_BLOCK = 256  # rows of the lower triangle that are mirrored or sent at once


class StreamingCovariance:
    """Weighted mean and covariance of all rows seen so far, or with `decay` mostly of the latest.

    Attributes:
        mean: (D,) float64. scatter: (D, D), lower triangle. totals: (5,) float64. See `rmtkernels.covariance_update_`.
        decay: what came before counts this much less after each update.
    """

    def __init__(
        self,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        decay: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if dim < 0:
            raise ShapeError(f"dim must not be negative, got {dim}")
        if dtype not in SCATTER_DTYPES:
            raise DtypeError(f"dtype must be float32 or float64, got {dtype}")
        if not 0 < decay <= 1:
            raise RangeError(f"decay must be in (0, 1], got {decay}")
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=dtype, device=device)
        self.totals = torch.zeros(TOTALS, dtype=torch.float64, device=device)
        self.decay = decay

    @property
    def weight(self) -> float:
        """Sum of the weights; the number of rows if they have none and nothing decays."""
        return float(self.totals[0])

    @property
    def effective_rows(self) -> float:
        """(Σw)² / Σw²: how many rows of equal weight would average as well. The n of q = D / n; 0 if there are none."""
        weight, squares = self.totals[:2].tolist()
        return float(weight / squares * weight) if squares > 0 else 0.0

    @property
    def rows(self) -> int:
        """Rows accepted."""
        return int(self.totals[2])

    @property
    def rejected(self) -> int:
        """Rows skipped because they were not finite, or too large for the squares of the state's dtype."""
        return int(self.totals[3])

    def update(self, batch: Tensor, weights: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Adds (n, D) rows; see `rmtkernels.covariance_update_`."""
        covariance_update_(self.mean, self.scatter, self.totals, batch, weights, mask, decay=self.decay)

    def covariance(self, *, center: bool = True, ddof: float = 0.0) -> Tensor:
        """The full symmetric (D, D) matrix, Σ w (x − mean)(x − mean)ᵀ / (Σw − ddof).

        Args:
            center: False gives the second moment Σ w x xᵀ / (Σw − ddof) instead.
            ddof: 0 divides by n as RMT-KD does, 1 is the unbiased estimate of rows that count once each.

        Raises:
            StateError: if the state is empty or its weight does not exceed `ddof`.
        """
        divisor = self.weight - ddof
        if not (self.weight > 0 and divisor > 0):
            refused = f" ({self.rejected} rows were rejected)" if self.rejected else ""
            raise StateError(
                f"no covariance of total weight {self.weight} with ddof={ddof}{refused}: update the state first"
            )
        full = self.scatter / divisor
        if not center:
            root = (self.mean * (self.weight / divisor) ** 0.5).to(full.dtype)
            full.addr_(root, root)
        for first in range(0, len(full), _BLOCK):
            rows = full[first : first + _BLOCK]
            corner = rows[:, first : first + _BLOCK]
            corner.copy_(corner.tril() + corner.tril(-1).T)
            full[:first, first : first + _BLOCK] = rows[:, :first].T
        return full

    def merge(self, other: "StreamingCovariance") -> None:
        """Adds what another state has seen: as if its rows had come here.

        Raises:
            StateError: if one of the two has decayed: the age of its rows relative to the others is not known.
            ShapeError, DtypeError, DeviceError: if the states do not fit each other.
            RangeError: if the sums would overflow. In all cases nothing has changed.
        """
        if other.scatter.shape != self.scatter.shape:
            raise ShapeError(f"cannot merge a state of width {len(other.mean)} into one of width {len(self.mean)}")
        if other.scatter.dtype != self.scatter.dtype:
            raise DtypeError(f"cannot merge a {other.scatter.dtype} state into a {self.scatter.dtype} one")
        if other.scatter.device != self.scatter.device:
            raise DeviceError(f"cannot merge a state on {other.scatter.device} into one on {self.scatter.device}")
        _refuse_decayed(self.totals[4] + other.totals[4])
        if self.weight == 0:  # mean and scatter may hold anything
            self.scatter.copy_(other.scatter)
            self.mean.copy_(other.mean)
        elif other.weight > 0:
            together = self.weight + other.weight
            gap = other.mean - self.mean
            spread = gap * (self.weight * (other.weight / together)) ** 0.5
            _refuse_overflow(_trace(self.scatter) + _trace(other.scatter) + spread.square().sum(), self.scatter.dtype)
            root = spread.to(self.scatter.dtype)
            self.scatter.add_(other.scatter).addr_(root, root)
            self.mean.add_(gap, alpha=other.weight / together)
        self.totals.add_(other.totals)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merges the states of all processes of a `torch.distributed` group; each ends with the same whole.

        Every process must call it, once: a second call would count all rows again. If the states cannot be merged, all
        processes raise and none has changed.

        Raises:
            StateError: if a state has decayed.
            ShapeError, DtypeError: if the states do not have one width and one dtype.
            RangeError: if the sums would overflow.
        """
        dim = len(self.mean)
        dtype = self.scatter.dtype
        kinds = _gather(self.totals.new_tensor([dim, SCATTER_DTYPES.index(dtype)]), group)
        if (kinds[:, 0] != dim).any():
            raise ShapeError(f"states of all processes must have one width, got {kinds[:, 0].int().tolist()}")
        if (kinds[:, 1] != kinds[0, 1]).any():
            raise DtypeError("states of all processes must have one dtype")
        if self.weight == 0:  # mean and scatter may hold anything
            self.mean.zero_()
            self.scatter.zero_()
        totals, means = _gather(self.totals, group), _gather(self.mean, group)
        _refuse_decayed(totals[:, 4].sum())
        weights = totals[:, :1]
        mean = (weights * means).sum(0) / weights.sum().clamp(min=torch.finfo(torch.float64).tiny)
        spread = (weights * (means - mean).square()).sum()
        _refuse_overflow(_gather(_trace(self.scatter), group).sum() + spread, dtype)
        root = ((self.mean - mean) * self.totals[0].sqrt()).to(dtype)
        scatter = self.scatter.addr(root, root)
        for first in range(0, dim, _BLOCK):
            block = scatter[first : first + _BLOCK, : first + _BLOCK].contiguous()
            dist.all_reduce(block, group=group)
            scatter[first : first + _BLOCK, : first + _BLOCK] = block
        self.scatter.copy_(scatter)
        self.mean.copy_(mean)
        self.totals.copy_(totals.sum(0))

    def reset(self) -> None:
        """Forgets everything. Costs O(1): an empty state's mean and scatter are not read."""
        self.totals.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The three tensors, copied. `decay` belongs to whoever makes the state."""
        return {name: getattr(self, name).clone() for name in ("mean", "scatter", "totals")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a state of the same width and dtype.

        Raises:
            ShapeError: if a tensor is missing or has another shape or dtype; then nothing changes.
        """
        for name in ("mean", "scatter", "totals"):
            own, new = getattr(self, name), state.get(name)
            if new is None or new.shape != own.shape or new.dtype != own.dtype:
                found = "nothing" if new is None else f"{new.dtype} {tuple(new.shape)}"
                raise ShapeError(f"{name} must be {own.dtype} {tuple(own.shape)}, got {found}")
        for name in ("mean", "scatter", "totals"):
            getattr(self, name).copy_(state[name])


def _refuse_decayed(decays: Tensor) -> None:
    if decays > 0:
        raise StateError("a state that has decayed cannot be merged: how old its rows are to the others is not known")


def _refuse_overflow(trace: Tensor, dtype: torch.dtype) -> None:
    """No entry of a scatter matrix is larger than its trace."""
    if not trace <= torch.finfo(dtype).max / 2:
        raise RangeError("the sums would overflow, or a state is not finite")


def _trace(scatter: Tensor) -> Tensor:
    return scatter.diagonal().double().sum()


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(processes, ...): the tensors of all processes."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)
