"""The products that block Lanczos is made of: a large symmetric matrix, or X'X, times a narrow block of vectors."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from rmtkernels._library import define
from rmtkernels.dispatch import select
from rmtkernels.errors import DeviceError, DtypeError, MatrixError, ShapeError
from rmtkernels.ops import lanczos_multiply_cuda
from rmtkernels.reference import lanczos as reference

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_ASYMMETRIC = 1e-2  # of the products of the first vectors: finer asymmetry shows in the residuals

define("lanczos_multiply(Tensor matrix, Tensor block) -> Tensor")
define("lanczos_multiply_gram(Tensor samples, Tensor? mean, Tensor block) -> Tensor")
torch.library.impl("rmtkernels::lanczos_multiply", "CUDA")(lanczos_multiply_cuda.multiply)
torch.library.impl("rmtkernels::lanczos_multiply_gram", "CUDA")(lanczos_multiply_cuda.multiply_gram)


@torch.library.register_fake("rmtkernels::lanczos_multiply")
def _multiply_fake(matrix: Tensor, block: Tensor) -> Tensor:
    return block.new_empty(block.shape[0], matrix.shape[0])


@torch.library.register_fake("rmtkernels::lanczos_multiply_gram")
def _multiply_gram_fake(samples: Tensor, mean: Tensor | None, block: Tensor) -> Tensor:
    return torch.empty_like(block)


def lanczos_multiply(matrix: Tensor, block: Tensor, *, backend: str | None = None) -> Tensor:
    """Products of a matrix with a few vectors: block @ matrix.T, made for about eight of them.

    Sums are taken in the matrix's dtype over at most 252 products (256 on CUDA), then in float64.

    Args:
        matrix: (rows, cols) float32 or float64.
        block: (vectors, cols) of the same dtype.
        backend: "cpu", "cuda", "triton" (which leaves products to the vendor's library, too) or "reference" instead of
            the automatic choice.

    Returns:
        (vectors, rows). No gradient.

    Raises:
        ShapeError, DtypeError, DeviceError: on bad arguments.
        BackendError: if `backend` is missing.
    """
    check_matrix("matrix", matrix)
    _check_block(matrix, block)
    matrix, block = dense_rows(matrix.detach()), block.detach().contiguous()
    if select("lanczos_multiply", matrix.device, backend) == "reference":
        return reference.lanczos_multiply_ref(matrix, block).to(matrix.dtype)
    return torch.ops.rmtkernels.lanczos_multiply(matrix, block)  # type: ignore[no-any-return]


def lanczos_multiply_gram(
    samples: Tensor, block: Tensor, *, mean: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Products of X'X with a few vectors, without forming it: block @ X.T @ X in one pass over X.

    Args:
        samples: X, (n, d) float32 or float64.
        block: (vectors, d) of the same dtype.
        mean: (d,) float64, subtracted from every row of X first, with its full precision (see `column_mean`).
        backend: "cpu", "cuda", "triton" (which leaves products to the vendor's library, too) or "reference" instead of
            the automatic choice.

    Returns:
        (vectors, d). No gradient.

    Raises:
        ShapeError, DtypeError, DeviceError: on bad arguments.
        BackendError: if `backend` is missing.
    """
    check_matrix("samples", samples)
    _check_block(samples, block)
    if mean is not None and (mean.shape != samples.shape[1:] or mean.dtype != torch.float64):
        raise ShapeError(f"mean must be float64 {tuple(samples.shape[1:])}, got {mean.dtype} {tuple(mean.shape)}")
    samples, block = dense_rows(samples.detach()), block.detach().contiguous()
    parts = None if mean is None else two_parts(mean.detach(), samples.dtype)
    if select("lanczos_multiply_gram", samples.device, backend) == "reference":
        return reference.lanczos_multiply_gram_ref(samples, parts, block).to(samples.dtype)
    return torch.ops.rmtkernels.lanczos_multiply_gram(samples, parts, block)  # type: ignore[no-any-return]


class LinearMap:
    """A symmetric matrix, or X'X, as block Lanczos sees it: something that multiplies rows of vectors."""

    def __init__(self, matrix: Tensor, gram: bool, center: bool, backend: str | None) -> None:
        check_matrix("matrix", matrix)
        if center and not gram:
            raise ShapeError("center=True is for gram=True: a symmetric matrix has no samples to centre")
        if not gram and matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(f"matrix must be square, got {tuple(matrix.shape)}; for X'X of samples X give gram=True")
        if matrix.device.type == "meta":
            raise DeviceError("the eigenvalues of a matrix without data (on the meta device) cannot be found")
        self.backend = select("lanczos_multiply_gram" if gram else "lanczos_multiply", matrix.device, backend)
        self.matrix = dense_rows(matrix.detach())
        self.gram, self.dim, self.dtype, self.device = gram, matrix.shape[1], matrix.dtype, matrix.device
        self.mean = two_parts(column_mean(self.matrix), self.dtype) if center else None

    def __call__(self, block: Tensor) -> Tensor:
        """(vectors, d) -> (vectors, d)."""
        if self.backend == "reference":
            product = (
                reference.lanczos_multiply_gram_ref(self.matrix, self.mean, block)
                if self.gram
                else reference.lanczos_multiply_ref(self.matrix, block)
            )
            return product.to(self.dtype)
        if self.gram:
            return torch.ops.rmtkernels.lanczos_multiply_gram(  # type: ignore[no-any-return]
                self.matrix, self.mean, block
            )
        return torch.ops.rmtkernels.lanczos_multiply(self.matrix, block)  # type: ignore[no-any-return]

    def check_scale(self, scale: float) -> None:
        """Raises MatrixError if eigenvalues up to `scale` do not fit the dtype; only those of a zero matrix are 0.

        Norms are sums of squares in float64: of float64 eigenvalues the squares must fit, and a tolerance's as well.
        """
        limits = torch.finfo(self.dtype)
        least, most = (limits.tiny, limits.max / 2) if self.dtype == torch.float32 else (1e-130, 1e150)
        if not scale < most:
            raise MatrixError("the eigenvalues overflow the matrix's dtype; scale it down")
        if scale < least and (self.matrix if self.mean is None else self.matrix - self.mean[0] - self.mean[1]).any():
            raise MatrixError("the eigenvalues underflow the matrix's dtype; scale it up")


def in_full_precision(
    function: Callable[Concatenate[LinearMap, Parameters], Result],
) -> Callable[Concatenate[LinearMap, Parameters], Result]:
    """Autocast would round the products of a basis with itself to 16 bits, and TensorFloat-32 on CUDA to 10."""

    @functools.wraps(function)
    def wrapped(multiply: LinearMap, /, *arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        products = lanczos_multiply_cuda.full_float32 if multiply.device.type == "cuda" else nullcontext()
        with torch.autocast(multiply.device.type, enabled=False), products:
            return function(multiply, *arguments, **options)

    return wrapped


def column_mean(samples: Tensor, rows: int = 1024) -> Tensor:
    """Mean of the rows in float64, without a float64 copy of them all."""
    total = samples.new_zeros(samples.shape[1], dtype=torch.float64)
    for part in samples.split(rows):
        total += part.double().sum(0)
    return total / samples.shape[0]


def two_parts(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """(2, d): the float64 mean rounded to `dtype`, and what the rounding left."""
    rounded = mean.to(dtype)
    return torch.stack([rounded, (mean - rounded.double()).to(dtype)])


def dense_rows(matrix: Tensor) -> Tensor:
    """The matrix, copied unless the entries of a row lie side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def check_first_product(block: Tensor, image: Tensor) -> None:
    """Raises MatrixError if the product with random vectors shows that the matrix is not finite or not symmetric."""
    products = block.double() @ image.double().mT
    asymmetry = (products - products.mT).norm() - _ASYMMETRIC * products.norm()
    finite, asymmetric = torch.stack([image.isfinite().all(), asymmetry > 0]).tolist()
    if not finite:
        raise MatrixError("the matrix has an entry that is NaN, infinite, or so large that products overflow")
    if asymmetric:
        raise MatrixError("the matrix is not symmetric; for X'X of samples X give gram=True")


def check_matrix(name: str, matrix: Tensor) -> None:
    """Raises ShapeError or DtypeError unless it is a float32 or float64 matrix with an entry."""
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ShapeError(f"{name} must have two dimensions, none of them 0, got {tuple(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"{name} must be float32 or float64, got {matrix.dtype}")


def _check_block(matrix: Tensor, block: Tensor) -> None:
    if block.dim() != 2 or block.shape[1] != matrix.shape[1]:
        raise ShapeError(f"block must be (vectors, {matrix.shape[1]}), got {tuple(block.shape)}")
    if block.dtype != matrix.dtype:
        raise DtypeError(f"block must have the matrix's dtype {matrix.dtype}, got {block.dtype}")
    if block.device != matrix.device:
        raise DeviceError(f"block must be on the matrix's device {matrix.device}, got {block.device}")
