"""sliding_window: the Gram matrix of the last N activations, one token at a time or for a whole sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rmtkernels._library import define
from rmtkernels.dispatch import select
from rmtkernels.errors import DeviceError, DtypeError, RangeError, ShapeError
from rmtkernels.reference import sliding_window as reference
from rmtkernels.triton import operators as triton

MAX_WINDOW = 128
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

define("window_push_(Tensor(a!) ring, Tensor(b!) gram, Tensor(c!) seen, Tensor[] rows, Tensor? mask=None) -> ()")
_PUSH_OP = torch.ops.rmtkernels.window_push_.default  # looked up once: this runs at every token
define("window_gram(Tensor hidden, int window, int stride=1, Tensor? mask=None) -> (Tensor, Tensor)")


@torch.library.register_fake("rmtkernels::window_push_")
def _window_push_fake(ring: Tensor, gram: Tensor, seen: Tensor, rows: list[Tensor], mask: Tensor | None = None) -> None:
    # One tensor without data brings the whole call here: the kernel would never see the mistake
    for tensor in (gram, seen, *rows, *([] if mask is None else [mask])):
        if tensor.device != ring.device:
            raise DeviceError(f"all tensors must be on the ring's device {ring.device}, got {tensor.device}")


@torch.library.register_fake("rmtkernels::window_gram")
def _window_gram_fake(
    hidden: Tensor, window: int, stride: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, windows = hidden.shape[0], hidden.shape[1] // stride
    gram = hidden.new_empty((batch, windows, window, window), dtype=torch.float32)
    return gram, hidden.new_empty((batch, windows), dtype=torch.int64)


def window_push_(
    ring: Tensor,
    gram: Tensor,
    seen: Tensor,
    rows: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Pushes one or more rows into the windows of many streams (layers x sequences), in place.

    Each row goes into the next slot of its ring; its inner products with the slots in use refresh one row and column of
    the Gram matrix. Nothing is accumulated over time, so there is no drift. A row with NaN or Inf in any layer (or a
    squared norm beyond float32) is skipped in all layers, as a masked row is, and counted.

    Args:
        ring: (L, B, N, D) float32, bfloat16 or float16, contiguous. Last N rows of each layer and sequence, N <= 128.
        gram: (L, B, N, N) float32, contiguous. Gram matrix of each ring, in the order of its slots.
        seen: (B, 3) int64, contiguous. Per sequence: rows accepted, rows rejected as not finite, and the slot of the
            row offered last (-1 if it was skipped).
        rows: one tensor per layer, (B, D) or (B, T, D), the ring's dtype and device, any strides.
        mask: (B,) or (B, T) bool; rows where it is False are skipped.
        backend: "cpu", "cuda", "triton" or "reference" instead of the automatic choice.

    Raises:
        ShapeError, DtypeError, DeviceError: on bad arguments, before anything is written.
        RangeError: if `seen`, on the CPU, counts fewer than no rows.
        BackendError: if `backend` is missing.

    Source: EigenTrack (arXiv 2509.15735) section III-A gives the window; the Gram form is ours.
    """
    if torch.is_grad_enabled() and any(row.requires_grad for row in rows):
        rows = [row.detach() for row in rows]
    selected = select("window_push_", ring.device, backend)
    if selected == "reference":
        check_push(ring, gram, seen, rows, mask)
        reference.window_push_ref_(ring, gram, seen, list(rows), mask)
        return
    try:
        (triton.window_push_ if selected == "triton" else _PUSH_OP)(ring, gram, seen, rows, mask)
    except RuntimeError:  # the kernel checks all of it before it writes; here its refusal gets its type
        check_push(ring, gram, seen, rows, mask)
        if seen.is_cpu:  # elsewhere kernels take a negative count for a row that is skipped: nothing waits for it
            check_counts(seen[:, 0])
        raise


