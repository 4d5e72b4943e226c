"""covariance: mean and scatter matrix of a stream of rows, one batch at a time."""

import torch
from torch import Tensor

from rmtkernels._library import define
from rmtkernels.dispatch import select
from rmtkernels.errors import DeviceError, DtypeError, RangeError, ShapeError
from rmtkernels.reference import covariance as reference
from rmtkernels.triton import operators as triton

ROW_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCATTER_DTYPES = (torch.float32, torch.float64)
TOTALS = 5  # weight, squared weights, rows, rejected rows, decays: csrc/include/rmtkernels/covariance.h

define(
    "covariance_update_(Tensor(a!) mean, Tensor(b!) scatter, Tensor(c!) totals, Tensor batch, Tensor? weights=None, "
    "Tensor? mask=None, float decay=1.0) -> ()"
)


@torch.library.register_fake("rmtkernels::covariance_update_")
def _covariance_update_fake(
    mean: Tensor,
    scatter: Tensor,
    totals: Tensor,
    batch: Tensor,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    decay: float = 1.0,
) -> None:
    for tensor in (scatter, totals, batch, weights, mask):  # one without data brings the whole call here
        if tensor is not None and tensor.device != mean.device:
            raise DeviceError(f"all tensors must be on the mean's device {mean.device}, got {tensor.device}")


def covariance_update_(
    mean: Tensor,
    scatter: Tensor,
    totals: Tensor,
    batch: Tensor,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    decay: float = 1.0,
    backend: str | None = None,
) -> None:
    """Adds a batch of rows to a weighted mean and scatter matrix Σ w (x − mean)(x − mean)ᵀ, in place.

    The batch is centred on its own mean, in float64, before any product, so a mean far from zero costs no digits; the
    two samples are then combined exactly (Chan). Only the lower triangle is computed. A row with NaN or Inf, or whose
    squared norm does not fit the scatter matrix' dtype, is skipped and counted. An update whose rows are all skipped
    changes that count and nothing else; it does not decay either.

    On CUDA nothing waits for the device, and the call can be captured in a CUDA graph. So what depends on the data does
    not raise there: where a weight is out of range, or the sums would overflow, every row offered is counted as
    rejected, and nothing else changes. 16-bit rows of a float32 state are multiplied on tensor cores, in two parts each
    that keep 22 binary digits of what is left when the mean is subtracted; no product is rounded to TF32.

    Args:
        mean: (D,) float64.
        scatter: (D, D) float32 or float64, contiguous. The strict upper triangle is neither read nor written. All
            products and sums are of this dtype.
        totals: (5,) float64: sum of the weights, sum of their squares, rows accepted, rows rejected, and updates that
            decayed. Zeros are an empty state, of which mean and scatter are not read.
        batch: (n, D) float64, float32, bfloat16 or float16, any strides, in memory of its own: it is read while the
            state is written.
        weights: (n,) float32 or float64, finite and not negative: a row of weight 2 counts as two rows. 0 skips a row.
        mask: (n,) bool; rows where it is False are skipped, and neither they nor their weights are read.
        decay: in (0, 1]: what came before counts this much less from now on, once per update.
        backend: "cpu", "cuda", "triton" or "reference" instead of the automatic choice. On a GPU nothing waits: where a
            weight is out of range or the sums would overflow, every row offered counts as rejected and nothing is
            raised.

    Raises:
        ShapeError, DtypeError, DeviceError: on bad arguments, before anything is written.
        RangeError: if decay is out of range and, but on CUDA, if a weight is or the sums would overflow; nothing is
            written either.
        BackendError: if `backend` is missing.

    Source: Chan, Golub, LeVeque (1979) for the combination; RMT-KD (arXiv 2509.15724) for its use; Ootomo, Yokota
    (arXiv 2203.03341) for products of two parts on tensor cores.
    """
    if torch.is_grad_enabled():
        batch = batch.detach() if batch.requires_grad else batch
        weights = weights.detach() if weights is not None and weights.requires_grad else weights
    selected = select("covariance_update_", mean.device, backend)
    if selected == "reference":
        _check_update(mean, scatter, totals, batch, weights, mask, decay)
        reference.covariance_update_ref_(mean, scatter, totals, batch, weights, mask, decay)
        return
    if selected == "triton":
        triton.covariance_update_(mean, scatter, totals, batch, weights, mask, decay)
        return
    try:
        torch.ops.rmtkernels.covariance_update_(mean, scatter, totals, batch, weights, mask, decay)
    except RuntimeError as error:  # the kernel checks all of it before it writes; here its refusal gets its type
        _check_update(mean, scatter, totals, batch, weights, mask, decay)
        if "out of range" in str(error):
            raise RangeError("the sums would overflow, or the state is not finite") from error
        raise


def _check_update(
    mean: Tensor,
    scatter: Tensor,
    totals: Tensor,
    batch: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    decay: float,
) -> None:
    if mean.dim() != 1:
        raise ShapeError(f"mean must be (D,), got {tuple(mean.shape)}")
    dim = len(mean)
    _check("mean", mean, (dim,), (torch.float64,), mean.device, contiguous=True)
    _check("scatter", scatter, (dim, dim), SCATTER_DTYPES, mean.device, contiguous=True)
    _check("totals", totals, (TOTALS,), (torch.float64,), mean.device, contiguous=True)
    if batch.dim() != 2:
        raise ShapeError(f"batch must be (n, {dim}), got {tuple(batch.shape)}")
    rows = len(batch)
    _check("batch", batch, (rows, dim), ROW_DTYPES, mean.device)
    if mask is not None:
        _check("mask", mask, (rows,), (torch.bool,), mean.device)
    if weights is not None:
        _check("weights", weights, (rows,), SCATTER_DTYPES, mean.device)
        read = weights if mask is None else weights[mask]
        if not (read.isfinite() & (read >= 0)).all():
            raise RangeError("weights must be finite and not negative")
    if not 0 < decay <= 1:
        raise RangeError(f"decay must be in (0, 1], got {decay}")


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = False,
) -> None:
    if tensor.shape != shape or (contiguous and not tensor.is_contiguous()):
        layout = "contiguous " if contiguous else ""
        raise ShapeError(f"{name} must be {layout}{shape}, got {tuple(tensor.shape)}, strides {tensor.stride()}")
    if tensor.dtype not in dtypes:
        raise DtypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        raise DeviceError(f"{name} must be on {device}, got {tensor.device}")


def check_layout(
    mean: Tensor,
    scatter: Tensor,
    totals: Tensor,
    batch: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    decay: float,
) -> None:
    """Raises what `covariance_update_` raises of arguments whose data are not looked at."""
    _check_update(mean, scatter, totals, batch, None, mask, decay)
    if weights is not None:
        _check("weights", weights, (len(batch),), SCATTER_DTYPES, mean.device)
