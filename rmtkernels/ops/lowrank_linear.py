"""lowrank_linear: a linear layer whose weight is the product of two thin matrices, in one pass over both."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from rmtkernels._library import LIBRARY, define
from rmtkernels.dispatch import choice, cpu_is_automatic, has_kernel, select
from rmtkernels.errors import BackendError, DeviceError, DtypeError, ShapeError
from rmtkernels.reference.lowrank_linear import lowrank_linear_ref
from rmtkernels.triton import operators as triton

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
OTHER_DTYPES = (torch.float64, torch.float16)
# Beyond these PyTorch's two products are no slower: docs/conventions.md says how that was measured.
MAX_ROWS, MAX_ELEMENTS = 16, 1024  # elements are asked for first: the width of x costs twice as much to learn
MAX_ROWS_BFLOAT16, MAX_PRODUCTS_BFLOAT16 = 4, 2**20
# On CUDA; where all is bfloat16 or all float16, up to two rows, or four with no more weights than this.
MAX_ROWS_CUDA, MAX_ROWS_CUDA_HALF, MAX_WEIGHTS_CUDA_HALF = 16, 2, 2**21
# The Triton kernel is faster than two products (1.05 to 1.1 times; H100, measured) where all is bfloat16, up to this
# rank and from so many rows on.
MAX_RANK_TRITON, MIN_ROWS_TRITON = 64, 2**15

define("lowrank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias=None) -> Tensor")
_OP = torch.ops.rmtkernels.lowrank_linear.default  # looked up once: this runs in every layer at every token


@torch.library.register_fake("rmtkernels::lowrank_linear")
def _lowrank_linear_fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    check(x, down, up, bias)
    return x.new_empty((*x.shape[:-1], up.shape[0]))


def lowrank_linear(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """`(x @ down.T) @ up.T + bias`: two `torch.nn.functional.linear` in one pass over the weights.

    The compiled kernel runs where no derivative is wanted (grad mode is off, or nothing requires a gradient) and the
    batch is small, as in decoding. Everywhere else this *is* two `linear`: with their gradients of any order, with
    their rules under autocast, at large batches, on devices without a kernel, and in what `torch.export` writes, which
    runs where this package is not installed.

    Args:
        x: (..., d_in) float32 or bfloat16, any strides.
        down: (k, d_in) float32 or bfloat16, whichever x has. Weights that are not contiguous are copied at every call.
        up: (d_out, k) of down's dtype.
        bias: (d_out,) of down's dtype.
        backend: "cpu", "cuda", "triton" or "reference" instead of the automatic choice. "cuda" is the kernel for any
            number of rows; where a derivative is wanted or autocast is on, these still are two `linear`. "triton" is
            the kernel always, with its own derivatives.

    All may be float64, or all float16, too; there is no kernel for float64, and one for float16 on a GPU only.

    Returns:
        (..., d_out) of x's dtype. The kernel keeps the intermediate values in float32, sums in float32, and gives a row
        the same bits whatever rows come with it; docs/conventions.md, *Low-rank linear*, says when the kernel runs.

    Raises:
        ShapeError, DtypeError, DeviceError: on bad arguments.
        BackendError: if `backend` is missing, or is "cuda" or "triton" and the tensors are float64, or is "triton" and
            k is more than 512, or 256 where anything is float32.

    Source: the projected layers of RMT-KD; the operator is ours.
    """
    compute: Callable[..., Tensor]
    any_size = False
    if backend is None and x.is_cpu and cpu_is_automatic("lowrank_linear"):
        compute = _OP
    elif choice(backend) is None and not x.is_cpu:
        compute = _OP if x.is_cuda and has_kernel("lowrank_linear", "cuda") else _two_products
    else:
        selected = select("lowrank_linear", x.device, backend)
        compute = _CHOSEN.get(selected, _OP)
        any_size = selected == "cuda"
        if any_size and x.dtype is torch.float64:
            raise BackendError("lowrank_linear: backend 'cuda' was asked for: it has no kernel for float64")
    try:
        if compute is _OP and (
            (torch.is_grad_enabled() and _requires_grad(x, down, up, bias))
            or forward_ad._current_level >= 0
            or (torch.compiler.is_exporting() and choice(backend) is None)
            or (
                (x.numel() > MAX_ELEMENTS or x.dtype is not torch.float32)
                and not any_size
                and _is_for_two_products(x, down, up)
            )
        ):
            compute = _two_products
        if compute is _two_products and x.is_cuda and choice(backend) is None and _is_for_triton(x, down, up, bias):
            compute = _triton
        return compute(x, down, up, bias)
    except (RuntimeError, IndexError):  # the kernel checks everything; here its refusal gets its type
        check(x, down, up, bias)
        raise


def _requires_grad(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    return x.requires_grad or down.requires_grad or up.requires_grad or (bias is not None and bias.requires_grad)


def _is_for_two_products(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether x has no kernel, or PyTorch's products are no slower; they are if they must convert the weights."""
    if x.is_cuda:
        return _is_for_two_products_on_cuda(x, down, up)
    if x.dtype is torch.float32:
        return down.dtype is torch.float32 and x.numel() > MAX_ROWS * x.shape[-1]
    if x.dtype is not torch.bfloat16:
        return True
    rows = x.numel() // max(x.shape[-1], 1)
    return (
        down.dtype is torch.bfloat16
        and rows > MAX_ROWS_BFLOAT16
        and rows * (down.numel() + up.numel()) > MAX_PRODUCTS_BFLOAT16
    )


