"""The basis of the residual stream: orthonormal, of the right span, and fit for LayerNorm."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from rmtkd.residual import layer_norm_basis, norm_gain, rms_norm_basis


def moment(d: int, rank: int, seed: int = 0) -> Tensor:
    rows = torch.randn(rank, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ torch.diag(torch.logspace(1, -1, rank, dtype=torch.float64)) @ rows


def basis_of(matrix: Tensor, width: int, kind: str) -> Tensor:
    return (
        layer_norm_basis(matrix, width) if kind == "layer" else rms_norm_basis(matrix, width, torch.ones(len(matrix)))
    )


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("k", [1, 2, 7, 15])
def test_columns_are_orthonormal(k: int, kind: str) -> None:
    basis = basis_of(moment(16, 16), k, kind)
    assert basis.shape == (16, k)
    torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_full_width_changes_nothing(kind: str) -> None:
    assert torch.equal(basis_of(moment(9, 9), 9, kind), torch.eye(9, dtype=torch.float64))


def test_without_a_mean_the_span_is_that_of_the_leading_eigenvectors() -> None:
    matrix = moment(20, 20)
    leading = torch.linalg.eigh(matrix).eigenvectors[:, -6:]
    basis = rms_norm_basis(matrix, 6, torch.rand(20))
    torch.testing.assert_close(basis @ basis.T, leading @ leading.T, rtol=0, atol=1e-5)


def test_with_a_mean_it_is_the_best_span_that_holds_it() -> None:
    matrix = moment(20, 20)
    without = torch.eye(20, dtype=torch.float64) - 1 / 20
    leading = torch.linalg.eigh(without @ matrix @ without).eigenvectors[:, -5:]
    basis = layer_norm_basis(matrix, 6)
    torch.testing.assert_close(basis @ basis.T, leading @ leading.T + 1 / 20, rtol=0, atol=1e-5)


def test_layer_norm_commutes_with_the_basis_where_the_stream_lives_in_it() -> None:
    """Narrow and wide LayerNorm subtract one mean, and differ by the root of the widths' ratio."""
    d, k = 24, 7
    basis = layer_norm_basis(moment(d, d), k)
    stream = torch.randn(50, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ basis.T + 3
    wide = layer_norm(stream, (d,), eps=0) @ basis
    narrow = layer_norm(stream @ basis, (k,), eps=0) * (d / k) ** 0.5
    torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-6)


def test_axes_stay_near_the_old_ones() -> None:
    """A stream that lives on some axes, of which it keeps all: gains stay with their axes, but for the mean's part."""
    matrix = torch.diag(torch.tensor([0.0, 5.0, 0.0, 3.0, 4.0, 0.0, 2.0], dtype=torch.float64))
    basis = layer_norm_basis(matrix, 5)
    assert sorted(basis.square().max(0).indices.tolist())[-3:] == [3, 4, 6]
    assert basis.square().max(0).values.sort().values[1] > 0.5


def test_the_last_gains_are_diagonal_in_the_basis() -> None:
    gains = torch.rand(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    basis = rms_norm_basis(moment(20, 20), 6, gains)
    inside = basis.T @ torch.diag(gains) @ basis
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-9)
    torch.testing.assert_close(inside.diagonal(), basis.square().T @ gains, rtol=0, atol=1e-9)


def test_norm_gain_makes_up_for_the_root_mean_square() -> None:
    """Of rows that keep an equal share of their energy it is what the narrow norm lacks."""
    matrix = torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    row = torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    basis = torch.eye(4, dtype=torch.float64)[:, :2]
    wide = (row / row.square().mean().sqrt()) @ basis
    narrow = (row @ basis) / (row @ basis).square().mean().sqrt()
    torch.testing.assert_close(norm_gain(matrix, basis) * narrow, wide)
    assert norm_gain(matrix, torch.eye(4, dtype=torch.float64)) == 1


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_moment_of_lower_rank_than_the_width(kind: str) -> None:
    matrix = moment(12, 3)
    basis = basis_of(matrix, 8, kind)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)
    kept = (basis.T @ matrix @ basis).trace() / matrix.trace()
    assert kept > 1 - 1e-9
