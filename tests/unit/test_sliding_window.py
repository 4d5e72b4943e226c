"""window_push_: what one push writes, what it must not touch, and what its result may not depend on."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmtkernels import window_push_
from rmtkernels.reference import window_push_ref_
from tests.helpers import LAYOUTS, State, empty_state, normal, pushed, rows_in_layout, same_bits, same_state

pytestmark = pytest.mark.usefixtures("isa")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32_MAX = torch.finfo(torch.float32).max
# One float32 sum has 32 additions to a lane and one rounding to float32 at the end (Higham, gamma_n).
ROUNDINGS = 34 * 2.0**-24


def assert_near_oracle(state: State, oracle: State) -> None:
    """Ring and counters to the bit; the Gram matrix (the oracle's is float64) within the bound of its own summation."""
    assert same_bits(state.ring, oracle.ring)
    assert torch.equal(state.seen, oracle.seen)
    assert same_bits(state.gram, state.gram.mT)
    ring = oracle.ring.double().abs()
    bound = ROUNDINGS * (ring @ ring.mT) + state.ring.shape[-1] * 2.0**-149
    untouched = oracle.gram.isnan()
    assert state.gram[untouched].isnan().all()
    assert ((state.gram - oracle.gram).abs() <= bound)[~untouched].all()


@st.composite
def pushes(draw: st.DrawFn) -> dict[str, Any]:
    dtype = draw(st.sampled_from(DTYPES))
    return {
        "layers": draw(st.integers(1, 3)),
        "batch": draw(st.integers(1, 4)),
        "window": draw(st.sampled_from((1, 2, 3, 7, 8, 9, 17, 64, 127, 128))),
        "dim": draw(st.sampled_from((1, 2, 7, 8, 9, 16, 23, 255, 256, 257, 263, 264, 511, 520, 777, 1024, 1303))),
        "dtype": dtype,
        "scale": draw(st.sampled_from((1e-7, 1.0, 1e3) if dtype is torch.float16 else (1e-21, 1e-7, 1.0, 1e15))),
        "steps": draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)),
        "layouts": draw(st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3)),
        "masked": draw(st.booleans()),
        "poison": draw(st.sampled_from((None, torch.nan, torch.inf, -torch.inf))),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=120)
@given(pushes())
def test_agrees_with_the_oracle(case: dict[str, Any]) -> None:
    layers, batch, dim, dtype = case["layers"], case["batch"], case["dim"], case["dtype"]
    state = empty_state(layers, batch, case["window"], dim, dtype)
    oracle = State(state.ring.clone(), state.gram.double(), state.seen.clone())
    for turn, steps in enumerate(case["steps"]):
        seed = case["seed"] + 10 * turn
        layouts = ["flat"] * 3 if steps == 1 and "flat" in case["layouts"] else case["layouts"]
        rows = [
            rows_in_layout(layout, batch, steps, dim, seed + layer, dtype, case["scale"])
            for layer, layout in enumerate(layouts[:layers])
        ]
        if case["poison"] is not None and turn % 2 == 0:
            rows[-1] = rows[-1].clone()
            rows[-1][seed % batch, ..., seed % dim] = case["poison"]
        mask = (normal(steps, batch, seed=seed) > -0.5).T if case["masked"] else None
        if mask is not None and rows[0].dim() == 2:
            mask = mask[:, 0]
        window_push_(*state, rows, mask)
        window_push_ref_(*oracle, rows, mask)
    assert_near_oracle(state, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wraps_around_many_times(dtype: torch.dtype) -> None:
    state = empty_state(2, 3, 5, 33, dtype)
    oracle = State(state.ring.clone(), state.gram.double(), state.seen.clone())
    for t in range(23):
        rows = [normal(3, 33, seed=100 * t + layer, dtype=dtype) for layer in range(2)]
        window_push_(*state, rows)
        window_push_ref_(*oracle, rows)
        assert_near_oracle(state, oracle)
    assert state.seen.tolist() == [[23, 0, 22 % 5]] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 8, 11])
