"""SlidingWindow: the state of window_push_ with a life of its own."""

from typing import Any

import pytest
import torch

from rmtkernels import DtypeError, ShapeError, SlidingWindow, spectrum_descriptors
from tests.helpers import State, empty_state, normal, pushed, same_bits, same_state


def state_of(window: SlidingWindow) -> State:
    return State(window.ring, window.gram, window.seen).copy()


def rows(steps: int, seed: int = 0, batch: int = 3) -> list[torch.Tensor]:
    return [normal(batch, steps, 9, seed=seed + layer) for layer in range(2)]


def filled(steps: int = 6) -> SlidingWindow:
    window = SlidingWindow(2, 3, 4, 9)
    window.update(rows(steps))
    return window


def test_starts_empty_with_the_asked_dtype() -> None:
    window = SlidingWindow(2, 3, 4, 9, dtype=torch.bfloat16)
    assert (window.ring.shape, window.gram.shape, window.seen.shape) == ((2, 3, 4, 9), (2, 3, 4, 4), (3, 3))
    assert (window.ring.dtype, window.gram.dtype) == (torch.bfloat16, torch.float32)
    assert window.rows.tolist() == window.rejected.tolist() == [0, 0, 0]


def test_updates_as_the_operator_does() -> None:
    window = filled()
    mask = torch.tensor([True, False, True])
    one = [row[:, 0] for row in rows(1, seed=7)]
    one[0][2, 3] = torch.inf
    want = pushed(state_of(window), one, mask)
    window.update(one, mask)
    assert same_state(state_of(window), want)
    assert window.rows.tolist() == [7, 6, 6]
    assert window.rejected.tolist() == [0, 0, 1]


def test_descriptors_are_those_of_the_gram_matrices() -> None:
    window = filled(3)
    for options in ({}, {"center": False}, {"joint": "trace"}):
        got = window.descriptors(**options)
        want = spectrum_descriptors(window.gram, torch.full((3,), 3), 9, **options)
        assert all(map(same_bits, got, want))


def test_a_sequence_reset_in_mid_stream_is_as_new_and_the_others_go_on() -> None:
    window, kept = filled(), filled()
    window.ring[:, 1] = torch.nan  # a reset costs O(B): what lies in the buffers must not matter
    window.gram[:, 1] = torch.nan
    window.reset(torch.tensor([False, True, False]))
    assert window.seen.tolist() == [[6, 0, 1], [0, 0, 0], [6, 0, 1]]
    fresh = SlidingWindow(2, 1, 4, 9)
    for turn, steps in enumerate((1, 2, 3)):
        more = rows(steps, seed=10 + turn)
        for state in (window, kept):
            state.update(more)
        fresh.update([row[1:2] for row in more])
        values, want, alone = window.descriptors(), kept.descriptors(), fresh.descriptors()
        for got, other, single in zip(values, want, alone, strict=True):
            assert same_bits(got[:, [0, 2]], other[:, [0, 2]])
            assert same_bits(got[:, 1:2], single)


def test_reset_of_all() -> None:
    window = filled()
    window.reset()
    assert (window.seen == 0).all()
    window.update(rows(2, seed=5))
    want = pushed(empty_state(2, 3, 4, 9), rows(2, seed=5))
    assert same_bits(window.gram[:, :, :2, :2], want.gram[:, :, :2, :2])


@pytest.mark.parametrize(
    "sequences", [torch.ones(2, dtype=torch.bool), torch.ones(3, 1, dtype=torch.bool), torch.tensor([1, 0, 1])]
)
def test_reset_refuses_other_shapes_and_dtypes(sequences: torch.Tensor) -> None:
    window = filled()
    before = state_of(window)
    with pytest.raises(ShapeError):
        window.reset(sequences)
    assert same_state(state_of(window), before)


def test_a_saved_state_is_a_copy_and_goes_on_to_the_bit() -> None:
    window = filled()
    saved = window.state_dict()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    window.update(rows(3, seed=20))
    assert all(same_bits(saved[name], before[name]) for name in before)
    again = SlidingWindow(2, 3, 4, 9)
    buffers = [again.ring.data_ptr(), again.gram.data_ptr(), again.seen.data_ptr()]
    again.load_state_dict(saved)
    assert [again.ring.data_ptr(), again.gram.data_ptr(), again.seen.data_ptr()] == buffers
    again.update(rows(3, seed=20))
    assert same_state(state_of(again), state_of(window))
    saved["ring"].zero_()
    assert again.ring.abs().sum() > 0


@pytest.mark.parametrize("name", ["ring", "gram", "seen"])
@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_loading_a_state_that_does_not_fit_changes_nothing(name: str, fault: str) -> None:
    window, other = filled(), filled(9)
    before, state = state_of(window), other.state_dict()
    if fault == "missing":
        del state[name]
    else:
        state[name] = state[name][:1] if fault == "shape" else state[name].half()
    with pytest.raises(ShapeError, match=name):
        window.load_state_dict(state)
    assert same_state(state_of(window), before)


@pytest.mark.parametrize(
    ("error", "bad"),
    [(ShapeError, rows(1)[:1]), (ShapeError, rows(1, batch=2)), (DtypeError, [r.half() for r in rows(1)])],
)
def test_a_refused_update_changes_nothing(error: type[Exception], bad: Any) -> None:
    window = filled()
    before = state_of(window)
    with pytest.raises(error):
        window.update(bad)
    assert same_state(state_of(window), before)
