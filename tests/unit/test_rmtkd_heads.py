"""Which heads stay: those the others cannot make up for."""

import pytest
import torch
from torch import Tensor

from rmtkd.heads import choose_heads
from rmtkd.neurons import interpolation

HEADS = 5


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(seed: int) -> Tensor:
    """(200, 15): heads that resemble each other, of one size or, where the seed is odd, of very different ones."""
    rows = drawn(200, 15, seed=seed) @ drawn(15, 15, seed=seed + 100)
    sizes = 10.0 ** (seed % 2 * 3 * drawn(HEADS, 1, seed=seed + 200))
    return (rows.view(200, HEADS, 3) * sizes).flatten(1)


def rest(moment: Tensor, output: Tensor, kept: list[int]) -> float:
    """E‖W a − A a_S‖² of the best A, directly."""
    own = torch.arange(len(moment)).view(HEADS, -1)[kept].flatten()
    change = output - output @ interpolation(moment, own) @ torch.eye(len(moment), dtype=torch.float64)[own]
    return float((change @ moment @ change.T).trace())


@pytest.mark.parametrize("seed", range(10))
def test_every_head_that_goes_is_the_one_that_is_missed_least(seed: int) -> None:
    rows, output = activations(seed), drawn(7, 15, seed=seed + 300)
    moment, kept = rows.T @ rows / 200, list(range(HEADS))
    while len(kept) > 1:
        kept = min(([k for k in kept if k != gone] for gone in kept), key=lambda left: rest(moment, output, left))
        assert choose_heads(moment, output, HEADS, len(kept)) == kept


def test_heads_that_others_make_up_for_go() -> None:
    """Heads 0 and 3 are alike, 2 is always zero, 1 read by nobody: one of the first pair is all there is."""
    rows = 1e-5 * drawn(200, 4, 3, seed=15)
    rows[:, 3], rows[:, 2] = 2 * rows[:, 0], 0
    rows = rows.flatten(1)
    output = drawn(6, 12, seed=16)
    output[:, 3:6] = 0
    output[:, 6:9] *= 1e3
    (kept,) = choose_heads(rows.T @ rows / 200, output, 4, 1)
    assert kept in (0, 3)


def test_all_heads_stay_if_none_has_to_go() -> None:
    assert choose_heads(torch.zeros(15, 15), torch.ones(4, 15), HEADS, HEADS) == list(range(HEADS))
