"""The shipped CUDA kernels of covariance, run on the CPU, against the float64 oracle."""

import ctypes
import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from rmtkernels.reference import covariance_update_ref_
from tests.helpers import UPPER, Covariance, empty_covariance, normal, same_bits, same_covariance

FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = [FLOAT, BFLOAT, HALF, DOUBLE]  # in the order of SampleType
PAIRS = list(itertools.product(TYPES, (FLOAT, DOUBLE)))
SCHEDULES = ["rr", "rev", "rand"]
MARGIN = 64  # bytes behind the workspace, which nothing may touch


class Update(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("mean", "scatter", "totals", "batch", "weights", "mask", "workspace")],
        *[(name, ctypes.c_int64) for name in ("rows", "dim", "row_stride", "weight_stride", "mask_stride")],
        ("decay", ctypes.c_double),
        ("type", ctypes.c_int32),
        *[(name, ctypes.c_bool) for name in ("scatter_is_double", "weights_are_double")],
    ]


def loaded(path: Any) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.rmtkernels_cuda_covariance_workspace.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_bool]
    library.rmtkernels_cuda_covariance_workspace.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def library(builder) -> ctypes.CDLL:
    return loaded(builder.kernels("library", "covariance"))


def update(
    library: ctypes.CDLL,
    state: Covariance,
    batch: Tensor,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    decay: float = 1.0,
) -> None:
    """covariance_update_ by the emulated kernels; columns of the batch lie side by side."""
    (rows, dim), double = batch.shape, state.scatter.dtype is DOUBLE
    size = library.rmtkernels_cuda_covariance_workspace(rows, dim, double)
    memory = torch.full((size + 16 + MARGIN,), 0xFF, dtype=torch.uint8)  # NaN, wherever it is read as a number
    shift = -memory.data_ptr() % 16
    arguments = Update(
        *(t.data_ptr() for t in state), batch.data_ptr(),
        *(None if t is None else t.data_ptr() for t in (weights, mask)), memory.data_ptr() + shift,
        rows, dim, batch.stride(0), *(0 if t is None else t.stride(0) for t in (weights, mask)),
        decay, TYPES.index(batch.dtype), double, weights is not None and weights.dtype is DOUBLE,
    )  # fmt: skip
    assert library.rmtkernels_cuda_covariance_update(ctypes.byref(arguments), None) == 0
    assert (memory[:shift] == 0xFF).all() and (memory[shift + size :] == 0xFF).all(), "wrote beyond the workspace"


def updated(library: ctypes.CDLL, state: torch.dtype, *batches: Tensor, **options: Any) -> Covariance:
    buffers = empty_covariance(batches[0].shape[1], state)
    for batch in batches:
        update(library, buffers, batch, **options)
    return buffers


def assert_near(got: Covariance, want: Covariance, ratio: float = 1.0) -> None:
    """`ratio`: how many deviations the mean is away from zero, whose own rounding counts in float64."""
    lower = torch.ones_like(want.scatter, dtype=torch.bool).tril()
    size = want.scatter.diagonal().clamp(min=0).sqrt()
    limit = 6e-7 if got.scatter.dtype is FLOAT else 1e-13 + 1e-15 * ratio
    error = (got.scatter.double() - want.scatter).abs() - limit * size[:, None] * size
    assert error[lower].max() <= 1e-30
    assert (got.scatter[~lower] == UPPER).all()
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-13, atol=1e-13 * float(size.max()))
    torch.testing.assert_close(got.totals, want.totals, rtol=1e-14, atol=0)


def oracle(*batches: Tensor, **options: Any) -> Covariance:
    state = empty_covariance(batches[0].shape[1], DOUBLE)
    for batch in batches:
        covariance_update_ref_(*state, batch, **options)
    return state


def options_of(rows: int, seed: int) -> dict[str, Any]:
    return {"weights": normal(rows, seed=seed).abs(), "mask": normal(rows, seed=seed + 1) > -1, "decay": 0.7}


