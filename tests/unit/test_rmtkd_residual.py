"""The basis of the residual stream: orthonormal, of the right span, and fit for LayerNorm."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from rmtkd.residual import residual_basis


def moment(d: int, rank: int, seed: int = 0) -> Tensor:
    rows = torch.randn(rank, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ torch.diag(torch.logspace(1, -1, rank, dtype=torch.float64)) @ rows


@pytest.mark.parametrize("keep_mean", [True, False])
@pytest.mark.parametrize("k", [1, 2, 7, 15])
def test_columns_are_orthonormal(k: int, keep_mean: bool) -> None:
    basis = residual_basis(moment(16, 16), k, keep_mean=keep_mean)
    assert basis.shape == (16, k)
    torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep_mean", [True, False])
def test_the_full_width_changes_nothing(keep_mean: bool) -> None:
    assert torch.equal(residual_basis(moment(9, 9), 9, keep_mean=keep_mean), torch.eye(9, dtype=torch.float64))


def test_without_a_mean_the_span_is_that_of_the_leading_eigenvectors() -> None:
    matrix = moment(20, 20)
    leading = torch.linalg.eigh(matrix).eigenvectors[:, -6:]
    basis = residual_basis(matrix, 6, keep_mean=False)
    torch.testing.assert_close(basis @ basis.T, leading @ leading.T, rtol=0, atol=1e-5)


def test_with_a_mean_it_is_the_best_span_that_holds_it() -> None:
    matrix = moment(20, 20)
    without = torch.eye(20, dtype=torch.float64) - 1 / 20
    leading = torch.linalg.eigh(without @ matrix @ without).eigenvectors[:, -5:]
    basis = residual_basis(matrix, 6, keep_mean=True)
    torch.testing.assert_close(basis @ basis.T, leading @ leading.T + 1 / 20, rtol=0, atol=1e-5)


def test_layer_norm_commutes_with_the_basis_where_the_stream_lives_in_it() -> None:
    """Narrow and wide LayerNorm subtract one mean, and differ by the root of the widths' ratio."""
    d, k = 24, 7
    basis = residual_basis(moment(d, d), k, keep_mean=True)
    stream = torch.randn(50, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ basis.T + 3
    wide = layer_norm(stream, (d,), eps=0) @ basis
    narrow = layer_norm(stream @ basis, (k,), eps=0) * (d / k) ** 0.5
    torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-6)


def test_axes_stay_near_the_old_ones() -> None:
    """A stream that lives on a few axes keeps them, so that gains stay with their axes."""
    matrix = torch.diag(torch.tensor([0.0, 5.0, 0.0, 3.0, 4.0, 0.0, 2.0], dtype=torch.float64))
    basis = residual_basis(matrix, 4, keep_mean=False)
    torch.testing.assert_close(basis, torch.eye(7, dtype=torch.float64)[:, [1, 3, 4, 6]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep_mean", [True, False])
def test_a_moment_of_lower_rank_than_the_width(keep_mean: bool) -> None:
    matrix = moment(12, 3)
    basis = residual_basis(matrix, 8, keep_mean=keep_mean)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)
    kept = (basis.T @ matrix @ basis).trace() / matrix.trace()
    assert kept > 1 - 1e-9
