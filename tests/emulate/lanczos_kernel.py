"""The shipped CUDA kernels of lanczos, run on the CPU, as a function of NumPy arrays."""

import ctypes
from pathlib import Path
from typing import NamedTuple

import numpy as np

MARGIN = 3  # numbers before and after a result, which nothing may touch


class Rows(ctypes.Structure):
    """LanczosRows of csrc/cuda/lanczos.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("rows", "basis", "noise", "negligible")],
        *[(name, ctypes.c_void_p) for name in ("unit", "triangle", "products", "workspace")],
        *[(name, ctypes.c_int64) for name in ("count", "size", "dim", "shift")],
        ("is_double", ctypes.c_bool),
    ]


class Result(NamedTuple):
    """rows = products @ basis + triangle.T @ unit."""

    unit: np.ndarray
    triangle: np.ndarray
    products: np.ndarray


def shifted(values: np.ndarray, elements: int) -> np.ndarray:
    """The same values, `elements` past an address that is a multiple of 64."""
    memory = np.zeros(values.nbytes + 512, np.uint8)
    start = -memory.ctypes.data % 64 + elements * values.itemsize
    view = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    view[...] = values
    return view


class Output:
    """A result full of NaN (or zeros), with margins that must stay as they are."""

    def __init__(self, shape: tuple[int, int], dtype: np.dtype, shift: int, fill: float = np.nan) -> None:
        inner = np.full(shape[0] * shape[1] + 2 * MARGIN, fill, dtype)
        inner[:MARGIN] = inner[inner.size - MARGIN :] = 7.25
        self.memory = shifted(inner, 32 - MARGIN + shift)
        self.values = self.memory[MARGIN : inner.size - MARGIN].reshape(shape)

    def check(self) -> None:
        margins = np.concatenate([self.memory[:MARGIN], self.memory[self.memory.size - MARGIN :]])
        assert (margins == 7.25).all(), "wrote beyond a result"


class Kernel:
    """`rmtkernels_cuda_lanczos_orthonormalize` of a library."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.rmtkernels_cuda_lanczos_workspace.restype = ctypes.c_int64

    def __call__(
        self,
        rows: np.ndarray,
        basis: np.ndarray,
        noise: np.ndarray,
        negligible: float = 0.0,
        shift: int = 0,
        moved: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> Result:
        """`moved`: by how many elements rows, basis, noise and the result are off an aligned address."""
        (count, dim), size = rows.shape, len(basis)
        inputs = [shifted(x, by) for x, by in zip((rows, basis, noise), moved, strict=False)]
        limit = np.array([negligible])
        unit = Output((min(count, dim - size), dim), rows.dtype, moved[3])
        triangle = Output((count, count), np.dtype(np.float64), 0, fill=0.0)
        products = Output((count, size), np.dtype(np.float64), 0)
        needed = self.library.rmtkernels_cuda_lanczos_workspace(*map(ctypes.c_int64, (count, size, dim)))
        workspace = Output((1, needed), np.dtype(np.float64), 0)
        outputs = (unit, triangle, products, workspace)
        error = self.launch(
            Rows(
                *(x.ctypes.data for x in (*inputs, limit)),
                *(x.values.ctypes.data for x in outputs),
                *(count, size, dim, shift),
                rows.dtype == np.float64,
            )
        )
        assert error == 0
        for output in outputs:
            output.check()
        return Result(unit.values, triangle.values, products.values)

    def launch(self, rows: Rows) -> int:
        return self.library.rmtkernels_cuda_lanczos_orthonormalize(ctypes.byref(rows), None)
