"""StreamingCovariance: what is read from it, and that merging is one pass whatever the split and the order."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmtkernels import ShapeError, StreamingCovariance
from tests.helpers import Covariance, normal, same_bits, same_covariance

D = 30


def state_of(state: StreamingCovariance) -> Covariance:
    return Covariance(state.mean, state.scatter, state.totals).copy()


def filled(*batches: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> StreamingCovariance:
    state = StreamingCovariance(batches[0].shape[1], dtype=dtype, **options)
    for batch in batches:
        state.update(batch)
    return state


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("width", [1, 30, 255, 256, 257, 600])
def test_reads_what_numpy_computes(width: int, ddof: int) -> None:
    rows = normal(70, width, dtype=torch.float64) + torch.arange(width) / 100
    state = filled(rows[:30], rows[30:], dtype=torch.float64)
    state.scatter += torch.full_like(state.scatter, torch.nan).triu(1).nan_to_num(torch.nan, 0, 0)
    got = state.covariance(ddof=ddof)
    np.testing.assert_allclose(got, np.cov(rows.numpy(), rowvar=False, ddof=ddof).reshape(width, width), atol=1e-12)
    assert same_bits(got, got.T.contiguous())
    np.testing.assert_allclose(state.covariance(center=False, ddof=ddof), rows.T @ rows / (70 - ddof), atol=1e-11)
    assert (state.rows, state.weight, state.rejected, state.effective_rows) == (70, 70.0, 0, 70.0)


def test_the_second_moment_is_that_of_rmt_kd_also_where_the_mean_rules() -> None:
    rows = normal(900, D) + 100
    got = filled(rows).covariance(center=False)
    want = rows.double().T @ rows.double() / 900
    assert ((got - want).abs() <= 3e-7 * want.abs()).all()


def test_effective_rows_of_a_decaying_state_approach_their_limit() -> None:
    state = filled(*(normal(1, 3, seed=i) for i in range(200)), decay=0.9)
    assert state.rows == 200
    assert state.weight == pytest.approx(1 / (1 - 0.9), rel=1e-8)
    assert state.effective_rows == pytest.approx((1 + 0.9) / (1 - 0.9), rel=1e-8)
    assert StreamingCovariance(3).effective_rows == 0


def test_a_decaying_state_follows_a_stream_that_changes() -> None:
    early, late = normal(2000, D), normal(2000, D, seed=1) * 3 + 5
    state = filled(*early.split(100), *late.split(100), decay=0.5)
    torch.testing.assert_close(state.mean.float(), torch.full((D,), 5.0), rtol=0, atol=1.0)
    torch.testing.assert_close(state.covariance().diagonal(), torch.full((D,), 9.0), rtol=0.6, atol=0)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    parts = draw(st.integers(1, 9))
    return {
        "cuts": sorted(draw(st.lists(st.integers(0, 900), min_size=parts - 1, max_size=parts - 1))),
        "merges": [draw(st.tuples(st.integers(0, n - 1), st.integers(0, n - 2))) for n in range(parts, 1, -1)],
        "dtype": draw(st.sampled_from((torch.float32, torch.float64))),
        "offset": draw(st.sampled_from((0.0, 2.0, 1e4))),
        "drift": draw(st.sampled_from((0.0, 1.0, 50.0))),
        "weighted": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=80)
@given(trees())
def test_merging_is_one_pass_whatever_the_split_and_the_order(case: dict[str, Any]) -> None:
    rows = normal(900, D, seed=case["seed"]) + case["drift"] * torch.linspace(-1, 1, 900)[:, None] + case["offset"]
    weights = normal(900, seed=case["seed"] + 1).abs() if case["weighted"] else torch.ones(900)
    whole = StreamingCovariance(D, dtype=case["dtype"])
    whole.update(rows, weights)
    parts = []
    for begin, end in zip((0, *case["cuts"]), (*case["cuts"], 900), strict=True):
        parts.append(StreamingCovariance(D, dtype=case["dtype"]))
        parts[-1].update(rows[begin:end], weights[begin:end])
    for into, other in case["merges"]:
        taken = parts.pop(into)
        parts[other].merge(taken)
    (merged,) = parts
    got, want = merged.covariance(), whole.covariance()
    deviation = want.diagonal().sqrt()
    # In float64 what is left is the rounding of the means, which are combined from other sums.
    limit = 1e-6 if case["dtype"] is torch.float32 else 1e-13 + 1e-15 * case["offset"]
    assert ((got - want).abs() <= limit * deviation[:, None] * deviation).all()
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=1e-13 * (1 + case["drift"]))
    torch.testing.assert_close(merged.totals, whole.totals, rtol=1e-13, atol=0)


def test_merging_with_an_empty_state_changes_no_bit() -> None:
    rows = normal(40, D)
    state, want = filled(rows), state_of(filled(rows))
    state.merge(StreamingCovariance(D))
    assert same_covariance(state_of(state), want)
    empty = filled(normal(9, D) * 1e15)
    empty.reset()  # its buffers still hold what they did
    empty.mean.fill_(torch.nan)
    other = filled(rows)
    other.merge(empty)
    assert same_covariance(state_of(other), want)
    empty.merge(state)
    assert same_covariance(state_of(empty), want)


def test_merging_a_state_with_itself_counts_its_rows_twice() -> None:
    state = filled(normal(40, D), dtype=torch.float64)
    before, mean = state.covariance(), state.mean.clone()
    state.merge(state)
    assert (state.rows, state.weight) == (80, 80.0)
    torch.testing.assert_close(state.covariance(), before)
    assert torch.equal(state.mean, mean)


def test_merging_leaves_the_other_state_as_it_was() -> None:
    other = filled(normal(12, D, seed=4) + 3, torch.full((2, D), torch.nan))
    before, state = state_of(other), filled(normal(40, D), torch.full((1, D), torch.nan))
    state.merge(other)
    assert same_covariance(state_of(other), before)
    assert (state.rows, state.rejected) == (52, 3)


def test_reset_is_as_new() -> None:
    state = filled(normal(40, D) + 7)
    state.scatter.fill_(torch.nan)
    state.reset()
    assert (state.rows, state.weight) == (0, 0.0)
    state.update(normal(25, D, seed=2))
    want = filled(normal(25, D, seed=2))
    assert same_bits(state.covariance(), want.covariance()) and same_bits(state.mean, want.mean)


def test_a_saved_state_is_a_copy_and_goes_on_to_the_bit() -> None:
    state = filled(normal(40, D), decay=0.9)
    saved = state.state_dict()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    state.update(normal(30, D, seed=1))
    assert all(same_bits(saved[name], before[name]) for name in before)
    again = StreamingCovariance(D, decay=0.9)
    buffers = [again.mean.data_ptr(), again.scatter.data_ptr(), again.totals.data_ptr()]
    again.load_state_dict(saved)
    assert [again.mean.data_ptr(), again.scatter.data_ptr(), again.totals.data_ptr()] == buffers
    again.update(normal(30, D, seed=1))
    assert same_covariance(state_of(again), state_of(state))


@pytest.mark.parametrize("name", ["mean", "scatter", "totals"])
@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_loading_a_state_that_does_not_fit_changes_nothing(name: str, fault: str) -> None:
    state, other = filled(normal(40, D)), filled(normal(9, D, seed=3)).state_dict()
    before = state_of(state)
    if fault == "missing":
        del other[name]
    else:
        other[name] = other[name][:1] if fault == "shape" else other[name].half()
    with pytest.raises(ShapeError, match=name):
        state.load_state_dict(other)
    assert same_covariance(state_of(state), before)
