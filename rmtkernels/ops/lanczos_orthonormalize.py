"""The next block of a Krylov basis: rows made orthonormal, and orthogonal to the basis."""

from typing import NamedTuple

import torch
from torch import Tensor

from rmtkernels._library import define
from rmtkernels.triton import operators as triton


class Orthonormal(NamedTuple):
    """rows = products @ basis + triangle.T @ unit.

    Attributes:
        unit: (vectors, d), no more vectors than there is room for beside the basis.
        triangle: (vectors, vectors) upper triangular; or zeros (1, vectors), if there is no room.
        products: (vectors, size), rows times basis.
    """

    unit: Tensor
    triangle: Tensor
    products: Tensor


define(
    "lanczos_orthonormalize(Tensor rows, Tensor basis, Tensor noise, Tensor negligible, int shift)"
    " -> (Tensor unit, Tensor triangle, Tensor products)"
)


@torch.library.register_fake("rmtkernels::lanczos_orthonormalize")
def _fake(rows: Tensor, basis: Tensor, noise: Tensor, negligible: Tensor, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    (count, dim), size, double = rows.shape, basis.shape[0], torch.float64
    unit = rows.new_empty(torch.sym_min(count, dim - size), dim)
    return unit, rows.new_empty(count, count, dtype=double), rows.new_empty(count, size, dtype=double)


def orthonormalize(
    rows: Tensor, basis: Tensor, noise: Tensor, negligible: Tensor, shift: int, backend: str
) -> Orthonormal:
    """Orthonormal rows, orthogonal to the basis, that with it span the given ones. Nothing waits for the device.

    Args:
        rows: (vectors, d) float32 or float64, contiguous.
        basis: (size, d), orthonormal rows.
        noise: (vectors or more, d), random rows of norm about 1, of use after `roll(shift, 1)`.
        negligible: () float64. A row of which no more is new gives way to a random one.
        backend: "cuda" or "triton" for their kernels, in two passes over the basis; else PyTorch's products and QR, in
            four.
    """
    room = rows.shape[1] - len(basis)
    if room == 0:
        return Orthonormal(rows[:0], rows.new_zeros(1, len(rows)), rows @ basis.mT)
    if backend == "cuda":
        return Orthonormal(*torch.ops.rmtkernels.lanczos_orthonormalize(rows, basis, noise, negligible, shift))
    if backend == "triton":
        return Orthonormal(*triton.lanczos_orthonormalize(rows, basis, noise, negligible, shift))
    return _by_qr(rows, basis, noise.roll(shift, 1), negligible, room)


def _by_qr(rows: Tensor, basis: Tensor, random: Tensor, negligible: Tensor, room: int) -> Orthonormal:
    products = rows @ basis.mT
    rows = torch.addmm(rows, products, basis, alpha=-1)
    triangle = torch.linalg.qr(rows.mT, mode="r").R
    gone = triangle.diagonal()[:, None].abs() <= negligible
    mixing = torch.where(gone, 0, triangle.mT) + gone.to(rows).flatten().diag()
    unit = torch.linalg.solve_triangular(mixing, torch.where(gone, random[: len(rows)], rows), upper=False)[:room]
    for _ in range(1 if 2 * len(basis) < rows.shape[1] else 3):  # near the end little is left of a random row
        unit = torch.linalg.qr(torch.addmm(unit, unit @ basis.mT, basis, alpha=-1).mT)[0].mT
    return Orthonormal(unit, triangle, products)
