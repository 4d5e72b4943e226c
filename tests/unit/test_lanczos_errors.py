"""lanczos: what is refused, and by which error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rmtkernels import (
    DeviceError,
    DtypeError,
    MatrixError,
    ShapeError,
    lanczos_above,
    lanczos_density,
    lanczos_eigh,
    lanczos_multiply,
    lanczos_multiply_gram,
    spike_count,
)
from tests.helpers import normal

OPS = torch.ops.rmtkernels


def symmetric(d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    matrix = normal(d, d, dtype=dtype)
    return matrix + matrix.mT


def spoilt(value: float, row: int = 3, column: int = 7, d: int = 520) -> Tensor:
    matrix = symmetric(d)
    matrix[row, column] = matrix[column, row] = value
    return matrix


CALLS: list[Callable[..., object]] = [
    lambda matrix, **options: lanczos_eigh(matrix, 3, **options),
    lambda matrix, **options: lanczos_above(matrix, 5.0, **options),
    lanczos_density,
    spike_count,
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_entry_that_is_not_finite(call: Callable[..., object], value: float, gram: bool) -> None:
    with pytest.raises(MatrixError, match="NaN, infinite"):
        call(spoilt(value), gram=gram)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("matrix", [normal(520, 520), normal(520, 520).triu(), normal(520, 520).tril(-1)])
def test_a_matrix_that_is_not_symmetric(call: Callable[..., object], matrix: Tensor) -> None:
    with pytest.raises(MatrixError, match="not symmetric"):
        call(matrix)


def test_slight_asymmetry_shows_in_the_residuals() -> None:
    matrix = symmetric(200)
    matrix[3, 7] += 0.2
    result = lanczos_eigh(matrix, 5, max_steps=60)
    true = (matrix.double() @ result.eigenvectors.double() - result.eigenvectors.double() * result.eigenvalues).norm(
        dim=0
    )
    assert not result.complete
    assert torch.allclose(result.residuals * float(result.eigenvalues[0]), true, rtol=0.2)


@pytest.mark.parametrize("scale", [1e-160, 1e-200, 1e-300, 1e155])
def test_float64_eigenvalues_whose_squares_do_not_fit(scale: float) -> None:
    matrix = symmetric(300, torch.float64) * scale
    samples = normal(300, 300, dtype=torch.float64) * scale**0.5
    for call in (lambda: lanczos_eigh(matrix, 5), lambda: lanczos_eigh(samples, 5, gram=True)):
        with pytest.raises(MatrixError, match="scale it"):
            call()
    with pytest.raises(MatrixError, match="scale it"):
        lanczos_above(matrix, 20 * scale)


@pytest.mark.parametrize("scale", [1e-125, 1e-60, 1e140])
def test_float64_eigenvalues_whose_squares_fit(scale: float) -> None:
    matrix = symmetric(300, torch.float64)
    result = lanczos_eigh(matrix * scale, 5)
    want = torch.linalg.eigvalsh(matrix).flip(0)[:5]
    assert result.complete and torch.allclose(result.eigenvalues / scale, want, rtol=1e-9)
    samples = normal(300, 300, dtype=torch.float64) * scale**0.5
    result = lanczos_eigh(samples, 5, gram=True)
    want = torch.linalg.eigvalsh(samples.mT / scale**0.5 @ samples / scale**0.5).flip(0)[:5]
    assert result.complete and torch.allclose(result.eigenvalues / scale, want, rtol=1e-9)


def test_overflow() -> None:
    with pytest.raises(MatrixError, match="overflow"):
        lanczos_eigh(symmetric(300) * 1e37, 4)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scale", [1e-22, 1e-30])
def test_underflow(call: Callable[..., object], center: bool, scale: float) -> None:
    """Of samples whose squares are 0, or keep few digits."""
    samples = normal(520, 520) + 1
    with pytest.raises(MatrixError, match="underflow"):
        call(samples * scale, gram=True, center=center)
    call((samples * scale).double(), gram=True, center=center)
    call(torch.full((30, 520), scale), gram=True, center=True)  # nothing there to underflow


def test_underflow_of_a_matrix() -> None:
    with pytest.raises(MatrixError, match="underflow"):
        lanczos_eigh(symmetric(300) * 1e-42, 4)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ShapeError, lambda: lanczos_eigh(torch.zeros(3), 1)),
        (ShapeError, lambda: lanczos_eigh(torch.zeros(3, 4), 1)),
        (ShapeError, lambda: lanczos_eigh(torch.zeros(0, 0), 1)),
        (ShapeError, lambda: lanczos_eigh(torch.zeros(0, 4), 1, gram=True)),
        (ShapeError, lambda: lanczos_eigh(torch.eye(4), 0)),
        (ShapeError, lambda: lanczos_eigh(torch.eye(4), 5)),
        (ShapeError, lambda: lanczos_eigh(torch.eye(4), 2.0)),  # type: ignore[arg-type]
        (ShapeError, lambda: lanczos_eigh(torch.eye(4), 1, center=True)),
        (ShapeError, lambda: lanczos_eigh(torch.eye(4), 1, tol=0.0)),
        (ShapeError, lambda: lanczos_eigh(torch.eye(4), 1, tol=1e-9)),
        (ShapeError, lambda: lanczos_eigh(torch.eye(4), 1, max_steps=0)),
        (ShapeError, lambda: lanczos_eigh(torch.eye(4), 1, start=torch.ones(3, 1))),
        (DtypeError, lambda: lanczos_eigh(torch.eye(4), 1, start=torch.ones(4, 1).double())),
        (DeviceError, lambda: lanczos_eigh(torch.eye(4), 1, start=torch.ones(4, 1, device="meta"))),
        (MatrixError, lambda: lanczos_eigh(torch.eye(4), 1, start=torch.full((4, 1), torch.nan))),
        (DeviceError, lambda: lanczos_eigh(torch.eye(4, device="meta"), 1)),
        (DtypeError, lambda: lanczos_eigh(torch.eye(4).half(), 1)),
        (DtypeError, lambda: lanczos_eigh(torch.eye(4).cfloat(), 1)),
        (ShapeError, lambda: lanczos_above(torch.eye(4), torch.nan)),
        (ShapeError, lambda: lanczos_density(torch.eye(4), steps=5)),
        (ShapeError, lambda: lanczos_density(torch.eye(4), steps=4, probes=0)),
        (ShapeError, lambda: spike_count(torch.eye(511))),
        (ShapeError, lambda: spike_count(torch.eye(520), level=1.0)),
        (ShapeError, lambda: spike_count(torch.eye(520), probes=2)),
        (ShapeError, lambda: lanczos_multiply(torch.eye(4), torch.ones(2, 3))),
        (DtypeError, lambda: lanczos_multiply(torch.eye(4), torch.ones(2, 4).double())),
        (DeviceError, lambda: lanczos_multiply(torch.eye(4), torch.ones(2, 4, device="meta"))),
        (ShapeError, lambda: lanczos_multiply_gram(torch.eye(4), torch.ones(2, 4), mean=torch.ones(4))),
    ],
)
def test_mistakes_are_named(error: type[Exception], call: Callable[[], object]) -> None:
    with pytest.raises(error):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: OPS.lanczos_multiply(torch.ones(3), torch.ones(2, 3)),
        lambda: OPS.lanczos_multiply(torch.ones(0, 3), torch.ones(2, 3)),
        lambda: OPS.lanczos_multiply(torch.ones(3, 3).half(), torch.ones(2, 3).half()),
        lambda: OPS.lanczos_multiply(torch.ones(3, 3), torch.ones(2, 3).double()),
        lambda: OPS.lanczos_multiply(torch.ones(3, 3), torch.ones(2, 4)),
        lambda: OPS.lanczos_multiply(torch.ones(4, 3).mT, torch.ones(2, 4)),
        lambda: OPS.lanczos_multiply(torch.ones(3, 3), torch.ones(3, 2).mT),
        lambda: OPS.lanczos_multiply_gram(torch.ones(3, 3), torch.ones(3), torch.ones(2, 3)),
        lambda: OPS.lanczos_multiply_gram(torch.ones(3, 3), torch.ones(2, 4), torch.ones(2, 3)),
        lambda: OPS.lanczos_multiply_gram(torch.ones(3, 3), torch.ones(2, 3).double(), torch.ones(2, 3)),
    ],
)
def test_the_kernels_check_before_they_touch_memory(call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError):
        call()
