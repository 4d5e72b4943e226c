"""The shipped CUDA kernels of lanczos, run on the CPU, against the float64 oracle and as the step of searches."""

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rmtkernels import lanczos_above, lanczos_eigh
from rmtkernels.ops import lanczos_basis
from rmtkernels.ops.lanczos_orthonormalize import Orthonormal
from rmtkernels.reference import lanczos_eigh_ref, lanczos_matrix_ref, lanczos_orthonormalize_ref
from tests.emulate.lanczos_kernel import Kernel, Result, Rows
from tests.helpers import normal

SINGLE, DOUBLE = np.float32, np.float64
SCHEDULES = ["rr", "rev", "rand"]
INVALID_VALUE = 1
# Of unit rows, with each other and with the basis, in roundings of the type. The kernels leave 2 and 64 in a row of
# coefficients (kOrthogonal), between groups of rows too, and float64 Gram matrices round by 16 (kSafePivot); one of the
# many shapes below comes to 100. What a search promises of its eigenvectors is 50 and 1350.
NOT_ORTHONORMAL = {SINGLE: 3.0, DOUBLE: 128.0}


@pytest.fixture(scope="module")
def kernel(builder) -> Kernel:
    return Kernel(builder.kernels("library", "lanczos"))


Problem = tuple[np.ndarray, np.ndarray, np.ndarray]


def problem(count: int, size: int, dim: int, dtype: type, condition: float = 1.0) -> Problem:
    """Rows that lie mostly in the basis's span, the basis, random rows. `condition` is that of what is new in them."""
    random = np.random.default_rng([count, size, dim])
    basis = np.linalg.qr(random.standard_normal((dim, size)))[0].T.astype(dtype)
    inside, new = 5 * random.standard_normal((count, size)) @ basis, random.standard_normal((count, dim))
    new -= new @ basis.T @ basis
    if condition > 1:
        left, values, right = np.linalg.svd(new, full_matrices=False)
        new = left * (values[0] * np.logspace(0, -np.log10(condition), len(values))) @ right
    noise = random.standard_normal((count + 2, dim)) / dim**0.5
    return (inside + new).astype(dtype), basis, noise.astype(dtype)


def rounding(dtype: Any) -> float:
    return float(np.finfo(dtype).eps)


def check(case: Problem, result: Result, negligible: float = 0.0) -> None:
    """What holds whatever the rows are."""
    rows, basis = (x.astype(float) for x in case[:2])
    room, eps, dtype = min(len(rows), rows.shape[1] - len(basis)), rounding(case[0].dtype), case[0].dtype.type
    unit, triangle = result.unit.astype(float), result.triangle
    largest = np.linalg.norm(rows, axis=1).max()
    assert np.abs(unit @ unit.T - np.eye(room)).max() <= NOT_ORTHONORMAL[dtype] * eps
    if len(basis):
        assert np.abs(unit @ basis.T).max() <= NOT_ORTHONORMAL[dtype] * eps
        assert np.abs(result.products - rows @ basis.T).max() <= 1e-14 * largest
    assert (np.tril(triangle, -1) == 0).all() and (np.diag(triangle) >= 0).all()
    lost = rows - result.products @ basis - triangle[:room].T @ unit
    assert np.abs(lost).max() <= 64 * eps * largest + negligible


def check_oracle(case: Problem, result: Result, condition: float = 1.0) -> None:
    """Of independent rows."""
    tensors = [torch.from_numpy(x) for x in case[:2]]
    unit, triangle, _ = (x.numpy() for x in lanczos_orthonormalize_ref(*tensors))
    slack = 300 * condition * rounding(case[0].dtype)  # what is new is known to a rounding of the whole
    assert np.abs(result.unit - unit).max() <= slack
    assert np.abs(result.triangle - triangle).max() <= slack * triangle.max()


# count, size, dim: one chunk of columns and several, more warps than rows, an odd width, two and three groups
SHAPES = [(1, 0, 1), (1, 1, 2), (8, 0, 64), (3, 5, 63), (8, 40, 130), (7, 33, 201), (10, 17, 77), (20, 9, 131)]


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle_under_every_schedule(kernel, monkeypatch, shape: tuple[int, int, int], dtype: type) -> None:
    case, bits = problem(*shape, dtype), set()
    for schedule in SCHEDULES:
        monkeypatch.setenv("EMU_SCHED", schedule)
        result = kernel(*case)
        bits.add(b"".join(x.tobytes() for x in result))
    assert len(bits) == 1
    check(case, result)
    check_oracle(case, result)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_more_chunks_than_parts(kernel, dtype: type) -> None:
    case = problem(2, 3, 8197, dtype)
    result = kernel(*case)
    check(case, result)
    check_oracle(case, result)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("decades", [2, 4, 6, 8, 10, 12, 14])
