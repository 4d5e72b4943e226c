"""The products of block Lanczos on CUDA, by the vendor's library, in full float32."""

import threading
from types import TracebackType

import torch
from torch import Tensor

SLICE = 256  # products that are added up in the matrix's own type; the sums of slices are float64
CHUNK = 1 << 24  # entries of X at a time: what is centred is a copy


class _FullFloat32:
    """While it is entered, by any thread, float32 products of this process are not rounded to TensorFloat-32.

    PyTorch has one switch for the process. It is touched only where somebody has turned TF32 on; meanwhile the older
    `allow_tf32` cannot be read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._precision: str | None = None

    def __enter__(self) -> None:
        matmul = torch.backends.cuda.matmul
        with self._lock:
            if self._entered == 0 and matmul.fp32_precision == "tf32":
                self._precision, matmul.fp32_precision = "tf32", "ieee"
            self._entered += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._precision is not None:
                torch.backends.cuda.matmul.fp32_precision, self._precision = self._precision, None


full_float32 = _FullFloat32()


def multiply(matrix: Tensor, block: Tensor) -> Tensor:
    """block @ matrix.T, (vectors, rows)."""
    with full_float32:
        return block.new_empty(len(block), len(matrix)).copy_(_products(block, matrix))


def multiply_gram(samples: Tensor, mean: Tensor | None, block: Tensor) -> Tensor:
    """block @ Y.T @ Y, (vectors, d), Y the samples less their mean, which comes in two parts."""
    out = block.new_zeros(block.shape, dtype=torch.float64)
    rows = max(1, CHUNK // (samples.shape[1] * SLICE)) * SLICE
    with full_float32:
        for chunk in samples.split(rows):
            centred = chunk if mean is None else (chunk - mean[0]).sub_(mean[1])
            out += _products(_products(block, centred).to(samples.dtype), centred.mT)
    return out.to(samples.dtype)


def _products(block: Tensor, matrix: Tensor) -> Tensor:
    """block @ matrix.T, summed over slices in the dtype of both, then in float64."""
    (vectors, columns), rows = block.shape, len(matrix)
    slices, rest = divmod(columns, SLICE)
    if slices == 0:
        return (block @ matrix.mT).double()
    left = matrix[:, : slices * SLICE].view(rows, slices, SLICE).transpose(0, 1)
    right = block[:, : slices * SLICE].view(vectors, slices, SLICE).permute(1, 2, 0)
    total = torch.bmm(left, right).sum(0, dtype=torch.float64).mT  # this way round it is faster than one product is
    return total + block[:, -rest:] @ matrix[:, -rest:].mT if rest else total