def test_every_16_bit_pattern_counts_exactly(dtype: torch.dtype, dim: int) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = torch.zeros(2**16, 2, dim, dtype=dtype)
    lane = torch.arange(2**16) % dim
    rows[torch.arange(2**16), 0, lane] = 1
    rows[torch.arange(2**16), 1, lane] = values
    state = pushed(empty_state(1, 2**16, 2, dim, dtype), [rows])
    exact = values.double()
    kept = exact.square() <= FLOAT32_MAX
    assert torch.equal(state.seen[:, 0], 1 + kept.long())
    assert torch.equal(state.seen[:, 1], (~kept).long())
    assert same_bits(state.ring[0, kept, 1], rows[kept, 1])
    assert torch.equal(state.gram[0, kept, 0, 1].double(), exact[kept])
    assert torch.equal(state.gram[0, kept, 1, 1], exact[kept].square().float())


def test_half_subnormals_survive_a_process_that_flushes_denormals() -> None:
    rows = torch.full((1, 3, 40), 2.0**-24, dtype=torch.float16)
    assert torch.set_flush_denormal(True)
    try:
        state = pushed(empty_state(1, 1, 4, 40, torch.float16), [rows])
    finally:
        torch.set_flush_denormal(False)
    assert (state.gram[0, 0, :3, :3] == 40 * 2.0**-48).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2e19])
@pytest.mark.parametrize("position", [0, 8, 40])
def test_a_row_that_is_not_finite_in_one_layer_changes_nothing_but_a_counter(bad: float, position: int) -> None:
    before = pushed(empty_state(3, 2, 4, 41), [normal(2, 6, 41, seed=s) for s in range(3)])
    rows = [normal(2, 41, seed=10 + s) for s in range(3)]
    want = pushed(before, rows, torch.tensor([True, False]))
    rows[1][1, position] = bad
    after = pushed(before, rows)
    want.seen[1, 1] += 1
    assert same_state(after, want)


def test_a_norm_that_overflows_only_in_sum_is_rejected_and_the_largest_that_fits_is_kept() -> None:
    fits = torch.full((1, 4), 2.0**63)  # squared norm 2^128 would not fit, three quarters of it does
    rows = torch.stack([fits, fits], 1)
    rows[0, 0, 0] = 0
    state = pushed(empty_state(1, 1, 2, 4), [rows])
    assert state.seen.tolist() == [[1, 1, -1]]
    assert state.gram[0, 0, 0, 0] == 3 * 2.0**126


def test_a_masked_row_is_not_read() -> None:
    before = pushed(empty_state(1, 2, 3, 5), [normal(2, 2, 5)])
    rows = torch.full((2, 5), torch.nan)
    after = pushed(before, [rows], torch.tensor([False, False]))
    before.seen[:, 2] = -1
    assert same_state(after, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 3, 4, 11])
