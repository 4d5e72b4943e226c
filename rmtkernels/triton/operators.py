"""The Triton forms of the operators: schemas, fake kernels, autograd. Triton is imported when a kernel first runs."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rmtkernels._library import LIBRARY, define
from rmtkernels.errors import DeviceError
from rmtkernels.triton import DEVICE_TYPES


def _implement(form: str, slice_name: str, launcher: str) -> Callable[..., Any]:
    """Registers a launcher, which is imported at its first call, and returns the operator."""

    def launch(*arguments: Any) -> Any:
        module = importlib.import_module(f"rmtkernels.triton.{slice_name}")
        with torch.cuda.device_of(arguments[0]):
            return getattr(module, launcher)(*arguments)

    for device_type in DEVICE_TYPES:
        LIBRARY.impl(form, launch, device_type.upper())
    operator: Callable[..., Any] = getattr(torch.ops.rmtkernels, form).default
    return operator


def _same_device(first: Tensor, *others: Tensor | None) -> None:
    """Raises DeviceError: one tensor without data brings the whole call to the fake kernel."""
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise DeviceError(f"all tensors must be on {first.device}, got {tensor.device}")


# keep_hidden: also return x downᵀ, which the gradient of `up` needs.
define("lowrank_linear_triton(Tensor x, Tensor down, Tensor up, Tensor? bias, bool keep_hidden) -> (Tensor, Tensor)")
lowrank_linear = _implement("lowrank_linear_triton", "lowrank_linear", "lowrank_linear")


@torch.library.register_fake("rmtkernels::lowrank_linear_triton")
def _lowrank_linear_fake(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    _same_device(x, down, up, bias)
    compute = x.dtype if x.dtype == down.dtype else torch.float32
    hidden = x.new_empty((x.shape[:-1].numel(), down.shape[0]) if keep_hidden else (0,), dtype=compute)
    return x.new_empty((*x.shape[:-1], up.shape[0])), hidden


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, down, up, _, kept = inputs
    ctx.save_for_backward(x, down, up, output[1] if kept else None)
    ctx.set_materialize_grads(False)


def _lowrank_linear_backward(ctx: Any, dy: Tensor | None, dhidden: Tensor | None) -> tuple[Tensor | None, ...]:
    """dx by the same kernel, whose own intermediate dy up gives the gradient of `down`; weights by a product each."""
    x, down, up, hidden = ctx.saved_tensors
    wants_x, wants_down, wants_up, wants_bias, _ = ctx.needs_input_grad
    compute = x.dtype if x.dtype == down.dtype else torch.float32
    dx = ddown = dup = dbias = between = None
    dhidden = None if hidden is None else dhidden  # empty
    if dy is not None and dhidden is None and wants_x:
        dx, between = lowrank_linear(dy, up.T, down.T, None, wants_down)
    else:
        if dy is not None:
            between = dy.reshape(-1, len(up)).to(compute) @ up.to(compute)
        if dhidden is not None:  # second derivatives
            between = dhidden if between is None else between + dhidden
        if wants_x and between is not None:
            dx = (between @ down.to(compute)).to(x.dtype).reshape(x.shape)
    flat = x.reshape(-1, down.shape[1]).to(compute)
    if wants_down and between is not None:
        ddown = (between.T @ flat).to(down.dtype)
    if dy is not None:
        rows = dy.reshape(-1, len(up))
        if wants_up:
            hidden = functional.linear(flat, down.to(compute)) if hidden is None else hidden
            dup = (rows.to(compute).T @ hidden).to(up.dtype)
        if wants_bias:
            dbias = rows.sum(0, dtype=torch.float32).to(up.dtype)
    return dx, ddown, dup, dbias, None


torch.library.register_autograd(
    "rmtkernels::lowrank_linear_triton", _lowrank_linear_backward, setup_context=_save_for_backward
)


def _lowrank_linear_autocast(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    """As two `linear` under autocast: everything in its dtype."""
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        narrow = (None if tensor is None else tensor.to(dtype) for tensor in (x, down, up, bias))
        result: tuple[Tensor, Tensor] = lowrank_linear(*narrow, keep_hidden)
    return result


for device_type in DEVICE_TYPES:
    LIBRARY.impl("lowrank_linear_triton", _lowrank_linear_autocast, f"Autocast{device_type.upper()}")


@torch.library.register_vmap("rmtkernels::lowrank_linear_triton")
def _lowrank_linear_vmap(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """One call for each of the batch."""
    batched = list(zip(arguments, in_dims, strict=True))
    calls = [
        lowrank_linear(*(value if dim is None else value.select(dim, i) for value, dim in batched))
        for i in range(info.batch_size)
    ]
    y, hidden = (torch.stack(results) for results in zip(*calls, strict=True))
    return (y, hidden), (0, 0)


define("spectrum_eigvalsh_triton(Tensor matrices) -> Tensor")
spectrum_eigvalsh = _implement("spectrum_eigvalsh_triton", "spectrum", "spectrum_eigvalsh")


@torch.library.register_fake("rmtkernels::spectrum_eigvalsh_triton")
def _spectrum_eigvalsh_fake(matrices: Tensor) -> Tensor:
    return matrices.new_empty(matrices.shape[:-1])


define(
    "spectrum_descriptors_triton_(Tensor(a!) descriptors, Tensor(b!) eigenvalues, Tensor gram, Tensor seen, "
    "Tensor laws, int dim, bool center, int joint, bool normalize, int noise) -> ()"
)
spectrum_descriptors_ = _implement("spectrum_descriptors_triton_", "spectrum_descriptors", "spectrum_descriptors_")


@torch.library.register_fake("rmtkernels::spectrum_descriptors_triton_")
def _spectrum_descriptors_fake(
    descriptors: Tensor,
    eigenvalues: Tensor,
    gram: Tensor,
    seen: Tensor,
    laws: Tensor,
    dim: int,
    center: bool,
    joint: int,
    normalize: bool,
    noise: int,
) -> None:
    _same_device(gram, descriptors, eigenvalues, seen, laws)


define("window_push_triton_(Tensor(a!) ring, Tensor(b!) gram, Tensor(c!) seen, Tensor[] rows, Tensor? mask) -> ()")
window_push_ = _implement("window_push_triton_", "sliding_window", "window_push_")


@torch.library.register_fake("rmtkernels::window_push_triton_")
def _window_push_fake(ring: Tensor, gram: Tensor, seen: Tensor, rows: list[Tensor], mask: Tensor | None) -> None:
    _same_device(ring, gram, seen, *rows, mask)


define("window_gram_triton(Tensor hidden, int window, int stride=1, Tensor? mask=None) -> (Tensor, Tensor)")
window_gram = _implement("window_gram_triton", "sliding_window_gram", "window_gram")


@torch.library.register_fake("rmtkernels::window_gram_triton")
def _window_gram_fake(
    hidden: Tensor, window: int, stride: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _same_device(hidden, mask)
    batch, windows = hidden.shape[0], hidden.shape[1] // stride
    gram = hidden.new_empty((batch, windows, window, window), dtype=torch.float32)
    return gram, hidden.new_empty((batch, windows), dtype=torch.int64)


define(
    "covariance_update_triton_(Tensor(a!) mean, Tensor(b!) scatter, Tensor(c!) totals, Tensor batch, Tensor? weights, "
    "Tensor? mask, float decay) -> ()"
)
covariance_update_ = _implement("covariance_update_triton_", "covariance", "covariance_update_")


@torch.library.register_fake("rmtkernels::covariance_update_triton_")
def _covariance_update_fake(
    mean: Tensor,
    scatter: Tensor,
    totals: Tensor,
    batch: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    decay: float,
) -> None:
    _same_device(mean, scatter, totals, batch, weights, mask)


define(
    "lanczos_orthonormalize_triton(Tensor rows, Tensor basis, Tensor noise, Tensor negligible, int shift)"
    " -> (Tensor unit, Tensor triangle, Tensor products)"
)
lanczos_orthonormalize = _implement("lanczos_orthonormalize_triton", "lanczos", "lanczos_orthonormalize")


@torch.library.register_fake("rmtkernels::lanczos_orthonormalize_triton")
def _lanczos_orthonormalize_fake(
    rows: Tensor, basis: Tensor, noise: Tensor, negligible: Tensor, shift: int
) -> tuple[Tensor, Tensor, Tensor]:
    _same_device(rows, basis, noise, negligible)
    (count, dim), size, double = rows.shape, basis.shape[0], torch.float64
    unit = rows.new_empty(torch.sym_min(count, dim - size), dim)
    return unit, rows.new_empty(count, count, dtype=double), rows.new_empty(count, size, dtype=double)
