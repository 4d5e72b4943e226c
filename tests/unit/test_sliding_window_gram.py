"""window_gram: all windows of whole sequences are, to the bit, what pushing row by row leaves."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmtkernels import spectrum_eigvalsh, window_gram, window_push_
from tests.helpers import LAYOUTS, empty_state, normal, rows_in_layout, same_bits

pytestmark = pytest.mark.usefixtures("isa", "nan_memory")


def by_pushing(hidden: Tensor, window: int, stride: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The contract, spelt out with window_push_; zero in slots not yet in use."""
    batch, steps, dim = hidden.shape
    state = empty_state(1, batch, window, dim, hidden.dtype)
    gram = torch.zeros(batch, steps // stride, window, window)
    seen = torch.zeros(batch, steps // stride, dtype=torch.int64)
    for t in range(steps):
        window_push_(*state, [hidden[:, t]], None if mask is None else mask[:, t])
        if (t + 1) % stride == 0:
            gram[:, t // stride] = state.gram[0].nan_to_num(0.0)
            seen[:, t // stride] = state.seen[:, 0]
    return gram, seen


@settings(max_examples=80)
@given(
    batch=st.integers(0, 3),
    steps=st.integers(0, 40),
    dim=st.sampled_from((1, 7, 8, 19, 256, 265)),
    window=st.sampled_from((1, 2, 5, 8, 31, 128)),
    stride=st.sampled_from((1, 2, 5, 41)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    layout=st.sampled_from(LAYOUTS),
    masked=st.booleans(),
    poisoned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_pushing_row_by_row(
    batch: int,
    steps: int,
    dim: int,
    window: int,
    stride: int,
    dtype: torch.dtype,
    layout: str,
    masked: bool,
    poisoned: bool,
    seed: int,
) -> None:
    hidden = rows_in_layout(layout, batch, steps, dim, seed, dtype, 1.0).reshape(batch, steps, dim)
    if poisoned and hidden.numel():
        hidden = hidden.clone()
        hidden[seed % batch, seed % steps, seed % dim] = torch.inf
    mask = (normal(steps, batch, seed=seed) > -0.5).T if masked else None
    gram, seen = window_gram(hidden, window, stride, mask)
    want_gram, want_seen = by_pushing(hidden, window, stride, mask)
    assert same_bits(gram, want_gram)
    assert torch.equal(seen, want_seen)


def test_a_sequence_that_is_masked_whole_has_zero_windows() -> None:
    mask = torch.tensor([[False] * 4, [True] * 4])
    gram, seen = window_gram(normal(2, 4, 9), 3, 2, mask)
    assert seen.tolist() == [[0, 0], [2, 4]]
    assert (gram[0] == 0).all()
    assert (gram[1, 0, 2] == 0).all()
    assert (gram[1, 1].diagonal() > 0).all()


def test_threads_do_not_change_a_bit(set_threads: Callable[[int], None]) -> None:
    hidden = normal(2, 300, 1024)
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        results.append(window_gram(hidden, 32))
    for gram, seen in results[1:]:
        assert same_bits(gram, results[0][0])
        assert torch.equal(seen, results[0][1])


def test_the_order_of_slots_does_not_change_eigenvalues() -> None:
    hidden = normal(1, 21, 50, dtype=torch.float32)
    ring_order = window_gram(hidden, 8)[0][0, -1]
    in_time = hidden[0, -8:].double()
    want = torch.linalg.eigvalsh(in_time @ in_time.T)
    assert ((spectrum_eigvalsh(ring_order) - want).abs() <= 1e-6 * want[-1]).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_results_carry_no_gradient(backend: str) -> None:
    hidden = normal(1, 5, 4).requires_grad_()
    assert not any(result.requires_grad for result in window_gram(hidden, 3, backend=backend))