def _is_for_two_products_on_cuda(x: Tensor, down: Tensor, up: Tensor) -> bool:
    if x.dtype is torch.float64:
        return True
    rows = x.numel() // max(x.shape[-1], 1)
    if x.dtype is torch.float32 or x.dtype != down.dtype:
        return rows > MAX_ROWS_CUDA
    return rows > MAX_ROWS_CUDA_HALF and (
        rows > 2 * MAX_ROWS_CUDA_HALF or down.numel() + up.numel() > MAX_WEIGHTS_CUDA_HALF
    )


def _is_for_triton(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether the Triton kernel is faster, and what is asked of it is what two `linear` would do."""
    return (
        x.dtype is down.dtype is torch.bfloat16
        and len(down) <= MAX_RANK_TRITON
        and x.numel() >= MIN_ROWS_TRITON * max(x.shape[-1], 1)
        and not (torch.is_grad_enabled() and _requires_grad(x, down, up, bias))
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cuda")
        and has_kernel("lowrank_linear", "triton")
    )


def _triton(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    keep_hidden = torch.is_grad_enabled() and up.requires_grad
    y: Tensor = triton.lowrank_linear(x, down, up, bias, keep_hidden)[0]
    return y


def _two_products(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype == down.dtype or torch.is_autocast_enabled(x.device.type):
        # F.linear refuses most mistakes, but takes whole numbers, one-dimensional weights, a bias to expand, and some
        # tensors without data among others. (All of `check` would cost 1 % at 256 rows.)
        if not (
            (x.dtype in KERNEL_DTYPES or x.dtype in OTHER_DTYPES)
            and down.dim() == up.dim() == 2
            and down.device == up.device == x.device
            and (bias is None or (bias.shape == up.shape[:1] and bias.device == x.device))
        ):
            check(x, down, up, bias)
        return functional.linear(functional.linear(x, down), up, bias)
    check(x, down, up, bias)
    wide = None if bias is None else bias.float()
    return functional.linear(functional.linear(x.float(), down.float()), up.float(), wide).to(x.dtype)


def _reference(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    check(x, down, up, bias)
    return lowrank_linear_ref(x, down, up, bias).to(x.dtype)


_CHOSEN = {"reference": _reference, "triton": _triton}

LIBRARY.impl("lowrank_linear", _two_products, "AutocastCPU")
LIBRARY.impl("lowrank_linear", _two_products, "AutocastCUDA")


@torch.library.register_vmap("rmtkernels::lowrank_linear")
def _lowrank_linear_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Tensor | None) -> tuple[Tensor, int]:
    """A batch of x is more rows; with a batch of weights it is one call for each."""
    batched = list(zip(arguments, in_dims, strict=True))
    x, dim = batched[0]
    if x is not None and dim is not None and all(other is None for other in in_dims[1:]):
        return _OP(x.movedim(dim, 0), *arguments[1:]), 0
    calls = [
        _OP(*(t if t is None or dim is None else t.select(dim, i) for t, dim in batched))
        for i in range(info.batch_size)
    ]
    return torch.stack(calls), 0


def check(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    """Raises ShapeError, DtypeError or DeviceError unless `lowrank_linear` takes these."""
    for name, weight in (("down", down), ("up", up)):
        if weight.dim() != 2:
            raise ShapeError(f"{name} must have two dimensions, got {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != down.shape[1]:
        raise ShapeError(f"x must be (..., d_in) with down (k, d_in), got {tuple(x.shape)} and {tuple(down.shape)}")
    if up.shape[1] != down.shape[0]:
        raise ShapeError(f"up must be (d_out, k) with down (k, d_in), got {tuple(up.shape)} and {tuple(down.shape)}")
    if bias is not None and bias.shape != (up.shape[0],):
        raise ShapeError(f"bias must be ({up.shape[0]},), got {tuple(bias.shape)}")
    if x.dtype not in KERNEL_DTYPES + OTHER_DTYPES:
        raise DtypeError(f"x must be float32, bfloat16, float64 or float16, got {x.dtype}")
    if down.dtype not in (KERNEL_DTYPES if x.dtype in KERNEL_DTYPES else (x.dtype,)):
        raise DtypeError(f"down may not be {down.dtype} where x is {x.dtype}")
    for name, tensor in (("up", up), ("bias", bias)):
        if tensor is not None and tensor.dtype != down.dtype:
            raise DtypeError(f"{name} must have down's dtype {down.dtype}, got {tensor.dtype}")
    for name, tensor in (("down", down), ("up", up), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise DeviceError(f"{name} must be on x's device {x.device}, got {tensor.device}")
