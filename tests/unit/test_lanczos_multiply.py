"""lanczos: the products with a block of vectors against float64, for odd shapes and both instruction sets."""

import pytest
import torch

from rmtkernels import lanczos_multiply, lanczos_multiply_gram
from rmtkernels.ops.lanczos_multiply import column_mean, two_parts
from rmtkernels.reference import lanczos_multiply_gram_ref, lanczos_multiply_ref
from tests.helpers import normal, same_bits

ROUNDING = {torch.float32: 3e-7, torch.float64: 1e-15}
SIZES = [(1, 1), (2, 3), (12, 8), (13, 251), (25, 252), (30, 253), (300, 505), (1009, 17)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("vectors", [0, 1, 7, 8, 9, 20])
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_products(rows: int, cols: int, vectors: int, dtype: torch.dtype, isa: str, nan_memory: None) -> None:
    matrix, block = normal(rows, cols, dtype=dtype), normal(vectors, cols, seed=1, dtype=dtype)
    bound = block.double().abs() @ matrix.double().abs().mT
    got = lanczos_multiply(matrix, block)
    assert got.shape == (vectors, rows) and got.dtype == dtype
    assert ((got - lanczos_multiply_ref(matrix, block)).abs() <= ROUNDING[dtype] * bound).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("vectors", [1, 8, 11])
@pytest.mark.parametrize("offset", [None, 0.0, 1e4])
@pytest.mark.parametrize(("rows", "cols"), [*SIZES, (3 * 1008 + 5, 9), (20000, 2)])
def test_gram_products(
    rows: int, cols: int, offset: float | None, vectors: int, dtype: torch.dtype, isa: str, nan_memory: None
) -> None:
    samples, block = normal(rows, cols, dtype=dtype) + (offset or 0.0), normal(vectors, cols, seed=1, dtype=dtype)
    mean = None if offset is None else column_mean(samples)
    centred = (samples.double() if mean is None else samples.double() - mean).abs()
    bound = block.double().abs() @ centred.mT @ centred
    parts = None if mean is None else two_parts(mean, torch.float64)
    got = lanczos_multiply_gram(samples, block, mean=mean)
    want = lanczos_multiply_gram_ref(samples, parts, block)
    slack = 1e-11 if offset == 1e4 and dtype == torch.float64 else 0.0  # float64 holds the mean itself to 1e-12
    assert got.shape == (vectors, cols) and got.dtype == dtype
    oracle = 6e-17 * rows**0.5  # its own sums: off by 6e-15 at 20000 rows, the kernel's by 2e-16 (in long double)
    assert ((got - want).abs() <= (2 * ROUNDING[dtype] + oracle + slack) * bound + slack * rows).all()


def test_layouts_do_not_change_a_bit() -> None:
    matrix, block = normal(40, 60), normal(8, 60, seed=1)
    for multiply in (lanczos_multiply, lanczos_multiply_gram):
        want = multiply(matrix, block)
        padded = torch.full((40, 70), torch.nan)
        padded[:, 3:63] = matrix
        assert same_bits(multiply(padded[:, 3:63], block), want)
        assert same_bits(multiply(matrix.mT.contiguous().mT, block.mT.contiguous().mT), want)


def test_a_vector_gives_the_same_bits_alone() -> None:
    matrix, block = normal(50, 700), normal(11, 700, seed=1)
    for multiply in (lanczos_multiply, lanczos_multiply_gram):
        together = multiply(matrix, block)
        assert all(same_bits(multiply(matrix, block[i : i + 1]), together[i : i + 1]) for i in range(11))


def test_no_gradient() -> None:
    assert not lanczos_multiply(normal(4, 4).requires_grad_(), normal(2, 4)).requires_grad