def test_the_condition_of_what_is_new_does_not_matter(kernel, decades: int, dtype: type) -> None:
    """float32 rows are orthogonal to the rounding of the result; float64 rows to the last bits after more sweeps."""
    case, negligible = problem(8, 40, 200, dtype, 10.0**decades), 16 * rounding(dtype)
    result = kernel(*case, negligible)
    check(case, result, negligible)
    if 10.0**decades < 1e-3 / rounding(dtype):
        check_oracle(case, result, 10.0**decades)


def dependent(case: Problem) -> Problem:
    rows, basis, noise = case
    rows[3], rows[5] = rows[1], 0
    if len(basis) >= 8:
        rows[6] = basis[:8].sum(0)
    return rows, basis, noise


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("shift", [0, 5, 199])
def test_rows_that_depend_on_others_give_way_to_random_ones(kernel, shift: int, dtype: type) -> None:
    case, negligible = dependent(problem(8, 40, 200, dtype)), 64 * rounding(dtype)
    result = kernel(*case, negligible, shift)
    check(case, result, negligible)
    assert (np.diag(result.triangle)[[3, 5, 6]] <= negligible).all()
    basis, noise = (x.astype(float) for x in case[1:])
    spanned = np.concatenate([basis, result.unit])
    random = np.roll(noise, shift, 1)[[3, 5, 6]]
    assert np.abs(random - random @ spanned.T @ spanned).max() <= 16 * rounding(dtype)
    assert np.abs(np.roll(noise, 1, 1)[:3] @ spanned.T @ spanned - np.roll(noise, 1, 1)[:3]).max() > 0.1


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("shape", [(8, 112, 120), (8, 115, 120), (1, 119, 120), (8, 0, 4), (20, 10, 22)], ids=str)
@pytest.mark.parametrize("zero", [False, True])
def test_little_room(kernel, shape: tuple[int, int, int], zero: bool, dtype: type) -> None:
    case = problem(*shape, dtype)
    if zero:
        case[0][...] = 0
    check(case, kernel(*case), 1e-30)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_a_basis_that_is_not_quite_orthonormal_does_no_harm(kernel, dtype: type) -> None:
    """The second pass then leaves more than rounding, which it measures: a third one takes it off."""
    rows, basis, noise = problem(8, 40, 200, dtype)
    basis = (basis + 100 * rounding(dtype) * problem(40, 0, 200, dtype)[0]).astype(dtype)
    result = kernel(rows, basis, noise)
    unit = result.unit.astype(float)
    assert np.abs(unit @ basis.T.astype(float)).max() <= NOT_ORTHONORMAL[dtype] * rounding(dtype)
    assert np.abs(unit @ unit.T - np.eye(8)).max() <= NOT_ORTHONORMAL[dtype] * rounding(dtype)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_addresses_do_not_change_a_bit(kernel, dtype: type) -> None:
    case = problem(10, 9, 100, dtype)
    want = [x.tobytes() for x in kernel(*case)]
    for moved in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1)):
        assert [x.tobytes() for x in kernel(*case, moved=moved)] == want


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_with_contraction(builder, dtype: type) -> None:
    contracted = Kernel(builder.kernels("library with contraction", "lanczos"))
    for case in (problem(10, 33, 201, dtype), dependent(problem(8, 40, 200, dtype)), problem(8, 40, 200, dtype, 1e9)):
        negligible = 64 * rounding(dtype)
        check(case, contracted(*case, negligible), negligible)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_scale(kernel, scale: float, dtype: type) -> None:
    rows, basis, noise = problem(8, 9, 70, dtype)
    want, scaled = kernel(rows, basis, noise), kernel((rows * dtype(scale)).astype(dtype), basis, noise)
    assert np.abs(scaled.unit - want.unit).max() <= 100 * rounding(dtype)
    assert np.abs(scaled.triangle / scale - want.triangle).max() <= 100 * rounding(dtype)


def test_what_is_not_finite_shows_in_the_products(kernel) -> None:
    case = problem(8, 9, 70, SINGLE)
    case[0][2, 7] = np.nan
    result = kernel(*case)
    assert np.isnan(result.products[2]).all() and np.isfinite(result.products[[0, 1, 3]]).all()


def test_mistakes_are_errors(kernel) -> None:
    for wrong in ({"dim": 0}, {"size": -1}, {"count": -1}, {"shift": 5}, {"shift": -1}):
        assert kernel.launch(Rows(**({"dim": 5, "size": 1, "count": 1} | wrong))) == INVALID_VALUE
    assert kernel.launch(Rows(dim=5)) == 0


