"""lanczos_orthonormalize in the checked interpreter: against the oracle, dependent rows, little room, a search, and
planted bugs. What must hold of a block step is said once, in the tests of the CUDA kernels."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.errors import InterpreterError

from rmtkernels import DtypeError, ShapeError, lanczos_eigh
from rmtkernels.triton import lanczos as shipped
from tests.emulate.lanczos_kernel import Result
from tests.emulate.test_lanczos_emulated import (
    DOUBLE,
    NOT_ORTHONORMAL,
    SINGLE,
    Problem,
    check,
    check_oracle,
    check_search,
    dependent,
    problem,
    rounding,
    spectrum,
)
from tests.triton.checked import Counts
from tests.triton.mutants import PROVE, chosen, mutant

OPERATOR = torch.ops.rmtkernels.lanczos_orthonormalize_triton.default


def arguments(case: Problem, negligible: float = 0.0, shift: int = 0) -> tuple[Any, ...]:
    tensors = (torch.from_numpy(np.ascontiguousarray(x)) for x in case)
    return *tensors, torch.tensor(negligible, dtype=torch.float64), shift


def step(case: Problem, negligible: float = 0.0, shift: int = 0, module: ModuleType = shipped) -> Result:
    return Result(*(x.numpy() for x in module.lanczos_orthonormalize(*arguments(case, negligible, shift))))


def check_dependent(case: Problem, result: Result, negligible: float, shift: int) -> None:
    """Rows 3, 5 and 6 have given way to random ones."""
    check(case, result, negligible)
    assert (np.diag(result.triangle)[[3, 5, 6]] <= negligible).all()
    basis, noise = (x.astype(float) for x in case[1:])
    spanned = np.concatenate([basis, result.unit])
    random = np.roll(noise, shift, 1)[[3, 5, 6]]
    assert np.abs(random - random @ spanned.T @ spanned).max() <= 16 * rounding(case[0].dtype)


# One chunk of columns and several, an odd width, one group and two
SHAPES = [(1, 0, 1), (1, 1, 2), (7, 33, 201), (20, 9, 131)]


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("shape", SHAPES if PROVE else SHAPES[2:3], ids=str)
def test_matches_the_oracle(shape: tuple[int, int, int], dtype: type) -> None:
    case = problem(*shape, dtype)
    result = step(case)
    check(case, result)
    check_oracle(case, result)


def test_more_chunks_than_programs_and_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "MOST_PARTS", 2)
    case = problem(18, 5, 300, SINGLE)
    result = step(case)
    check(case, result)
    check_oracle(case, result)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE] if PROVE else [SINGLE])
@pytest.mark.parametrize("decades", [2, 6, 10, 14] if PROVE else [10])
def test_the_condition_of_what_is_new_does_not_matter(decades: int, dtype: type) -> None:
    case, negligible = problem(8, 20, 70, dtype, 10.0**decades), 16 * rounding(dtype)
    check(case, step(case, negligible), negligible)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("shift", [0, 5, 69] if PROVE else [5])
def test_rows_that_depend_on_others_give_way_to_random_ones(shift: int, dtype: type) -> None:
    case, negligible = dependent(problem(8, 10, 70, dtype)), 64 * rounding(dtype)
    check_dependent(case, step(case, negligible, shift), negligible, shift)


LITTLE = [(8, 115, 120), (1, 119, 120), (8, 0, 4), (20, 10, 22)]


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE] if PROVE else [DOUBLE])
@pytest.mark.parametrize("shape", LITTLE if PROVE else LITTLE[3:], ids=str)
@pytest.mark.parametrize("zero", [False, True])
def test_little_room(shape: tuple[int, int, int], zero: bool, dtype: type) -> None:
    case = problem(*shape, dtype)
    if zero:
        case[0][...] = 0
    check(case, step(case), 1e-30)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE] if PROVE else [DOUBLE])
def test_a_third_pass_over_the_basis_comes_only_where_it_is_needed(counts: Counts, dtype: type) -> None:
    """A basis that is not quite orthonormal needs one, and then does no harm."""
    rows, basis, noise = problem(8, 40, 128, dtype)
    step((rows, basis, noise))
    usual = counts.loaded
    basis = (basis + 100 * rounding(dtype) * problem(40, 0, 128, dtype)[0]).astype(dtype)
    unit = step((rows, basis, noise)).unit.astype(float)
    assert counts.loaded - 2 * usual >= basis.nbytes
    assert np.abs(unit @ basis.T.astype(float)).max() <= NOT_ORTHONORMAL[dtype] * rounding(dtype)
    assert np.abs(unit @ unit.T - np.eye(8)).max() <= NOT_ORTHONORMAL[dtype] * rounding(dtype)


def test_what_is_not_finite_shows_in_the_products() -> None:
    case = problem(8, 9, 70, SINGLE)
    case[0][2, 7] = np.nan
    result = step(case)
    assert np.isnan(result.products[2]).all() and np.isfinite(result.products[[0, 1, 3]]).all()


def test_a_search_takes_the_kernels_as_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made, kernel = [], shipped.lanczos_orthonormalize
    monkeypatch.setattr(shipped, "lanczos_orthonormalize", lambda *given: made.append(len(given[0])) or kernel(*given))
    matrix = spectrum(torch.arange(1, 31) ** -0.5, torch.float32)
    check_search(matrix, 2, lambda matrix: lanczos_eigh(matrix, 2, backend="triton"))
    assert made


def test_opcheck_and_typed_errors() -> None:
    good = arguments(problem(2, 1, 5, SINGLE))
    torch.library.opcheck(OPERATOR, good, test_utils=("test_schema", "test_faketensor"))  # the others trace it again
    rows, basis, noise, negligible, shift = good
    for error, wrong in (
        (DtypeError, (rows, basis.double(), noise, negligible, shift)),
        (DtypeError, (rows, basis, noise, negligible.float(), shift)),
        (DtypeError, (rows.half(), basis.half(), noise.half(), negligible, shift)),
        (ShapeError, (rows, basis[:, :4], noise, negligible, shift)),
        (ShapeError, (rows, basis, noise[:1], negligible, shift)),
        (ShapeError, (rows, basis, noise, negligible, 5)),
        (ShapeError, (rows, rows.new_zeros(6, 5), noise, negligible, shift)),
    ):
        with pytest.raises(error):
            OPERATOR(*wrong)


BOUND = "& (column < dim)[None, :]\n    return"
MIX = "tl.load(state + r[:, None] * ROWS + r[None, :])"
GROUPS = "min(size + first, dim))\n            first"
TURNED = "tl.where(column >= shift, column - shift, column - shift + dim)"
TRIANGLE = "triangular = tl.dot(tl.trans(lower), before"
MUTANTS = {
    "columns past the row are read": (BOUND, BOUND.replace("dim", "dim + 1"), "bounds"),
    "another program's sums": ("part = parts + tl.program_id(0).to(tl.int64) *", "part = parts + 0 *", "race"),
    "what the basis spans is put on": ("x -= tl.dot(c, q", "x += tl.dot(c, q", "values"),
    "the factor is turned": (MIX, "tl.load(state + r[None, :] * ROWS + r[:, None])", "values"),
    "the last program is forgotten": ("(p < programs)[:, None]", "(p < programs - 1)[:, None]", "values"),
    "groups before are forgotten": (GROUPS, GROUPS.replace("size + first", "size"), "values"),
    "rows of the next group": ("(r < count) & (i < size))", "(r < ROWS) & (i < size))", "bounds"),
    "random rows are not turned": (TURNED, "column", "dependent"),
    "no row drops out": ("stays = enough |", "stays = (enough | (found == found)) |", "dependent"),
    "no sweep comes after": ("again = (left_over > SMALL * SMALL) | (safe == 0)", "again = safe < 0", "dependent"),
    "the triangle before is lost": (TRIANGLE, TRIANGLE.replace("before", "inverse"), "values"),
    "never a third pass": ("(left_over > orthogonal * orthogonal)", "(left_over > 1e9)", "dependent"),
}


def first_wrong_step(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What finds it, if block steps are not what they must be."""
    monkeypatch.setattr(module, "MOST_PARTS", 2)
    case = problem(18, 9, 131, SINGLE)
    rows, basis, noise = problem(8, 10, 70, DOUBLE)
    rough = rows, basis + 100 * rounding(DOUBLE) * problem(10, 0, 70, DOUBLE)[0], noise
    poor, negligible = dependent((rows.copy(), basis, noise)), 64 * rounding(DOUBLE)
    finding = "values"
    try:
        result = step(case, module=module)
        check(case, result)
        check_oracle(case, result)
        finding = "dependent"
        check_dependent(poor, step(poor, negligible, 5, module), negligible, 5)
        finding = "rough"
        unit = step(rough, module=module).unit
        assert np.abs(unit @ rough[1].T).max() <= NOT_ORTHONORMAL[DOUBLE] * rounding(DOUBLE)
    except InterpreterError as error:
        return str(error)
    except AssertionError:
        return finding
    return None


def test_the_shipped_kernels_are_not_found_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_wrong_step(shipped, monkeypatch) is None


@pytest.mark.parametrize("name", chosen(MUTANTS))
def test_a_broken_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, broken, finding = MUTANTS[name]
    found = first_wrong_step(mutant(tmp_path, "lanczos", text, broken), monkeypatch)
    assert found is not None and any(word in found for word in finding.split("|")), found
