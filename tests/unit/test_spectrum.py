"""spectrum_eigvalsh against LAPACK in float64 and known spectra, on matrices chosen to break it."""

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rmtkernels import DtypeError, ShapeError, spectrum_eigvalsh
from tests.helpers import normal, same_bits

pytestmark = pytest.mark.usefixtures("isa", "nan_memory")

DOUBLE = torch.float64


def assert_accurate(values: Tensor, exact: Tensor) -> None:
    """Ascending, and within a few float64 roundings of the largest eigenvalue (and one of the result's dtype)."""
    assert (values.diff(dim=-1) >= 0).all()
    largest = exact.abs().amax(-1, keepdim=True)
    bound = 2e-15 * largest * exact.shape[-1] ** 0.5
    if values.dtype == torch.float32:
        bound = bound + 2.0**-24 * exact.abs() + 2.0**-150
    assert ((values.double() - exact).abs() <= bound).all()


def lapack(matrices: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.eigvalsh(matrices.double().numpy()))


def symmetric(*shape: int, seed: int = 0) -> Tensor:
    x = normal(*shape, shape[-1], seed=seed, dtype=DOUBLE)
    return x + x.mT


def tridiagonal(diagonal: Tensor, below: Tensor) -> Tensor:
    return diagonal.diag_embed() + below.diag_embed(1) + below.diag_embed(-1)


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed, dtype=DOUBLE))[0]
    x = q * eigenvalues @ q.T
    return (x + x.T) / 2


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_every_size_agrees_with_lapack(dtype: torch.dtype) -> None:
    for n in range(1, 129):
        full = symmetric(3, n, seed=n)
        thin = normal(3, n, max(1, n // 3), seed=n, dtype=DOUBLE)
        matrices = torch.cat([full, thin @ thin.mT]).to(dtype)
        values = spectrum_eigvalsh(matrices)
        assert values.dtype == dtype
        assert_accurate(values, lapack(matrices))


def graded(n: int, decades: float, order: str) -> Tensor:
    """Positive definite, diagonally dominant, with a diagonal falling over many decades in the given order."""
    scale = 10.0 ** (-decades * torch.arange(n, dtype=DOUBLE) / max(n - 1, 1))
    scale = {"down": scale, "up": scale.flip(0), "valley": torch.cat([scale[::2], scale[1::2].flip(0)])}[order]
    return scale.sqrt()[:, None] * (torch.eye(n, dtype=DOUBLE) + symmetric(n, seed=n) / (20 * n)) * scale.sqrt()


def block_diagonal(n: int) -> Tensor:
    blocks = torch.zeros(n, n, dtype=DOUBLE)
    for first in range(0, n, 3):
        size = min(3, n - first)
        blocks[first : first + size, first : first + size] = symmetric(size, seed=first)
    return blocks


FAMILIES: dict[str, Callable[[int], Tensor]] = {
    "zero": lambda n: torch.zeros(n, n, dtype=DOUBLE),
    "identity": lambda n: torch.eye(n, dtype=DOUBLE),
    "ones": lambda n: torch.ones(n, n, dtype=DOUBLE),
    "diagonal": lambda n: torch.diag(normal(n, dtype=DOUBLE)),
    "rank one": lambda n: torch.outer(normal(n, dtype=DOUBLE), normal(n, dtype=DOUBLE)),
    "negative definite": lambda n: -symmetric(n) @ symmetric(n),
    "arrow": lambda n: torch.cat([torch.eye(n, dtype=DOUBLE)[:-1], torch.ones(1, n, dtype=DOUBLE)]),
    "Hilbert": lambda n: 1 / (torch.arange(n, dtype=DOUBLE)[:, None] + torch.arange(n, dtype=DOUBLE) + 1),
    "exchange": lambda n: torch.eye(n, dtype=DOUBLE).flip(0),
    "cyclic": lambda n: torch.eye(n, dtype=DOUBLE).roll(1, 0) + torch.eye(n, dtype=DOUBLE).roll(-1, 0),
    "block diagonal": block_diagonal,
    "repeated": lambda n: rotated(1.0 + (torch.arange(n, dtype=DOUBLE) % 2)),
    "clustered": lambda n: rotated(1.0 + 1e-13 * torch.arange(n, dtype=DOUBLE)),
    "two far clusters": lambda n: rotated(torch.where(torch.arange(n) % 2 == 0, 1.0, 1e-9).double()),
    "geometric": lambda n: rotated(10.0 ** (-12 * torch.arange(n, dtype=DOUBLE) / n)),
    "graded down": lambda n: graded(n, 12, "down"),
    "graded up": lambda n: graded(n, 12, "up"),
    "graded valley": lambda n: graded(n, 12, "valley"),
    "graded over 200 decades": lambda n: graded(n, 200, "down"),
    "graded up 200 decades": lambda n: graded(n, 200, "up"),
    "entries of any size": lambda n: symmetric(n) * 10.0 ** (-150 * torch.sin(symmetric(n, seed=3)).abs()),
    "small integers": lambda n: (3 * normal(n, n, dtype=DOUBLE)).round().tril(),
    "Wilkinson W+": lambda n: tridiagonal(
        (torch.arange(n, dtype=DOUBLE) - n // 2).abs(), torch.ones(n - 1, dtype=DOUBLE)
    ),
    "zero diagonal": lambda n: tridiagonal(torch.zeros(n, dtype=DOUBLE), normal(n - 1, dtype=DOUBLE).exp()),
    "underflowing couplings": lambda n: tridiagonal(
        torch.ones(n, dtype=DOUBLE), 10.0 ** (-9.0 * torch.arange(n - 1).double())
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_families(family: str) -> None:
    for n in (1, 2, 3, 4, 5, 7, 8, 13, 21, 32, 33, 64, 127):
        matrix = FAMILIES[family](n)
        exact = lapack(matrix)
        assert_accurate(spectrum_eigvalsh(matrix), exact)


def test_a_tail_far_below_its_head_is_still_eliminated() -> None:
    """An entry 1e-9 beside a 1 vanishes in their column's norm, and moves eigenvalues by 1e-9 all the same."""
    for tail in (1e-5, 1e-7, 1e-8, 3e-9, 1e-9, 1e-11, 1e-13):
        corner = torch.tensor([[0.0, 1.0, tail], [1.0, 0.0, 1.0], [tail, 1.0, 0.0]], dtype=DOUBLE)
        assert_accurate(spectrum_eigvalsh(corner), lapack(corner))
        path = tridiagonal(torch.zeros(40, dtype=DOUBLE), torch.ones(39, dtype=DOUBLE))
        assert_accurate(spectrum_eigvalsh(path + tail * symmetric(40)), lapack(path + tail * symmetric(40)))


def test_toeplitz_tridiagonal_closed_form() -> None:
    for n in (2, 10, 21, 100, 128):
        matrix = tridiagonal(torch.full((n,), 2.0, dtype=DOUBLE), torch.full((n - 1,), -1.0, dtype=DOUBLE))
        k = torch.arange(1, n + 1, dtype=DOUBLE)
        assert_accurate(spectrum_eigvalsh(matrix), 2 - 2 * torch.cos(torch.pi * k / (n + 1)))


@pytest.mark.parametrize("n", [12, 33])  # the CPU reduces small matrices side by side, larger ones alone
@pytest.mark.parametrize("order", ["down", "up", "valley"])
def test_small_eigenvalues_of_a_graded_matrix_against_50_digits(order: str, n: int) -> None:
    matrix = graded(n, 10, order)
    with mpmath.workdps(50):
        exact = mpmath.eigsy(mpmath.matrix(matrix.tolist()), eigvals_only=True)
        exact = torch.tensor(sorted(float(value) for value in exact), dtype=DOUBLE)
    values = spectrum_eigvalsh(matrix)
    assert_accurate(values, exact)
    assert ((values - exact).abs() <= 1e-11 * exact).all()  # LAPACK loses seven digits more in two of the orders


@pytest.mark.parametrize("exponent", [-1040, -1000, -500, -100, 100, 500, 1000])
def test_a_power_of_two_scales_the_result_exactly(exponent: int) -> None:
    matrices = symmetric(5, 24)
    scaled = torch.ldexp(matrices, torch.tensor(float(exponent)).double())
    subnormal = exponent < -1000  # digits are lost on the way in
    want = torch.ldexp(spectrum_eigvalsh(matrices), torch.tensor(float(exponent)).double())
    values = spectrum_eigvalsh(scaled)
    if subnormal:
        assert ((values - want).abs() <= 24 * 2.0**-1074 + 2e-15 * want.abs().amax(-1, keepdim=True)).all()
    else:
        assert_accurate(values, want)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 1e36])
def test_tiny_and_huge_float32(scale: float) -> None:
    matrices = (symmetric(3, 17) * scale).float()
    assert_accurate(spectrum_eigvalsh(matrices), lapack(matrices))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 33])
def test_a_bad_entry_spoils_its_matrix_alone(bad: float, dtype: torch.dtype, n: int) -> None:
    clean = symmetric(11, n).to(dtype)
    want = spectrum_eigvalsh(clean)
    for victim, (i, j) in ((0, (0, 0)), (5, (n - 1, 0)), (10, (n - 1, n - 1))):
        spoilt = clean.clone()
        spoilt[victim, i, j] = bad
        values = spectrum_eigvalsh(spoilt)
        assert values[victim].isnan().all()
        others = [b for b in range(11) if b != victim]
        assert same_bits(values[others], want[others])


def test_only_the_lower_triangle_is_read() -> None:
    matrices = symmetric(6, 19)
    upper = torch.ones(19, 19, dtype=torch.bool).triu(1)
    assert same_bits(spectrum_eigvalsh(matrices.masked_fill(upper, torch.nan)), spectrum_eigvalsh(matrices))


@given(batch=st.integers(1, 17), n=st.sampled_from((1, 3, 8, 21, 32, 50)), seed=st.integers(0, 2**31))
def test_a_matrix_in_a_batch_gives_the_same_bits_alone(batch: int, n: int, seed: int) -> None:
    matrices = symmetric(batch, n, seed=seed)
    matrices[0] = torch.eye(n, dtype=DOUBLE)  # converges at once beside others that do not
    together = spectrum_eigvalsh(matrices)
    assert all(same_bits(spectrum_eigvalsh(matrices[b]), together[b]) for b in range(batch))


def test_threads_and_repetition_do_not_change_a_bit(set_threads: Callable[[int], None]) -> None:
    matrices = symmetric(101, 40)
    results = []
    for threads in (1, 2, 2, 3):
        set_threads(threads)
        results.append(spectrum_eigvalsh(matrices))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(5, 5), (0, 5, 5), (2, 0, 3, 3), (2, 3, 1, 4, 4)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    matrices = symmetric(*shape[:-1])
    values = spectrum_eigvalsh(matrices)
    assert values.shape == shape[:-1]
    assert_accurate(values, lapack(matrices)) if values.numel() else None


def test_layouts_do_not_change_a_bit() -> None:
    matrices = symmetric(4, 9)
    want = spectrum_eigvalsh(matrices)
    strided = torch.full((9, 8, 18), torch.nan, dtype=DOUBLE)
    strided[:, ::2, ::2] = matrices.permute(1, 0, 2)
    assert same_bits(spectrum_eigvalsh(strided[:, ::2, ::2].permute(1, 0, 2)), want)
    assert same_bits(spectrum_eigvalsh(matrices.mT), want)
    assert same_bits(spectrum_eigvalsh(matrices[:1].expand(3, 9, 9)), want[:1].expand(3, 9))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_carries_no_gradient_and_leaves_its_input(backend: str) -> None:
    matrices = symmetric(2, 6).requires_grad_()
    before = matrices.detach().clone()
    assert not spectrum_eigvalsh(matrices, backend=backend).requires_grad
    assert same_bits(matrices.detach(), before)


@pytest.mark.parametrize(
    ("error", "matrices"),
    [
        (ShapeError, torch.zeros(4)),
        (ShapeError, torch.tensor(1.0)),
        (ShapeError, torch.zeros(3, 4)),
        (ShapeError, torch.zeros(2, 0, 0)),
        (ShapeError, torch.zeros(129, 129)),
        (DtypeError, torch.zeros(3, 3, dtype=torch.bfloat16)),
        (DtypeError, torch.zeros(3, 3, dtype=torch.int64)),
        (DtypeError, torch.zeros(3, 3, dtype=torch.complex64)),
    ],
)
def test_mistakes_are_named(error: type[Exception], matrices: Tensor) -> None:
    with pytest.raises(error):
        spectrum_eigvalsh(matrices)
    with pytest.raises(RuntimeError):
        torch.ops.rmtkernels.spectrum_eigvalsh(matrices)