# Whole searches, with the kernels as their step.


@pytest.fixture
def steps(kernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many vectors each step that the kernels made was given."""
    made: list[int] = []

    def orthonormalize(rows: Tensor, basis: Tensor, noise: Tensor, negligible: Tensor, shift: int, **_: Any) -> Any:
        if len(basis) == rows.shape[1]:
            return Orthonormal(rows[:0], rows.new_zeros(1, len(rows)), rows @ basis.mT)
        made.append(len(rows))
        result = kernel(*(x.numpy() for x in (rows, basis, noise)), float(negligible), shift)
        return Orthonormal(*(torch.from_numpy(x.copy()) for x in result))

    monkeypatch.setattr(lanczos_basis, "orthonormalize", orthonormalize)
    yield made
    assert made


def spectrum(eigenvalues: Tensor, dtype: torch.dtype) -> Tensor:
    vectors = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), dtype=torch.float64))[0]
    matrix = vectors * eigenvalues.double() @ vectors.mT
    return ((matrix + matrix.mT) / 2).to(dtype)


def check_search(matrix: Tensor, k: int, search: Callable[[Tensor], Any], **options: bool) -> None:
    dense, result = lanczos_matrix_ref(matrix, **options), search(matrix)
    want, _ = lanczos_eigh_ref(matrix, k, **options)
    tol, exact = (1e-5, 2e-6) if matrix.dtype == torch.float32 else (1e-10, 1e-13)
    scale = max(float(torch.linalg.eigvalsh(dense).abs().max()), 1e-300)
    vectors = result.eigenvectors.double()
    residuals = (dense @ vectors - vectors * result.eigenvalues.double()).norm(dim=0) / scale
    assert result.complete and len(result.eigenvalues) == k
    assert ((result.eigenvalues.double() - want).abs() <= tol * scale).all()
    assert (residuals <= tol + exact).all() and ((residuals - result.residuals).abs() <= exact).all()
    assert (vectors.mT @ vectors - torch.eye(k)).abs().max() <= 3 * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("eigenvalues", "k"),
    [
        (torch.arange(1, 161) ** -0.5, 8),
        (torch.cat([torch.ones(12), torch.linspace(0, 0.9, 120)]), 14),
        (torch.cat([torch.ones(7), torch.zeros(100)]), 9),
        (10.0 ** -torch.arange(0, 12, 0.1), 5),
        (torch.ones(50), 20),
    ],
    ids=["slow", "copies", "low rank", "graded", "identity"],
)
def test_searches(steps, eigenvalues: Tensor, k: int, dtype: torch.dtype) -> None:
    check_search(spectrum(eigenvalues, dtype), k, lambda matrix: lanczos_eigh(matrix, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_with_a_start_that_lacks_what_is_wanted(steps, dtype: torch.dtype) -> None:
    matrix = spectrum(torch.arange(1, 121) ** -0.5, dtype)
    start = lanczos_eigh_ref(matrix, 12)[1][:, [0, 1, 3, 4, 5, 5, 9]].to(dtype)
    check_search(matrix, 4, lambda matrix: lanczos_eigh(matrix, 4, start=start))
    assert max(steps) > 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_above_a_threshold_in_samples_with_a_large_mean(steps, dtype: torch.dtype) -> None:
    samples = normal(150, 60, dtype=dtype) * torch.linspace(3, 1, 60) + 1e4
    values = torch.linalg.eigvalsh(lanczos_matrix_ref(samples, True, True)).flip(0)
    threshold = float(values[5:7].mean())
    options = {"gram": True, "center": True}
    check_search(samples.to(dtype), 6, lambda x: lanczos_above(x, threshold, **options), **options)


@pytest.mark.skipif("RMTKERNELS_PROVE" not in os.environ, reason="RMTKERNELS_PROVE=1 runs many shapes")
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 17])
def test_many_shapes(kernel, monkeypatch, count: int, dtype: type) -> None:
    for dim in (*range(1, 18), 63, 64, 65, 127, 128, 129, 300):
        for size in sorted({0, 1, dim // 3, dim // 2, dim - 1} - {dim}):
            monkeypatch.setenv("EMU_SCHED", SCHEDULES[(dim + size) % 3])
            case = problem(count, size, dim, dtype)
            check(case, kernel(*case), 1e-30)


def test_the_structure_is_as_large_as_ctypes_thinks(kernel) -> None:
    assert ctypes.sizeof(Rows) == 8 * 8 + 4 * 8 + 8
