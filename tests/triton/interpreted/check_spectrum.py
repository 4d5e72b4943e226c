"""spectrum_eigvalsh and spectrum_descriptors_ in the checked interpreter: against LAPACK and the oracle, graded and bad
matrices, bits, and planted bugs. Matrices are small: every step of every Sturm sequence is a handful of NumPy calls."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from rmtkernels import (
    BackendError,
    DtypeError,
    ShapeError,
    dispatch,
    laws,
    spectrum_descriptors,
    spectrum_descriptors_,
    spectrum_eigvalsh,
)
from rmtkernels.ops.law_table import law_table
from rmtkernels.reference import spectrum_descriptors_ref
from rmtkernels.triton import spectrum_descriptors as shipped_descriptors
from tests.compile.test_compile import descriptor_arguments
from tests.helpers import gram_of, normal, same_bits
from tests.triton.checked import Counts
from tests.triton.mutants import PROVE, chosen, mutant
from tests.unit.test_spectrum_descriptors import assert_near_oracle

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


def windows(count: int, window: int, dim: int, seed: int = 0) -> Tensor:
    """Gram matrices of two layers, one of them a thousand times as loud, with a mean."""
    rows = normal(2, count, window, dim, seed=seed, dtype=DOUBLE) + normal(2, count, 1, dim, seed=9, dtype=DOUBLE)
    return gram_of(rows * torch.tensor([1.0, 30.0], dtype=DOUBLE)[:, None, None, None])[0]


OPTIONS: list[dict[str, Any]] = [
    {"center": True, "joint": None, "normalize": None, "noise": "median"},
    {"center": False, "joint": "none", "normalize": None, "noise": "trace"},
    {"center": True, "joint": "trace", "normalize": "rms", "noise": "median"},
    {"center": False, "joint": None, "normalize": "rms", "noise": "trace"},
]


CASES = [(5, 9, (0, 10**6 + 1)), (1, 1, (1, -3))]  # window, dim, seen
LONGER_CASES = [(4, 2, (1, 2, 3, 4)), (33, 20, (33,))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("window", "dim", "seen"), CASES + LONGER_CASES if PROVE else CASES)
def test_descriptors_agree_with_the_oracle(
    window: int, dim: int, seen: tuple[int, ...], options: dict[str, Any]
) -> None:
    gram, counts = windows(len(seen), window, dim), torch.tensor(seen)
    oracle = spectrum_descriptors_ref(gram, counts.clamp_min(0), dim, **options)
    for b, count in enumerate(seen):  # what is not in use is not read
        gram[:, b, max(count, 0) :] = gram[:, b, :, max(count, 0) :] = torch.nan
    assert_near_oracle(spectrum_descriptors(gram, counts, dim, **options, backend="triton"), oracle)


def test_out_buffers_may_be_strided_seen_a_column_and_nothing_else_is_written() -> None:
    gram, seen = windows(2, 3, 4), torch.tensor([[3, 0], [2, 9]])
    wide, eigenvalues = torch.full((2, 2, 30), -7.0), torch.full((2, 2, 2, 3), -7.0)
    spectrum_descriptors_(wide[..., 3:27], eigenvalues[:, :, 1], gram, seen[:, 0], 4, backend="triton")
    want = spectrum_descriptors_ref(gram, seen[:, 0], 4)
    assert_near_oracle((wide[..., 3:27], eigenvalues[:, :, 1]), want)
    assert (wide[..., :3] == -7).all() and (wide[..., 27:] == -7).all() and (eigenvalues[:, :, 0] == -7).all()


BAD = [("trace", (2, 1)), ("none", (0, 0)), (None, (2, 1))]


@pytest.mark.parametrize(("joint", "place"), BAD if PROVE else BAD[:1])
def test_a_bad_gram_matrix_spoils_its_own_window_alone(joint: str | None, place: tuple[int, int]) -> None:
    gram, seen = windows(2, 3, 5), torch.tensor([3, 3])
    want = spectrum_descriptors(gram, seen, 5, joint=joint, backend="triton")
    gram[0, 1, place[0], place[1]] = gram[0, 1, place[1], place[0]] = torch.inf if joint else torch.nan
    descriptors, eigenvalues = spectrum_descriptors(gram, seen, 5, joint=joint, backend="triton")
    assert descriptors[0, 1].isnan().all()
    assert eigenvalues[0, 1, :2].isnan().all() and eigenvalues[0, 1, 2] == 0
    assert same_bits(descriptors[:, 0], want[0][:, 0]) and same_bits(eigenvalues[:, 0], want[1][:, 0])


def test_windows_have_the_same_bits_alone_and_equal_rows_are_a_zero_window() -> None:
    gram, seen = windows(2, 4, 6), torch.tensor([4, 4])
    gram[:, 1] = 3.0 + 3e-7 * torch.eye(4)
    together = spectrum_descriptors(gram, seen, 6, backend="triton")
    alone = spectrum_descriptors(gram[1:, :1].contiguous(), seen[:1], 6, backend="triton")
    assert all(same_bits(a[0, 0], every[1, 0]) for a, every in zip(alone, together, strict=True))
    assert_near_oracle(together, spectrum_descriptors_ref(gram, seen, 6))
    assert not together[1][:, 1].any()


@triton.jit
def functions_kernel(table, s, survival, logarithm, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    x = tl.load(s + i)
    tl.store(survival + i, shipped_descriptors.tracy_widom_log_survival(table, x))
    tl.store(logarithm + i, shipped_descriptors.log1p(tl.exp(x)))


def test_special_functions_to_the_last_digits() -> None:
    s = torch.cat([torch.linspace(-30, 30, 251, dtype=DOUBLE), torch.tensor([1e-9, 11.99, 12.0, 700, -700.0])]).double()
    survival, logarithm = torch.empty_like(s), torch.empty_like(s)
    functions_kernel[(1,)](torch.tensor(law_table(1, 1)), s, survival, logarithm, N=len(s))
    want = torch.tensor([float(laws.tracy_widom_log_survival(float(x))) for x in s.clamp_min(-9)], dtype=DOUBLE)
    inside = s >= -8.9
    torch.testing.assert_close(survival[inside], want[inside], rtol=1e-10, atol=1e-10)
    assert (survival[~inside] == law_table(1, 1)[1]).all()
    torch.testing.assert_close(logarithm, torch.log1p(s.exp()), rtol=1e-15, atol=0)


def test_mistakes_are_named_before_anything_is_written() -> None:
    gram, seen = windows(2, 3, 4), torch.tensor([3, 2])
    out = torch.full((2, 2, 24), torch.nan), torch.full((2, 2, 3), torch.nan)
    shared = torch.full((2, 1, 24), torch.nan).expand(2, 2, 24)
    with pytest.raises(DtypeError):
        spectrum_descriptors_(*out, gram, seen.int(), 4, backend="triton")
    with pytest.raises(ShapeError, match="joint"):
        spectrum_descriptors_(*out, gram, seen, 4, joint="sum", backend="triton")
    with pytest.raises(ShapeError, match="contiguous"):
        spectrum_descriptors_(*out, gram.mT, seen, 4, backend="triton")
    with pytest.raises(ShapeError, match="share memory"):
        spectrum_descriptors_(shared, out[1], gram, seen, 4, backend="triton")
    with pytest.raises(ShapeError, match="laws"):
        torch.ops.rmtkernels.spectrum_descriptors_triton_(
            *out, gram, seen, torch.zeros(3, dtype=DOUBLE), 4, True, 0, False, 0
        )
    with pytest.raises(BackendError, match="64"):
        spectrum_descriptors(torch.zeros(1, 1, 65, 65), seen[:1], 4, backend="triton")
    assert all(x.isnan().all() for x in (*out, shared))
    assert spectrum_descriptors(gram[:0], seen, 4, backend="triton")[0].shape == (0, 2, 24)


def test_windows_that_are_too_long_are_left_to_the_reference_which_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["rmtkernels.ops.spectrum"], "select", lambda *_: "triton")  # by itself
    monkeypatch.setattr(dispatch, "_warned", set())
    gram, seen = gram_of(normal(1, 1, 65, 70))
    with pytest.warns(RuntimeWarning, match="takes N up to 64"):
        result = spectrum_descriptors(gram, seen, 70)
    assert_near_oracle(result, spectrum_descriptors_ref(gram, seen, 70))


def test_descriptors_opcheck() -> None:
    operator = torch.ops.rmtkernels.spectrum_descriptors_triton_.default
    tests = ("test_schema", "test_faketensor")  # the others trace the same call again, at a second each
    torch.library.opcheck(operator, descriptor_arguments(2, True), test_utils=tests)


DESCRIPTOR_MUTANTS = {
    "what is not in use is read": ("mask=i < rows, other=0.0)", "mask=i < window, other=0.0)", "values"),
    "past the window": ("mask=i < rows, other=0.0)", "mask=i < N, other=0.0)", "bounds"),
    "scratch is shared": ("tridiagonal + problem * 2 * window", "tridiagonal", "race"),
    "another window's place": ("descriptors + layer * descriptors_layer", "descriptors", "race"),
    "equal rows keep their rounding": ("least = RESOLUTION * trace", "least = trace * 0.0", "flat"),
    "the sum is not centred": ("a += tl.where(i < rows, shift, 0.0)", "a += 0.0", "values"),
    "the row before the newest": ("(tl.maximum(accepted, 1) - 1) % window", "accepted % window", "values"),
    "a layer is not divided by its trace": ("block *= 1.0 /", "block *= 1.0 + 0.0 *", "values"),
    "rows keep their lengths": ("tl.sqrt(dim / tl.where(zero, 1.0, diagonal))", "1.0", "values"),
    "eigenvalues ascend": ("diagonal + rows - 1 - number, values", "diagonal + number, values", "values"),
    "one eigenvalue more": ("n = tl.maximum(rows - 1, 0)", "n = rows", "values"),
    "another row of the table": ("+ n * (LAW_CELLS + window)", "+ (n - 1) * (LAW_CELLS + window)", "values"),
    "the median of all": ("lambdas + middle // 2", "lambdas + (middle + 1) // 2", "values"),
    "mass goes to one bin": ("tl.maximum(1.0 - tl.abs(position", "tl.maximum(1.0 - 2.0 * tl.abs(position", "values"),
    "NaN is lost": ('tl.where(wrong, float("nan"), out)', "out", "bad"),
    "the tail of the law": ("(series * z + 105.0 / 64.0)", "(series * z + 104.0 / 64.0)", "functions"),
    "a rounded logarithm": ("(x / tl.where(lost, 1.0, rounded))", "1.0", "functions"),
}  # fmt: skip


@pytest.mark.parametrize("name", chosen(DESCRIPTOR_MUTANTS))
def test_a_broken_descriptor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, broken, finding = DESCRIPTOR_MUTANTS[name]
    module = mutant(tmp_path, "spectrum_descriptors", text, broken)
    monkeypatch.setattr(shipped_descriptors, "spectrum_descriptors_", module.spectrum_descriptors_)
    monkeypatch.setattr(shipped_descriptors, "tracy_widom_log_survival", module.tracy_widom_log_survival)
    monkeypatch.setattr(shipped_descriptors, "log1p", module.log1p)
    if finding in ("bounds", "race"):
        with pytest.raises(InterpreterError, match=f"CheckError.*{finding}"):
            spectrum_descriptors(windows(2, 3, 4), torch.tensor([3, 3]), 4, backend="triton")
        return
    test = {
        "flat": test_windows_have_the_same_bits_alone_and_equal_rows_are_a_zero_window,
        "bad": lambda: test_a_bad_gram_matrix_spoils_its_own_window_alone("none", (0, 0)),
        "functions": test_special_functions_to_the_last_digits,
    }.get(finding, lambda: test_descriptors_agree_with_the_oracle(5, 9, (4, 10**6 + 1), OPTIONS[2]))
    with pytest.raises(AssertionError):
        test()
