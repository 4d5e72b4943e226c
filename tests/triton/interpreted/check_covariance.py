"""covariance_update_ in the checked interpreter: against the oracle, skipped rows, refusals, bits, and planted bugs."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from rmtkernels import RangeError, ShapeError, covariance_update_
from rmtkernels.reference.covariance import covariance_update_ref_
from rmtkernels.triton import covariance as shipped
from tests.helpers import (
    COVARIANCE_LAYOUTS,
    UPPER,
    Covariance,
    empty_covariance,
    normal,
    same_covariance,
    samples_in_layout,
)
from tests.triton.mutants import chosen, mutant

FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
Update = tuple[Tensor, Tensor | None, Tensor | None, float]


def assert_same(got: Covariance, want: Covariance) -> None:
    eps = 1e-6 if got.scatter.dtype == FLOAT else 1e-13
    dim = len(got.mean)
    size = want.scatter.double().diagonal().clamp(min=1e-30).sqrt()
    lower = torch.ones(dim, dim, dtype=torch.bool).tril()
    error = (got.scatter.double() - want.scatter.double()).abs()
    assert (error <= eps * size[:, None] * size)[lower].all()
    assert (got.scatter[~lower] == UPPER).all()
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.totals, want.totals, rtol=1e-13, atol=0)


def follow(updates: list[Update], dim: int, state: torch.dtype) -> tuple[Covariance, Covariance]:
    """The states that Triton's kernels and the oracle come to."""
    got = empty_covariance(dim, state)
    want = Covariance(got.mean.clone(), got.scatter.double(), got.totals.clone())
    for batch, weights, mask, decay in updates:
        covariance_update_(*got, batch, weights, mask, decay=decay, backend="triton")
        covariance_update_ref_(*want, batch, weights, mask, decay)
    return got, want


@pytest.mark.parametrize(("state", "dtype"), [(FLOAT, FLOAT), (FLOAT, BFLOAT), (DOUBLE, DOUBLE), (DOUBLE, HALF)])
@pytest.mark.parametrize("dim", [1, 70])
def test_agrees_with_the_oracle(dim: int, state: torch.dtype, dtype: torch.dtype) -> None:
    updates: list[Update] = []
    for step, rows in enumerate((5, 1, 140)):
        batch = samples_in_layout("dense", rows, dim, step, dtype, 2.0, 1.0)
        weights = normal(rows, seed=step).abs().to(DOUBLE if step else FLOAT) if step != 1 else None
        updates.append((batch, weights, normal(rows, seed=9 + step) > -1 if step == 2 else None, 0.9 if step else 1.0))
    updates.append((torch.empty(0, dim, dtype=dtype), None, None, 0.5))
    assert_same(*follow(updates, dim, state))


@pytest.mark.parametrize("layout", COVARIANCE_LAYOUTS)
def test_layouts(layout: str) -> None:
    assert_same(*follow([(samples_in_layout(layout, 20, 9, 1, BFLOAT, 1.0, 3.0), None, None, 1.0)], 9, FLOAT))


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    batches = [normal(40, 9, seed=seed, dtype=DOUBLE) + 1e5 for seed in range(2)]
    assert_same(*follow([(batch, None, None, 1.0) for batch in batches], 9, FLOAT))


def test_rows_that_are_not_finite_or_masked_leave_no_trace() -> None:
    batch = normal(20, 6)
    batch[3, 1], batch[5, 0], batch[7] = torch.nan, torch.inf, 1e25
    mask = torch.ones(20, dtype=torch.bool)
    mask[3] = mask[11] = False
    weights = torch.ones(20)
    weights[11] = torch.nan  # masked: not read
    got = follow([(batch, weights, mask, 1.0)], 6, FLOAT)[0]
    _, want = follow([(batch[[i for i in range(20) if i not in (3, 5, 7, 11)]], None, None, 1.0)], 6, FLOAT)
    want.totals[3] = 2
    assert_same(got, want)


@pytest.mark.parametrize("bad", ["a negative weight", "NaN as a weight", "a trace that does not fit", "only NaN"])
def test_what_cannot_be_added_is_counted_and_changes_nothing_else(bad: str) -> None:
    state = follow([(normal(9, 4), None, None, 1.0)], 4, FLOAT)[0]
    want, batch, weights = state.copy(), normal(3, 4), torch.ones(3)
    if bad == "a trace that does not fit":
        batch = torch.tensor([1.7e19, 0, 0, 0]).expand(3, 4)
    elif bad == "only NaN":
        batch *= torch.nan
    else:
        weights[1] = -1 if bad == "a negative weight" else torch.nan
    covariance_update_(*state, batch, weights, decay=0.5, backend="triton")
    want.totals[3] += 3
    assert same_covariance(state, want)


def test_typed_errors_come_before_any_change() -> None:
    state = follow([(normal(9, 4), None, None, 1.0)], 4, FLOAT)[0]
    want = state.copy()
    with pytest.raises(RangeError, match="decay"):
        covariance_update_(*state, normal(3, 4), decay=0.0, backend="triton")
    with pytest.raises(ShapeError, match="weights"):
        covariance_update_(*state, normal(3, 4), torch.ones(2), backend="triton")
    assert same_covariance(state, want)


def test_opcheck() -> None:
    state = follow([(normal(9, 4), None, None, 1.0)], 4, FLOAT)[0]
    arguments = (*state, normal(3, 4), torch.ones(3), torch.ones(3, dtype=torch.bool), 0.5)
    torch.library.opcheck(torch.ops.rmtkernels.covariance_update_triton_.default, arguments)


# (text as shipped, text broken, what finds it)
MUTANTS = {
    "the upper triangle is written": ("(i[:, None] >= j[None, :]) & (i", "(j[None, :] < dim) & (i", "values|race"),
    "rows past the tile are written": (" & (i < dim)[:, None]\n    at", "\n    at", "bounds"),
    "the mean is not subtracted": ("a - mean_i[:, None]", "a", "values"),
    "weights count twice": ("a - mean_i[:, None], 0.0", "(a - mean_i[:, None]) * weight[None, :], 0.0", "values"),
    "a run is lost": ("total += run", "total = run", "values"),
    "the means' difference is lost": ("total += (between", "total += (0 * between", "values"),
    "no decay": ("tl.load(plan + 1).to(SUM) * old", "old", "values"),
    "TF32, silently": ('input_precision="ieee"', 'input_precision="tf32"', "values"),
    "norms of other rows": ("tl.store(norms + row,", "tl.store(norms + row * 0 + tl.arange(0, ROWS),", "race|bounds"),
    "columns past the row are summed": ("(weight > 0.0) & (column < dim)[None, :]", "(weight > 0.0)", "bounds"),
}  # fmt: skip


def finding_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr("rmtkernels.triton.covariance.covariance_update_", module.covariance_update_)
    batch, weights = samples_in_layout("dense", 140, 70, 1, DOUBLE, 1.0, 1e5), normal(140).abs()
    try:
        assert_same(*follow([(batch, weights, None, 1.0), (batch[:20] + 1, None, None, 0.5)], 70, FLOAT))
    except InterpreterError as error:
        return str(error)
    except AssertionError:
        return "values"
    return None


def test_the_shipped_kernels_are_not_found_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert finding_of(shipped, monkeypatch) is None


@pytest.mark.parametrize("name", chosen(MUTANTS))
def test_a_broken_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, broken, finding = MUTANTS[name]
    found = finding_of(mutant(tmp_path, "covariance", text, broken), monkeypatch)
    assert found is not None and any(word in found for word in finding.split("|")), found