def window_gram(
    hidden: Tensor, window: int, stride: int = 1, mask: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Gram matrices of all windows of whole sequences; each inner product is computed once (T N D work).

    Window w holds what pushing rows 0 .. (w + 1) stride - 1 one by one would leave, slot by slot (on CUDA to rounding).

    Args:
        hidden: (B, T, D) float32, bfloat16 or float16, any strides.
        window: N, 1 to 128.
        stride: rows from one window to the next.
        mask: (B, T) bool; rows where it is False are skipped, as are rows that are not finite.
        backend: "cpu", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        gram (B, T // stride, N, N) float32, zero in slots not yet in use, and seen (B, T // stride) int64, the rows
        accepted up to the end of each window.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: as `window_push_`.
    """
    check_gram(hidden, window, stride, mask)
    selected = select("window_gram", hidden.device, backend)
    if selected == "reference":
        return reference.window_gram_ref(hidden.detach(), window, stride, mask)
    if selected == "triton":
        return triton.window_gram(hidden.detach(), window, stride, mask)  # type: ignore[no-any-return]
    return torch.ops.rmtkernels.window_gram(hidden.detach(), window, stride, mask)  # type: ignore[no-any-return]


def check_push(ring: Tensor, gram: Tensor, seen: Tensor, rows: Sequence[Tensor], mask: Tensor | None) -> None:
    """Raises ShapeError, DtypeError or DeviceError unless `window_push_` takes these."""
    if ring.dim() != 4 or not ring.is_contiguous():
        raise ShapeError(f"ring must be contiguous (L, B, N, D), got {tuple(ring.shape)}, strides {ring.stride()}")
    layers, batch, window, dim = ring.shape
    check_window(window)
    check_dtype("ring", ring.dtype)
    _check_state("gram", gram, (layers, batch, window, window), torch.float32, ring.device)
    _check_state("seen", seen, (batch, 3), torch.int64, ring.device)
    if len(rows) != layers:
        raise ShapeError(f"rows must hold one tensor for each of the {layers} layers of the ring, got {len(rows)}")
    shape = rows[0].shape if layers else torch.Size((batch, dim))
    if len(shape) not in (2, 3) or shape[0] != batch or shape[-1] != dim:
        raise ShapeError(f"rows must be ({batch}, {dim}) or ({batch}, T, {dim}) each, got {tuple(shape)}")
    for row in rows:
        if row.shape != shape:
            raise ShapeError(f"rows must all have one shape, got {tuple(shape)} and {tuple(row.shape)}")
        if row.dtype != ring.dtype:
            raise DtypeError(f"rows must have the ring's dtype {ring.dtype}, got {row.dtype}")
        if row.device != ring.device:
            raise DeviceError(f"rows must be on the ring's device {ring.device}, got {row.device}")
    if mask is not None:
        _check_mask(mask, tuple(shape[:-1]), ring.device)


def check_gram(hidden: Tensor, window: int, stride: int, mask: Tensor | None) -> None:
    """Raises ShapeError, DtypeError or DeviceError unless `window_gram` takes these."""
    if hidden.dim() != 3:
        raise ShapeError(f"hidden must be (B, T, D), got {tuple(hidden.shape)}")
    check_window(window)
    if stride < 1:
        raise ShapeError(f"stride must be at least 1, got {stride}")
    check_dtype("hidden", hidden.dtype)
    if mask is not None:
        _check_mask(mask, tuple(hidden.shape[:2]), hidden.device)


def check_counts(counts: Tensor) -> None:
    """Raises RangeError unless rows can have been counted so. Reads the tensor."""
    if not ((counts >= 0) & (counts < 2**62)).all():
        raise RangeError(f"seen must count rows from 0 on, got {int(counts.min())} to {int(counts.max())}")


def check_window(window: int) -> None:
    """Raises ShapeError unless a window may have this length."""
    if not 1 <= window <= MAX_WINDOW:
        raise ShapeError(f"window must be 1 to {MAX_WINDOW}, got {window}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises DtypeError unless activations may have this dtype."""
    if dtype not in ACTIVATION_DTYPES:
        raise DtypeError(f"{name} must be float32, bfloat16 or float16, got {dtype}")


def _check_state(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ShapeError(f"{name} must be contiguous {shape}, got {tuple(tensor.shape)}, strides {tensor.stride()}")
    if tensor.dtype != dtype:
        raise DtypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise DeviceError(f"{name} must be on {device}, got {tensor.device}")


def _check_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if mask.shape != shape:
        raise ShapeError(f"mask must be {shape}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        raise DtypeError(f"mask must be bool, got {mask.dtype}")
    if mask.device != device:
        raise DeviceError(f"mask must be on {device}, got {mask.device}")
