"""Narrowed heads: the least error there is, and no loss where there is nothing to lose."""

import pytest
import torch
from torch import Tensor

from bench.experiments.rmtkd_heads import narrow_scores, narrow_values


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
