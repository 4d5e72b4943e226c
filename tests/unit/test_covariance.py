"""covariance_update_: mean and scatter against the oracle and closed forms, and what they may not depend on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmtkernels import covariance_update_
from rmtkernels.reference import covariance_update_ref_
from tests.helpers import (
    COVARIANCE_LAYOUTS,
    UPPER,
    Covariance,
    covariance_of,
    empty_covariance,
    normal,
    same_bits,
    same_covariance,
    samples_in_layout,
)

pytestmark = pytest.mark.usefixtures("isa")

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATE_DTYPES = (torch.float32, torch.float64)
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 23, 24, 25, 49, 97, 193)


def assert_near_oracle(state: Covariance, oracle: Covariance, moment: Tensor, rows: int, updates: int) -> None:
    """Lower triangle within the bound of its own summation (Higham, gamma_n), the rest untouched.

    An entry has at most 128 additions in a register, one per 128 rows in memory, and three roundings of each factor.
    `moment` is sum w x²: the means' own rounding counts against it, once.
    """
    unit = 2.0**-24 if state.scatter.dtype is torch.float32 else 2.0**-53
    size = oracle.scatter.diagonal().clamp(min=0).sqrt()
    rounding = (min(rows, 128) + rows / 128 + 2 * updates + 8) * unit * size[:, None] * size
    means = 2.0**-50 * (size[:, None] * moment.sqrt() + moment.sqrt()[:, None] * size)
    tiny = 2.0**-149 * (rows + 1) + (2.0**-50 * moment.max()) ** 2 if rows else torch.tensor(0.0)
    bound = rounding + means + tiny + 2.0**-90 * moment.max()
    lower = torch.ones_like(state.scatter, dtype=torch.bool).tril()
    assert ((state.scatter.double() - oracle.scatter).abs() <= bound)[lower].all()
    assert (state.scatter[~lower] == UPPER).all()
    torch.testing.assert_close(state.mean, oracle.mean, rtol=1e-13, atol=float(moment.max().sqrt()) * 1e-13)
    torch.testing.assert_close(state.totals, oracle.totals, rtol=1e-14, atol=0)


@st.composite
def streams(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "dim": draw(st.sampled_from(WIDTHS)),
        "dtype": draw(st.sampled_from(ROW_DTYPES)),
        "state": draw(st.sampled_from(STATE_DTYPES)),
        "rows": draw(st.lists(st.sampled_from((0, 1, 2, 3, 5, 17, 127, 128, 129, 511, 700)), min_size=1, max_size=4)),
        "layout": draw(st.sampled_from(COVARIANCE_LAYOUTS)),
        "scale": draw(st.sampled_from((1e-4, 1.0, 30.0))),
        "offset": draw(st.sampled_from((0.0, 3.0, 1e4))),
        "weighted": draw(st.booleans()),
        "masked": draw(st.booleans()),
        "decay": draw(st.sampled_from((1.0, 0.9, 0.25))),
        "poison": draw(st.sampled_from((None, torch.nan, torch.inf, -torch.inf))),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=80)
@given(streams())
def test_agrees_with_the_oracle(case: dict[str, Any]) -> None:
    dim = case["dim"]
    state, oracle = empty_covariance(dim, case["state"]), empty_covariance(dim, torch.float64)
    moment = torch.zeros(dim, dtype=torch.float64)
    total = 0
    for turn, rows in enumerate(case["rows"]):
        seed = case["seed"] + turn
        batch = samples_in_layout(case["layout"], rows, dim, seed, case["dtype"], case["scale"], case["offset"])
        if case["poison"] is not None and rows:
            batch = batch.clone()
            batch[seed % rows, seed % dim] = case["poison"]
        weights = normal(rows, seed=seed + 1).abs().double() if case["weighted"] else None
        mask = normal(rows, seed=seed + 2) > -0.5 if case["masked"] else None
        options = {"weights": weights, "mask": mask, "decay": case["decay"]}
        covariance_update_(*state, batch, **options)
        covariance_update_ref_(*oracle, batch, **options)
        moment += (batch.double().nan_to_num(0, 0, 0).square() * (1 if weights is None else weights[:, None])).sum(0)
        total += rows
    if state.totals[0] > 0:
        assert_near_oracle(state, oracle, moment, total, len(case["rows"]))
    else:
        assert torch.equal(state.totals, oracle.totals)


@pytest.mark.parametrize("dtype", STATE_DTYPES)
def test_integers_are_exact_at_every_edge_of_every_tile(dtype: torch.dtype) -> None:
    for dim in (*range(1, 76), 191, 192, 193, 199, 385):
        half = torch.randint(-5, 6, (131, dim), generator=torch.Generator().manual_seed(dim)).float()
        state = covariance_of(torch.cat([half, -half]), dtype=dtype)  # the mean is 0, every product a small integer
        lower = torch.ones(dim, dim, dtype=torch.bool).tril()
        assert torch.equal(state.scatter[lower], (2 * half.T @ half)[lower].to(dtype)), dim
        assert (state.scatter[~lower] == UPPER).all()
        assert (state.mean == 0).all()


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 511, 512, 513, 640, 641, 1024, 1300])
def test_every_row_counts_once_whatever_the_chunks(rows: int) -> None:
    half = torch.randint(-5, 6, (rows, 30), generator=torch.Generator().manual_seed(rows)).float()
    state = covariance_of(half, -half)  # the second batch is combined by the difference of the means
    lower = torch.ones(30, 30, dtype=torch.bool).tril()
    torch.testing.assert_close(state.scatter[lower], (2 * half.T @ half)[lower], rtol=3e-6, atol=rows * 1e-5)
    assert state.totals[:3].tolist() == [2 * rows, 2 * rows, 2 * rows]
    assert (state.mean.abs() <= 1e-15 * rows).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_counts_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = torch.where(values.isfinite(), values, torch.zeros_like(values)).view(-1, 64)
    for row in values:
        state = covariance_of(torch.stack([torch.zeros_like(row), row]), dtype=torch.float64)
        assert torch.equal(state.mean, row.double() / 2)
        assert torch.equal(state.scatter.diagonal(), row.double().square() / 2)


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_constant_rows_have_no_scatter_at_all(dtype: torch.dtype) -> None:
    row = (normal(1, 50) * 1e3).to(dtype)
    state = covariance_of(row.expand(777, 50), row.expand(5, 50))
    largest = 0 if dtype is not torch.float64 else 1e-24  # float64 sums of float64 values round
    assert state.scatter.tril().nan_to_num(0.0).abs().max() <= largest
    torch.testing.assert_close(state.mean, row[0].double(), rtol=1e-15, atol=0)


def test_closed_forms() -> None:
    hadamard = torch.tensor([[1.0]])
    for _ in range(5):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    assert torch.equal(covariance_of(hadamard[:, 1:]).scatter.tril(), 32 * torch.eye(31))
    direction, along = normal(40), torch.arange(-50.0, 51.0)
    state = covariance_of(along[:, None] * direction, dtype=torch.float64)  # rank one
    want = (along.square().sum() * torch.outer(direction, direction)).double()
    torch.testing.assert_close(state.scatter.tril(), want.tril(), rtol=1e-6, atol=1e-6)
    one = covariance_of(normal(1, 9))
    assert (one.scatter.tril() == 0).all() and torch.equal(one.mean.float(), normal(1, 9)[0])


def test_fewer_rows_than_columns_leave_a_rank_below_the_number_of_rows() -> None:
    state = covariance_of(normal(20, 90), dtype=torch.float64)
    full = state.scatter.tril() + state.scatter.tril(-1).T
    values = torch.linalg.eigvalsh(full)
    assert (values[-19:] > 1).all() and (values[:-19].abs() < 1e-12 * values[-1]).all()


@pytest.mark.parametrize("ratio", [1e4, 1e6])
def test_a_mean_far_from_zero_costs_no_digits(ratio: float) -> None:
    rows = normal(2000, 60, seed=1) + ratio
    want = np.cov(rows.double().numpy(), rowvar=False, ddof=0)
    deviation = np.sqrt(np.diag(want))
    for batches in ((rows,), rows.split(300)):
        got = covariance_of(*batches).scatter.tril().numpy() / 2000
        assert (np.abs(got - np.tril(want)) <= 1e-6 * np.outer(deviation, deviation)).all()
    naive = (rows.T @ rows / 2000 - torch.outer(rows.mean(0), rows.mean(0))).numpy()
    assert np.abs(naive - want).max() > 1  # what is avoided


def test_float64_rows_are_not_rounded_to_float32_before_they_are_centred() -> None:
    rows = 1e8 + normal(300, 7, dtype=torch.float64)
    want = torch.cov(rows.T, correction=0) * 300
    torch.testing.assert_close(covariance_of(rows).scatter.tril().double(), want.tril(), rtol=1e-5, atol=1e-4)


def test_weights_are_those_of_numpy_and_an_integer_weight_is_a_repeated_row() -> None:
    rows, weights = normal(200, 11, dtype=torch.float64) + 2, torch.arange(200) % 4
    state = empty_covariance(11, torch.float64)
    covariance_update_(*state, rows, weights.double())
    want = np.cov(rows.numpy(), rowvar=False, ddof=0, fweights=weights.numpy())
    np.testing.assert_allclose(state.scatter.tril() / weights.sum(), np.tril(want), atol=1e-13)
    repeated = covariance_of(rows.repeat_interleave(weights, 0), dtype=torch.float64)
    torch.testing.assert_close(state.scatter.tril(), repeated.scatter.tril(), rtol=1e-13, atol=1e-12)
    assert state.totals.tolist() == [300, sum(w * w for w in weights.tolist()), 150, 0, 0]


def test_decay_weighs_rows_by_their_age_in_updates() -> None:
    batches = [normal(30 + 7 * i, 13, seed=i, dtype=torch.float64) + i for i in range(5)]
    state = empty_covariance(13, torch.float64)
    for batch in batches:
        covariance_update_(*state, batch, decay=0.7)
    ages = torch.cat([torch.full((len(batch),), 4.0 - i, dtype=torch.float64) for i, batch in enumerate(batches)])
    at_once = empty_covariance(13, torch.float64)
    covariance_update_(*at_once, torch.cat(batches), 0.7**ages)
    torch.testing.assert_close(state.scatter.tril(), at_once.scatter.tril(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.mean, at_once.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state.totals[:4], at_once.totals[:4], rtol=1e-13, atol=0)
    assert state.totals[4] == 4  # the first update had nothing to decay


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2e19])
@pytest.mark.parametrize("column", [0, 17, 40])
def test_a_row_that_is_not_finite_leaves_the_state_as_if_it_had_not_come(bad: float, column: int) -> None:
    before = covariance_of(normal(50, 41))
    rows = normal(300, 41, seed=2)
    want = before.copy()
    covariance_update_(*want, torch.cat([rows[:150], rows[151:]]), decay=0.5)
    rows[150, column] = bad
    after = before.copy()
    covariance_update_(*after, rows, decay=0.5)
    want.totals[3] += 1
    assert same_covariance(after, want)


def test_skipped_rows_leave_the_same_bits_as_absent_ones_and_are_not_read() -> None:
    rows, keep = normal(700, 50), normal(700, seed=3) > 0
    want = covariance_of(rows[keep])
    rows[~keep] = torch.nan
    masked, weighted, both = empty_covariance(50), empty_covariance(50), empty_covariance(50)
    covariance_update_(*masked, rows, None, keep)
    covariance_update_(*weighted, rows, keep.float())
    covariance_update_(*both, rows, torch.where(keep, 1.0, torch.nan), keep)
    assert all(same_covariance(state, want) for state in (masked, weighted, both))


@pytest.mark.parametrize(
    "batch", [torch.zeros(0, 9), torch.full((3, 9), torch.nan), normal(4, 9) * torch.tensor([[torch.inf]])]
)
def test_an_update_without_a_row_that_counts_changes_the_counter_alone(batch: Tensor) -> None:
    for before in (covariance_of(normal(20, 9)), empty_covariance(9)):
        after = before.copy()
        covariance_update_(*after, batch, decay=0.5)
        before.totals[3] += len(batch)
        assert same_covariance(after, before)


@pytest.mark.parametrize("layout", COVARIANCE_LAYOUTS)
def test_the_layout_of_rows_does_not_change_a_bit(layout: str) -> None:
    batch = samples_in_layout(layout, 150, 53, 4, torch.float32, 1.0, 2.0)
    assert same_covariance(covariance_of(batch), covariance_of(batch.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("dtype", STATE_DTYPES)
def test_threads_and_repetition_do_not_change_a_bit(set_threads: Callable[[int], None], dtype: torch.dtype) -> None:
    batches, weights = [normal(1100, 600, seed=s) for s in range(2)], normal(1100).abs()
    states = []
    for threads in (1, 2, 2, 3):
        set_threads(threads)
        states.append(empty_covariance(600, dtype))
        for batch in batches:
            covariance_update_(*states[-1], batch, weights, decay=0.9)
    assert all(same_covariance(states[0], other) for other in states[1:])


def test_a_wide_state_agrees_with_float64() -> None:
    rows = normal(600, 1111) * torch.linspace(0.01, 10, 1111) + 5
    got, want = covariance_of(rows[:500], rows[500:]), covariance_of(rows, dtype=torch.float64)
    size = want.scatter.diagonal().sqrt()
    assert ((got.scatter - want.scatter).tril().abs() <= 1e-6 * size[:, None] * size).all()


def test_small_and_large_values() -> None:
    rows = normal(40, 30, dtype=torch.float64)
    want = covariance_of(rows, dtype=torch.float64)
    for scale in (1e-15, 1e15):
        got = covariance_of((rows * scale).float())
        torch.testing.assert_close(got.scatter.double().tril() / scale**2, want.scatter.tril(), rtol=1e-4, atol=1e-5)


def test_rows_are_left_as_they_were_and_no_graph_is_kept() -> None:
    batch = normal(30, 17, dtype=torch.bfloat16)
    copy = batch.clone()
    covariance_of(batch)
    assert same_bits(batch, copy)
    for backend in ("cpu", "reference"):
        state = empty_covariance(4)
        rows, weights = (torch.rand(*shape, requires_grad=True) * 2 for shape in ((5, 4), (5,)))
        covariance_update_(*state, rows, weights, backend=backend)
        assert not any(tensor.requires_grad for tensor in state)


def test_no_columns() -> None:
    state = covariance_of(torch.zeros(5, 0))
    assert state.totals.tolist() == [5, 5, 5, 0, 0]


@pytest.mark.parametrize("dtype", STATE_DTYPES)
def test_what_lies_before_and_behind_the_buffers_is_left_alone(dtype: torch.dtype) -> None:
    for dim in (*range(1, 30), 49, 97, 193):
        scatters, means = torch.full((3, dim, dim), UPPER, dtype=dtype), torch.full((3, dim), UPPER).double()
        totals = torch.zeros(3, 5, dtype=torch.float64)
        for seed in range(2):
            covariance_update_(means[1], scatters[1], totals[1], normal(20, dim, seed=seed), decay=0.5)
        assert all((tensor[i] == UPPER).all() for tensor in (scatters, means) for i in (0, 2)), dim
        assert (totals[[0, 2]] == 0).all() and totals[1, 2] == 40
