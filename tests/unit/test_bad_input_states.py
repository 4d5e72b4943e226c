"""States that were loaded or filled by hand: counters decide where kernels write, so they are checked."""

import pytest
import torch

import rmtkernels
from rmtkernels import RangeError, ShapeError
from tests.helpers import State, normal, same_bits, same_state

L, B, N, D = 2, 3, 4, 8


def filled() -> rmtkernels.SlidingWindow:
    state = rmtkernels.SlidingWindow(L, B, N, D)
    for seed in range(6):
        state.update([normal(B, D, seed=seed), normal(B, D, seed=seed + 50)])
    return state


def buffers(state: rmtkernels.SlidingWindow) -> State:
    return State(state.ring, state.gram, state.seen)


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, -1), (0, -3), (0, -(2**63)), (0, 2**63 - 1), (1, -1), (2, N), (2, 2**40)],
    ids=lambda value: str(value),
)
def test_counters_that_no_window_has_are_not_loaded(column: int, value: int) -> None:
    state, other = filled(), filled().state_dict()
    other["seen"][1, column] = value
    before = buffers(state).copy()
    with pytest.raises(RangeError, match="seen"):
        state.load_state_dict(other)
    assert same_state(buffers(state), before)


@pytest.mark.parametrize("value", [-1, -3, -(2**40), -(2**63), 2**63 - 1])
@pytest.mark.parametrize("steps", [1, 5])
def test_no_row_is_written_where_a_counter_points_outside(value: int, steps: int) -> None:
    """The ring lies within a larger tensor, of which nothing else may change."""
    around = torch.full((3 * L * B * N * D,), 7.0)
    ring = around[L * B * N * D : 2 * L * B * N * D].view(L, B, N, D)
    gram, seen = torch.zeros(L, B, N, N), torch.zeros(B, 3, dtype=torch.int64)
    seen[1, 0] = value
    rows = [normal(B, steps, D, seed=seed) for seed in range(L)]
    with pytest.raises(RangeError, match="count rows from 0 on"):
        rmtkernels.window_push_(ring, gram, seen, rows, backend="cpu")
    assert (around == 7).all() and not gram.any() and seen.tolist() == [[0, 0, 0], [value, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("use", ["merge", "update"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_covariance_that_is_not_finite_is_refused_when_it_is_used(use: str, value: float) -> None:
    state, other = rmtkernels.StreamingCovariance(D), rmtkernels.StreamingCovariance(D)
    state.update(normal(9, D))
    other.update(normal(9, D, seed=1))
    hostile = state.state_dict()
    hostile["mean"][2] = value
    state.load_state_dict(hostile)
    with pytest.raises(RangeError):
        state.merge(other) if use == "merge" else state.update(normal(4, D))
    assert all(same_bits(value, hostile[name]) for name, value in state.state_dict().items())


@pytest.mark.parametrize("batch", [0, 1])
def test_an_empty_batch_is_nothing_and_no_error(batch: int) -> None:
    window = rmtkernels.SlidingWindow(L, batch, N, D)
    window.update([torch.zeros(batch, 0, D) for _ in range(L)])
    descriptors, eigenvalues = window.descriptors()
    assert descriptors.shape == (L, batch, 24) and eigenvalues.shape == (L, batch, N) and not window.rows.any()
    covariance = rmtkernels.StreamingCovariance(D)
    covariance.update(torch.zeros(0, D))
    assert covariance.rows == 0
    nothing = rmtkernels.lowrank_linear(torch.zeros(0, 3), torch.zeros(1, 3), torch.zeros(5, 1))
    assert nothing.shape == (0, 5)


@pytest.mark.parametrize("window", [0, -1, 129, 2**40])
def test_a_window_of_another_length_is_refused_before_memory_is_taken(window: int) -> None:
    with pytest.raises(ShapeError, match="1 to 128"):
        rmtkernels.SlidingWindow(1, 1, window, 4)