def test_rows_at_once_equal_rows_one_by_one(dtype: torch.dtype, steps: int) -> None:
    start = pushed(empty_state(2, 3, 4, 19, dtype), [normal(3, 2, 19, seed=s, dtype=dtype) for s in range(2)])
    rows = [normal(3, steps, 19, seed=5 + s, dtype=dtype) for s in range(2)]
    rows[1][2, steps // 2, 3] = torch.nan
    mask = normal(3, steps, seed=9) > -0.7
    one_by_one = start
    for t in range(steps):
        one_by_one = pushed(one_by_one, [row[:, t] for row in rows], mask[:, t])
    assert same_state(pushed(start, rows, mask), one_by_one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_alone_and_a_layer_alone_give_the_same_bits(dtype: torch.dtype) -> None:
    rows = [normal(5, 12, 301, seed=s, dtype=dtype) for s in range(3)]
    mask = normal(5, 12, seed=9) > -0.5
    together = pushed(empty_state(3, 5, 7, 301, dtype), rows, mask)
    for b in range(5):
        alone = pushed(empty_state(3, 1, 7, 301, dtype), [row[b : b + 1] for row in rows], mask[b : b + 1])
        assert same_state(alone, together.of_sequence(b))
    for layer in range(3):
        alone = pushed(empty_state(1, 5, 7, 301, dtype), [rows[layer]], mask)
        assert same_bits(alone.gram[0], together.gram[layer])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_rows_does_not_change_a_bit(layout: str) -> None:
    row = rows_in_layout(layout, 3, 1, 270, 4, torch.float32, 1.0)
    start = pushed(empty_state(1, 3, 4, 270), [normal(3, 3, 270)])
    assert same_state(pushed(start, [row]), pushed(start, [row.clone(memory_format=torch.contiguous_format)]))


def test_threads_and_repetition_do_not_change_a_bit(set_threads: Callable[[int], None]) -> None:
    rows = [normal(64, 2, 2048, seed=s) for s in range(2)]
    states = []
    for threads in (1, 2, 2, 3):
        set_threads(threads)
        states.append(pushed(empty_state(2, 64, 16, 2048), rows))
    assert all(same_state(states[0], other) for other in states[1:])


def test_no_drift_over_5000_tokens() -> None:
    stream = normal(1, 5000, 65) + 3
    state = empty_state(1, 1, 8, 65)
    for first in range(0, 5000, 37):
        window_push_(*state, [stream[:, first : first + 37]])
    slots = [4992 + s for s in range(8)]
    assert torch.equal(state.ring[0], stream[:, slots])
    assert same_bits(pushed(empty_state(1, 1, 8, 65), [stream[:, slots]]).gram, state.gram)


@pytest.mark.parametrize("dim", [4096, 20001])
def test_wide_rows_keep_the_error_near_one_rounding(dim: int) -> None:
    rows = normal(1, 6, dim)
    state = pushed(empty_state(1, 1, 6, dim), [rows])
    exact = rows[0].double() @ rows[0].double().T
    norms = exact.diagonal().sqrt()
    assert ((state.gram[0, 0] - exact).abs() <= 2.0**-23 * norms * norms[:, None]).all()


@pytest.mark.parametrize("shape", [(1, 0, 3, 4), (0, 2, 3, 4), (1, 2, 3, 0)])
def test_empty_dimensions(shape: tuple[int, int, int, int]) -> None:
    state = empty_state(*shape)
    window_push_(*state, [torch.zeros(shape[1], 2, shape[3]) for _ in range(shape[0])])
    if shape[3] == 0:
        assert state.seen.tolist() == [[2, 0, 1]] * 2
        assert (state.gram[0, :, :2, :2] == 0).all()


def test_no_rows_change_nothing() -> None:
    before = pushed(empty_state(1, 2, 3, 4), [normal(2, 2, 4)])
    after = pushed(before, [torch.zeros(2, 0, 4)], torch.zeros(2, 0, dtype=torch.bool))
    assert same_state(after, before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_that_require_grad_keep_no_graph_alive(backend: str) -> None:
    state = empty_state(1, 2, 3, 4)
    leaf = torch.randn(2, 4, requires_grad=True)
    alive, hidden = weakref.ref(leaf), leaf * leaf  # the product's graph holds its factors
    del leaf
    gc.collect()
    assert alive() is not None
    window_push_(*state, [hidden], backend=backend)
    assert not any(tensor.requires_grad for tensor in state)
    del hidden
    gc.collect()
    assert alive() is None


def test_rows_are_left_as_they_were() -> None:
    rows = [normal(2, 3, 17, dtype=torch.bfloat16)]
    copies = [row.clone() for row in rows]
    pushed(empty_state(1, 2, 2, 17, torch.bfloat16), rows)
    assert all(map(same_bits, rows, copies))


def test_works_on_buffers_that_are_views(isa: str) -> None:
    whole: list[Tensor] = [torch.full((3, 2, 2, 4, 9), torch.nan), torch.full((3, 2, 2, 4, 4), torch.nan)]
    state = State(whole[0][1], whole[1][1], torch.zeros(6, 3, dtype=torch.int64)[2:4])
    rows = [normal(2, 5, 9, seed=s) for s in range(2)]
    window_push_(*state, rows)
    assert same_state(state, pushed(empty_state(2, 2, 4, 9), rows))
    for tensor in whole:
        assert tensor[0].isnan().all()
        assert tensor[2].isnan().all()