@pytest.mark.parametrize("types", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(4, 1), (3, 2), (40, 9), (70, 67), (33, 131)], ids=str)
def test_matches_the_oracle_under_every_schedule(library, monkeypatch, shape: tuple[int, int], types) -> None:
    batches = [(normal(*shape, seed=s) + 3 * s).to(types[0]) for s in range(2)]
    batches[0][shape[0] // 2, shape[1] // 2] = torch.nan
    results = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("EMU_SCHED", schedule)
        results.append(updated(library, types[1], *batches, **options_of(shape[0], 5)))
    assert_near(results[0], oracle(*batches, **options_of(shape[0], 5)), 5)
    assert all(same_covariance(results[0], other) for other in results[1:])


@pytest.mark.parametrize("types", PAIRS, ids=str)
def test_contraction_changes_no_more_than_rounding(builder, types) -> None:
    contracted = loaded(builder.kernels("library with contraction", "covariance"))
    batches = [(normal(60, 35, seed=s) - 2).to(types[0]) for s in range(2)]
    assert_near(updated(contracted, types[1], *batches, **options_of(60, 2)), oracle(*batches, **options_of(60, 2)), 5)


@pytest.mark.parametrize("types", PAIRS, ids=str)
def test_integers_are_exact_in_every_entry(library, types) -> None:
    """The mean is 0 and every product a small integer: an entry is right to the bit or wrong."""
    for rows, dim in ((20, 150), (300, 30)):
        half = torch.randint(-5, 6, (rows, dim), generator=torch.Generator().manual_seed(dim)).to(types[0])
        state = updated(library, types[1], torch.cat([half, -half]))
        lower = torch.ones(dim, dim, dtype=torch.bool).tril()
        assert torch.equal(state.scatter.double()[lower], (2 * half.double().T @ half.double())[lower])
        assert (state.scatter[~lower] == UPPER).all() and (state.mean == 0).all()


@pytest.mark.parametrize("types", [(FLOAT, FLOAT), (HALF, FLOAT), (DOUBLE, DOUBLE)], ids=str)
@pytest.mark.parametrize("rows", [511, 1024, 1025, 1600])
def test_every_row_counts_once_whatever_the_chunks_and_splits(library, rows: int, types) -> None:
    if types[0] is HALF and rows != 1025 and "RMTKERNELS_PROVE" not in os.environ:
        pytest.skip("RMTKERNELS_PROVE=1 runs it: the emulated tensor cores are slow")
    batch = (normal(rows, 5) + 10).to(types[0])
    assert_near(updated(library, types[1], batch), oracle(batch), 10)


@pytest.mark.parametrize("types", PAIRS, ids=str)
def test_rows_that_are_skipped_leave_the_bits_of_rows_that_never_came(library, types) -> None:
    rows = (normal(90, 20) + 1).to(types[0])
    keep = normal(90, seed=3) > 0
    want = updated(library, types[1], rows[keep])
    rows[~keep] = torch.nan
    masked = updated(library, types[1], rows, mask=keep)
    weighted = updated(library, types[1], rows, weights=keep.double())
    both = updated(library, types[1], rows, weights=torch.where(keep, 1.0, torch.nan), mask=keep)
    rejected = updated(library, types[1], rows)
    assert rejected.totals[3] == (~keep).sum()
    rejected.totals[3] = 0
    assert all(same_covariance(state, want) for state in (masked, weighted, both, rejected))


def test_a_list_of_several_steps_is_in_order(library) -> None:
    rows = normal(9000, 1, dtype=DOUBLE)
    keep = normal(9000, seed=1) > -0.3
    assert same_covariance(updated(library, DOUBLE, rows, mask=keep), updated(library, DOUBLE, rows[keep]))


@pytest.mark.parametrize("types", PAIRS, ids=str)
def test_addresses_and_strides_do_not_change_a_bit(library, types) -> None:
    rows = (normal(50, 40) + 1).to(types[0])
    want = updated(library, types[1], rows)
    for width, first in ((41, 0), (48, 1), (48, 8)):  # no row, no first row, every row on a multiple of 16 bytes
        other = torch.zeros(50, width, dtype=types[0])[:, first : first + 40]
        other.copy_(rows)
        assert same_covariance(updated(library, types[1], other), want)
    one = rows[:1].expand(50, 40)
    assert same_covariance(updated(library, types[1], one), updated(library, types[1], one.clone()))


@pytest.mark.parametrize("types", [pair for pair in PAIRS if pair[0] is not DOUBLE], ids=str)
def test_constant_rows_have_no_scatter_at_all(library, types) -> None:
    row = (normal(1, 30) * 1e3).to(types[0])
    state = updated(library, types[1], row.expand(77, 30), row.expand(5, 30))
    assert (state.scatter.tril() == 0).all()
    assert torch.equal(state.mean, row[0].double())


@pytest.mark.parametrize("ratio", [1e4, 1e6])
def test_a_mean_far_from_zero_costs_no_digits(library, ratio: float) -> None:
    batches = [normal(200, 20, seed=s) + ratio for s in range(2)]
    assert_near(updated(library, FLOAT, *batches), oracle(*batches), ratio)
    assert_near(updated(library, DOUBLE, *batches), oracle(*batches), ratio)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_16_bit_rows_keep_the_digits_that_their_mean_has(library, dtype: torch.dtype) -> None:
    """Columns a few units in the last place wide, as far from zero as 16 bits allow, beside columns of other scales."""
    unit = torch.finfo(dtype).eps
    steps = torch.randint(0, 3, (150, 24), generator=torch.Generator().manual_seed(0))
    batch = ((1 + steps * unit) * 2.0 ** torch.linspace(-9, 9, 24).round()).to(dtype)
    batch[:, 3] = normal(150).to(dtype)
    batch[:, 4] = (normal(150, seed=1) + 4).to(dtype)
    batch[7, 5] *= 100  # an outlier, which sets the column's scale
    exact = oracle(batch)
    assert_near(updated(library, FLOAT, batch), exact, 1e3)
    # What one float16 number per element would lose, and what products before the mean is subtracted would.
    centred = batch.double() - batch.double().mean(0)
    size = exact.scatter.diagonal().sqrt()
    once = centred.half().double() if dtype is BFLOAT else (centred * 64).half().double() / 64
    raw = batch.float().T @ batch.float() - 150 * torch.outer(batch.float().mean(0), batch.float().mean(0))
    for careless in (once.T @ once, raw.double()):
        assert ((careless - exact.scatter).tril().abs() / (size[:, None] * size)).max() > 1e-5


def test_weights_of_any_size_overflow_no_float16(library) -> None:
    weights = 10.0 ** torch.linspace(-12, 12, 60)
    batch = (normal(60, 12) * 10.0 ** torch.linspace(-4, 4, 12)).to(BFLOAT)
    state, want = updated(library, FLOAT, batch, weights=weights), oracle(batch, weights=weights)
    assert_near(state, want, 10)
    for dtype, size in itertools.product((FLOAT, BFLOAT), (2.0**-200, 2.0**990)):
        rows = torch.arange(-4, 5).to(dtype).expand(7, 9)
        state = updated(library, FLOAT, rows, weights=torch.full((7,), size, dtype=DOUBLE))
        assert (state.scatter.tril() == 0).all() and torch.equal(state.mean, rows[0].double())


REFUSED: dict[str, dict[str, Any]] = {
    "a negative weight": {"weights": torch.tensor([1.0, -1e-30, 1, 0])},
    "a weight that is NaN": {"weights": torch.tensor([1.0, torch.nan, 1, 0])},
    "rows whose squares overflow in sum": {"batch": torch.full((4, 5), 6e18) * torch.tensor([[1], [-1], [1], [-1]])},
    "a gap of the means that overflows": {"batch": torch.full((4, 5), 6e18)},
    "weights whose sum overflows": {"weights": torch.full((4,), 1e308, dtype=DOUBLE), "batch": torch.zeros(4, 5)},
    "a scatter matrix that is not finite": {"scatter": torch.full((5, 5), torch.nan)},
    "a mean that is not finite": {"mean": torch.full((5,), torch.inf, dtype=DOUBLE)},
    "a negative total": {"totals": torch.tensor([-20.0, 20, 20, 0, 0], dtype=DOUBLE)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_added_is_counted_and_changes_nothing(library, name: str) -> None:
    change = dict(REFUSED[name])
    batch, weights = change.pop("batch", normal(4, 5)), change.pop("weights", None)
    state = updated(library, FLOAT, normal(20, 5))._replace(**change)
    before = state.copy()
    update(library, state, batch, weights, decay=0.5)
    before.totals[3] += 4 if weights is None else (weights != 0).sum()
    assert same_covariance(state, before)


@pytest.mark.parametrize("batch", [torch.zeros(0, 9), torch.full((3, 9), torch.nan)])
def test_an_update_without_a_row_that_counts_changes_the_counter_alone(library, batch: Tensor) -> None:
    for before in (updated(library, FLOAT, normal(20, 9)), empty_covariance(9)):
        after = before.copy()
        update(library, after, batch, decay=0.5)
        before.totals[3] += len(batch)
        assert same_covariance(after, before)


def test_no_columns(library) -> None:
    assert updated(library, FLOAT, torch.zeros(5, 0)).totals.tolist() == [5, 5, 5, 0, 0]


def test_rows_are_left_as_they_were(library) -> None:
    batch = normal(30, 17, dtype=BFLOAT)
    copy = batch.clone()
    updated(library, FLOAT, batch)
    assert same_bits(batch, copy)


@pytest.mark.skipif("RMTKERNELS_PROVE" not in os.environ, reason="RMTKERNELS_PROVE=1 runs every edge of every tile")
@pytest.mark.parametrize("types", PAIRS, ids=str)
def test_every_edge(library, types) -> None:
    for rows, dim in itertools.product((1, 31, 33), (1, 7, 8, 63, 64, 65, 127, 128, 129, 255, 257)):
        batch = (normal(rows, dim, seed=dim) + 1).to(types[0])
        assert_near(updated(library, types[1], batch, decay=0.5), oracle(batch, decay=0.5), 5)
