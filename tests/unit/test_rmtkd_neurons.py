"""Neurons that stay, and what the others are made of: against least squares and exhaustive search."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from rmtkd.neurons import choose_neurons, interpolation, select


def moment_of(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def activations(n: int, d: int, rank: int, seed: int = 0, noise: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, d, generator=generator, dtype=torch.float64
    )
    return mixed + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)


def test_interpolation_is_least_squares_on_the_rows() -> None:
    rows = activations(500, 12, 12) @ torch.diag(torch.logspace(0, 2, 12, dtype=torch.float64))
    kept = torch.tensor([1, 4, 5, 9, 11])
    expected = torch.linalg.lstsq(rows[:, kept], rows).solution.T
    torch.testing.assert_close(interpolation(moment_of(rows), kept), expected, rtol=1e-5, atol=1e-6)


def test_neurons_that_stay_are_exact() -> None:
    rows = activations(500, 12, 7)
    neurons = choose_neurons(moment_of(rows), 5, "leverage")
    kept = neurons.before.argmax(1)
    assert torch.equal(neurons.after[kept], torch.eye(5, dtype=torch.float64))
    assert torch.equal(neurons.before.sum(1), torch.ones(5, dtype=torch.float64))
    assert kept.tolist() == sorted(set(kept.tolist()))


def test_activations_of_low_rank_are_rebuilt_without_loss() -> None:
    rows = activations(400, 30, 6)
    neurons = choose_neurons(moment_of(rows), 6, "leverage")
    rebuilt = rows @ neurons.before.T @ neurons.after.T
    assert (rebuilt - rows).norm() < 1e-5 * rows.norm()


def test_dead_neurons_are_not_kept_and_cost_nothing() -> None:
    rows = activations(400, 20, 20)
    rows[:, ::2] = 0
    neurons = choose_neurons(moment_of(rows), 10, "leverage")
    assert neurons.before.argmax(1).tolist() == list(range(1, 20, 2))
    torch.testing.assert_close(rows @ neurons.before.T @ neurons.after.T, rows, rtol=0, atol=1e-6)


def test_selection_is_near_the_best_of_all_subsets() -> None:
    rows = activations(300, 9, 4, noise=0.3)
    moment = moment_of(rows)

    def error(kept: Tensor) -> float:
        return float((rows - rows[:, kept] @ interpolation(moment, kept).T).square().sum())

    errors = sorted(error(torch.tensor(kept)) for kept in combinations(range(9), 4))
    chosen = error(choose_neurons(moment, 4, "leverage").before.argmax(1))
    assert chosen <= 1.5 * errors[0]
    assert chosen < 0.5 * errors[len(errors) // 2]


def test_leverage_beats_projection_through_a_relu() -> None:
    """The projection takes the nonlinearity to commute with it."""
    inputs = activations(1000, 10, 10, seed=3)
    weight = torch.randn(24, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wide = (inputs @ weight.T).relu()
    errors = {}
    for how in ("leverage", "projection"):
        neurons = choose_neurons(moment_of(wide), 12, how)
        narrow = (inputs @ (neurons.before @ weight).T).relu()
        errors[how] = float((narrow @ neurons.after.T - wide).norm() / wide.norm())
    assert errors["leverage"] < 0.5 * errors["projection"]


def test_projection_is_the_leading_eigenvectors() -> None:
    rows = activations(400, 15, 15)
    neurons = choose_neurons(moment_of(rows), 4, "projection")
    vectors = torch.linalg.eigh(moment_of(rows)).eigenvectors[:, -4:]
    torch.testing.assert_close(neurons.after @ neurons.before, vectors @ vectors.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["leverage", "projection"])
def test_all_neurons_stay_as_they_are(how: str) -> None:
    neurons = choose_neurons(moment_of(activations(50, 6, 6)), 6, how)
    assert torch.equal(neurons.before, torch.eye(6, dtype=torch.float64))
    assert torch.equal(neurons.after, torch.eye(6, dtype=torch.float64))


def test_select_takes_the_longest_column_first() -> None:
    features = torch.tensor([[1.0, 0.0, 3.0, 0.0], [0.0, 2.0, 0.0, 0.1]])
    assert select(features, 1).tolist() == [2]
    assert select(features, 2).tolist() == [1, 2]
