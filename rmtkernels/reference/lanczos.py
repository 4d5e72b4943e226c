"""Float64 oracle of lanczos: the dense eigenproblem."""

import torch
from torch import Tensor


def lanczos_multiply_ref(matrix: Tensor, block: Tensor) -> Tensor:
    """Rows (A v)' for the rows v' of the block, float64."""
    return block.double() @ matrix.double().mT


def lanczos_multiply_gram_ref(samples: Tensor, mean: Tensor | None, block: Tensor) -> Tensor:
    """Rows (Y'Y v)' for the rows v' of the block, Y the samples less their mean (its two parts), float64."""
    centred = samples.double() if mean is None else samples.double() - mean.double().sum(0)
    return block.double() @ centred.mT @ centred


def lanczos_orthonormalize_ref(rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit, triangle and products of rows = products @ basis + triangle.T @ unit, for rows that are independent.

    The triangle's diagonal is positive, which makes all three unique.
    """
    rows, basis = rows.double(), basis.double()
    products = rows @ basis.mT
    unit, triangle = torch.linalg.qr((rows - products @ basis).mT)
    signs = triangle.diagonal().sign()
    return (unit * signs).mT, triangle * signs[:, None], products


def lanczos_matrix_ref(matrix: Tensor, gram: bool = False, center: bool = False) -> Tensor:
    """The symmetric matrix itself, float64."""
    if not gram:
        return matrix.double()
    samples = matrix.double()
    centred = samples - samples.mean(0) if center else samples
    return centred.mT @ centred


def lanczos_eigh_ref(matrix: Tensor, k: int, *, gram: bool = False, center: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, descending, and their eigenvectors (d, k)."""
    eigenvalues, vectors = torch.linalg.eigh(lanczos_matrix_ref(matrix, gram, center))
    return eigenvalues.flip(0)[:k], vectors.flip(1)[:, :k]


def lanczos_density_ref(matrix: Tensor, *, gram: bool = False, center: bool = False) -> tuple[Tensor, Tensor]:
    """The distribution of the eigenvalues itself: all of them, ascending, each with weight 1 / d."""
    eigenvalues = torch.linalg.eigvalsh(lanczos_matrix_ref(matrix, gram, center))
    return eigenvalues, torch.full_like(eigenvalues, 1 / len(eigenvalues))
