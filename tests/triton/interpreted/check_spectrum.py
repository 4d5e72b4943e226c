"""spectrum_eigvalsh in the checked interpreter: against LAPACK, graded and bad matrices, bits, and planted bugs.
Matrices are small: every step of every Sturm sequence is a handful of NumPy calls."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from rmtkernels import BackendError, spectrum_eigvalsh
from tests.helpers import normal, same_bits
from tests.triton.checked import Counts
from tests.triton.mutants import chosen, mutant

FLOAT, DOUBLE = torch.float32, torch.float64


def matrices(n: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    """A full one, one of low rank, and a huge one with a repeated eigenvalue and a zero row."""
    full, thin = normal(n, n, seed=n, dtype=DOUBLE), normal(n, max(1, n // 3), seed=n, dtype=DOUBLE)
    flat = 1e30 * torch.eye(n, dtype=DOUBLE)
    flat[-1, -1] = 0
    return torch.stack([full + full.mT, thin @ thin.mT, flat]).to(dtype)


def assert_right(values: Tensor, given: Tensor) -> None:
    exact = torch.from_numpy(np.linalg.eigvalsh(given.double().numpy()))
    bound = 2e-15 * exact.abs().amax(-1, keepdim=True) * given.shape[-1] ** 0.5
    bound = bound + 2.0**-24 * exact.abs() if given.dtype == FLOAT else bound
    assert (values.diff(dim=-1) >= 0).all()
    assert ((values.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("n", "dtype"), [(1, DOUBLE), (2, FLOAT), (3, DOUBLE), (7, FLOAT), (11, DOUBLE)])
def test_agrees_with_lapack(counts: Counts, n: int, dtype: torch.dtype) -> None:
    given = matrices(n, dtype)
    upper = torch.ones(n, n, dtype=torch.bool).triu(1)
    values = spectrum_eigvalsh(given.masked_fill(upper, torch.nan), backend="triton")
    assert_right(values, given)
    assert counts.product_flops == 0


def test_small_eigenvalues_of_a_graded_matrix_keep_their_digits() -> None:
    n = 9
    x = normal(n, n, dtype=DOUBLE)
    decades = torch.arange(n, dtype=DOUBLE) * 6 / (n - 1)
    for scale in (10.0**-decades, 10.0 ** -decades.flip(0)):
        graded = scale[:, None] * (torch.eye(n, dtype=DOUBLE) + (x + x.T) / 200) * scale
        want = spectrum_eigvalsh(graded)
        assert ((spectrum_eigvalsh(graded, backend="triton") - want).abs() <= 1e-11 * want.abs()).all()


def test_a_bad_entry_spoils_its_matrix_alone_and_scales_do_not() -> None:
    given = torch.eye(4, dtype=DOUBLE).repeat(6, 1, 1)
    given[1, 2, 0] = torch.nan
    given[2, 3, 3] = torch.inf
    given[3] *= 0
    given[4] *= 2.0**-1070
    given[5] *= 2.0**1020
    values = spectrum_eigvalsh(given, backend="triton")
    assert values[1:3].isnan().all()
    assert (values[0] == 1).all() and (values[3] == 0).all()
    assert (values[5] == 2.0**1020).all() and (values[4] == 2.0**-1070).all()


def test_bits_do_not_depend_on_the_company_or_the_shape() -> None:
    given = matrices(5)
    values = spectrum_eigvalsh(given, backend="triton")
    assert same_bits(spectrum_eigvalsh(given[None, :, :, :].mT.mT, backend="triton")[0], values)
    for i in range(3):
        assert same_bits(spectrum_eigvalsh(given[i], backend="triton"), values[i])
    assert spectrum_eigvalsh(given[:0], backend="triton").shape == (0, 5)


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BackendError, match="64"):
        spectrum_eigvalsh(torch.eye(65), backend="triton")


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.rmtkernels.spectrum_eigvalsh_triton.default, (torch.eye(2)[None],))


# (text as shipped, text broken, what finds it)
MUTANTS = {
    "rows past n are loaded": ("mask=i < n, other=0.0", "mask=i < N, other=0.0", "bounds"),
    "another matrix' values": ("eigenvalues + problem * n + number", "eigenvalues + number", "race"),
    "scratch is shared": ("tridiagonal + problem * 2 * n", "tridiagonal", "race"),
    "the upper triangle is read": ("matrix + i * n + j", "matrix + j * n + i", "nan"),
    "no sorting": ("i, j = tl.maximum(order", "order = row\n    i, j = tl.maximum(order", "graded"),
    "the reflector's sign": ("tl.where(head < 0.0, -pivot, pivot)", "tl.where(head < 0.0, pivot, -pivot)", "values"),
    "half an update": ("w -= 0.5 * beta", "w -= 0.25 * beta", "values"),
    "a count too few": ("(pivot < 0.0).to", "(pivot < -1e-3).to", "values"),
    "an interval too wide": ("MOST_PASSES = tl.constexpr(48)", "MOST_PASSES = tl.constexpr(12)", "values"),
    "NaN is lost": ('tl.where(wrong, float("nan"), values)', "values", "bad"),
}  # fmt: skip


@pytest.mark.parametrize("name", chosen(MUTANTS))
def test_a_broken_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shipped, broken, finding = MUTANTS[name]
    module = mutant(tmp_path, "spectrum", shipped, broken)
    monkeypatch.setattr("rmtkernels.triton.spectrum.spectrum_eigvalsh", module.spectrum_eigvalsh)
    if finding in ("bounds", "race"):
        with pytest.raises(InterpreterError, match=f"CheckError.*{finding}"):
            module.spectrum_eigvalsh(matrices(5))
        return
    test = {
        "graded": test_small_eigenvalues_of_a_graded_matrix_keep_their_digits,
        "bad": test_a_bad_entry_spoils_its_matrix_alone_and_scales_do_not,
    }.get(finding, lambda: test_agrees_with_lapack(Counts(), 7, DOUBLE))
    with pytest.raises(AssertionError):
        test()
