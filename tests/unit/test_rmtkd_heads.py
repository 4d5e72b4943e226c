"""Chosen and narrowed heads: the least error there is, and no loss where there is nothing to lose."""

import pytest
import torch
from torch import Tensor

from rmtkd.errors import PlanError
from rmtkd.heads import choose_heads, count_heads, narrow_scores, narrow_values
from rmtkd.neurons import interpolation


def moment(dim: int, rank: int, seed: int) -> Tensor:
    factor = torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ torch.diag(torch.logspace(0, -1, rank, dtype=torch.float64)) @ factor.T


def score_error(queries: Tensor, keys: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """E (qᵀ k − qᵀ B Dᵀ k)² for independent q and k."""
    change = torch.eye(len(b), dtype=torch.float64) - b @ d.T
    return (queries @ change @ keys @ change.T).trace()


def test_the_error_in_scores_is_the_tail_of_singular_values() -> None:
    queries, keys = moment(8, 8, 0), moment(8, 8, 1)
    b, d = narrow_scores(queries, keys, 3)
    spectrum = torch.linalg.eigvals(queries @ keys).real.sort(descending=True).values  # squared singular values
    torch.testing.assert_close(score_error(queries, keys, b, d), spectrum[3:].sum(), rtol=1e-8, atol=1e-10)


def test_no_other_pair_of_this_rank_does_better() -> None:
    queries, keys = moment(6, 6, 2), moment(6, 6, 3)
    best = score_error(queries, keys, *narrow_scores(queries, keys, 2))
    generator = torch.Generator().manual_seed(4)
    b, d = narrow_scores(queries, keys, 2)
    for _ in range(50):
        nudged = [m + 0.05 * torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in (b, d)]
        assert score_error(queries, keys, *nudged) > best


def test_moments_of_low_rank_lose_nothing() -> None:
    queries, keys = moment(8, 3, 5), moment(8, 5, 6)
    b, d = narrow_scores(queries, keys, 3)
    assert score_error(queries, keys, b, d) < 1e-12 * (queries @ keys).trace()
    assert b.isfinite().all() and d.isfinite().all()


def test_queries_and_keys_share_evenly() -> None:
    queries, keys = moment(8, 8, 7), moment(8, 8, 8) * 1e6
    b, d = narrow_scores(queries, keys, 4)
    torch.testing.assert_close(b.T @ queries @ b, d.T @ keys @ d, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d.T @ b, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-8)


def test_values_lose_the_tail_of_what_they_write() -> None:
    generator = torch.Generator().manual_seed(9)
    values, output = moment(6, 6, 10), torch.randn(20, 6, generator=generator, dtype=torch.float64)
    b, d = narrow_values(values, output, 2)
    change = output - output @ b @ d.T
    spectrum = torch.linalg.eigvalsh(output @ values @ output.T)
    torch.testing.assert_close((change @ values @ change.T).trace(), spectrum[:-2].sum(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("zero", ["queries", "keys", "both"])
def test_a_head_that_does_nothing_stays_finite(zero: str) -> None:
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    queries = nothing if zero != "keys" else moment(4, 4, 11)
    keys = nothing if zero != "queries" else moment(4, 4, 12)
    b, d = narrow_scores(queries, keys, 2)
    assert b.isfinite().all() and d.isfinite().all()


@pytest.mark.parametrize(
    ("width", "heads", "head_width", "expected"),
    [(192, 12, 32, 6), (168, 12, 32, 6), (264, 12, 32, 11), (384, 12, 32, 12), (12, 12, 32, 1), (96, 2, 64, 2)],
)
def test_as_few_heads_as_can_have_the_width(width: int, heads: int, head_width: int, expected: int) -> None:
    assert count_heads(width, heads, head_width) == expected


@pytest.mark.parametrize("width", [13, 26, 391])
def test_a_width_that_no_equal_heads_have(width: int) -> None:
    with pytest.raises(PlanError, match=f"{width} cannot be the width of 12 equal heads, .* a multiple of 12 can"):
        count_heads(width, 12, 12)


def rest(moment: Tensor, output: Tensor, heads: int, kept: list[int]) -> float:
    """E‖W a − A a_S‖² of the best A, directly."""
    own = torch.arange(len(moment)).view(heads, -1)[kept].flatten()
    change = output - (output @ interpolation(moment, own)) @ torch.eye(len(moment), dtype=torch.float64)[own]
    return float((change @ moment @ change.T).trace())


@pytest.mark.parametrize("count", [4, 3, 2, 1])
def test_every_head_that_goes_is_the_one_that_is_missed_least(count: int) -> None:
    heads, whole = 5, moment(15, 15, 13)
    output = torch.randn(7, 15, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    kept = list(range(heads))
    while len(kept) > count:
        kept = min(([k for k in kept if k != gone] for gone in kept), key=lambda left: rest(whole, output, heads, left))
    assert choose_heads(whole, output, heads, count) == kept


def test_heads_that_others_make_up_for_go() -> None:
    """Heads 0 and 3 alike, 2 always zero, 1 read by nobody: one of the first pair is all there is."""
    generator = torch.Generator().manual_seed(15)
    rows = torch.randn(200, 4, 3, generator=generator, dtype=torch.float64)
    rows[:, 3], rows[:, 2] = 2 * rows[:, 0], 0
    rows = rows.flatten(1)
    output = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    output[:, 3:6] = 0
    (kept,) = choose_heads(rows.T @ rows / 200, output, 4, 1)
    assert kept in (0, 3)


def test_a_head_that_keeps_its_width_stays_as_it_is() -> None:
    identity = torch.eye(4, dtype=torch.float64)
    for found in (*narrow_scores(moment(4, 4, 16), moment(4, 4, 17), 4), *narrow_values(identity, identity, 4)):
        assert torch.equal(found, identity)
