"""lowrank_linear in the checked interpreter: values, gradients, bits, and planted bugs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from triton.runtime.errors import InterpreterError

import rmtkernels
from rmtkernels import BackendError, ShapeError, lowrank_linear
from rmtkernels.reference import lowrank_linear_ref
from rmtkernels.triton import lowrank_linear as shipped
from tests.helpers import normal, same_bits
from tests.triton.checked import Counts
from tests.triton.mutants import chosen, mutant

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF), (FLOAT, BFLOAT), (BFLOAT, FLOAT)]
ROUNDING = {FLOAT: 2.0**-24, BFLOAT: 2.0**-8, HALF: 2.0**-11}


def case(rows: int, d_in: int, k: int, d_out: int, dtype: torch.dtype, weights: torch.dtype) -> list[Tensor]:
    return [
        normal(rows, d_in, seed=1, dtype=dtype),
        (normal(k, d_in, seed=2) / max(d_in, 1) ** 0.5).to(weights),
        (normal(d_out, k, seed=3) / max(k, 1) ** 0.5).to(weights),
        normal(d_out, seed=4, dtype=weights),
    ]


def assert_right(y: Tensor, arguments: list[Tensor]) -> None:
    """Within the rounding of the intermediate and of the result, and of sums in float32."""
    x, down, up, _ = arguments
    exact = lowrank_linear_ref(*arguments)
    size = lowrank_linear_ref(*(tensor.abs() for tensor in arguments))
    between = ROUNDING[x.dtype if x.dtype == down.dtype else FLOAT]
    hidden = (x.double() @ down.double().T).abs() @ up.double().abs().T
    bound = between * hidden + (sum(down.shape) + 8) * 2.0**-24 * size + ROUNDING[x.dtype] * exact.abs() * 1.01
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("types", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(3, 70, 17, 40), (130, 33, 5, 130)], ids=str)
def test_agrees_with_the_oracle(counts: Counts, shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype]) -> None:
    arguments = case(*shape, *types)
    y = lowrank_linear(*arguments, backend="triton")
    assert_right(y, arguments)
    rows, d_in, k, d_out = shape
    element, weight = arguments[0].element_size(), arguments[1].element_size()
    tiles = -(-rows // (128 if types in PAIRS[1:3] else 64))
    assert counts.loaded == rows * d_in * element + tiles * (k * (d_in + d_out) + d_out) * weight
    assert counts.stored == rows * d_out * element


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)], ids=str)
def test_empty_dimensions(shape: tuple[int, ...]) -> None:
    arguments = case(*shape, FLOAT, FLOAT)
    assert_right(lowrank_linear(*arguments, backend="triton"), arguments)


def test_strides_and_leading_dimensions() -> None:
    x, down, up, bias = case(6, 20, 18, 9, BFLOAT, BFLOAT)
    want = lowrank_linear(x, down, up, bias, backend="triton")
    wide = torch.stack([x, 2 * x], -1)[..., 0]
    got = lowrank_linear(wide.unflatten(0, (2, 3)), down.T.contiguous().T, up.T.contiguous().T, bias, backend="triton")
    assert same_bits(got.flatten(0, 1), want)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    arguments = case(131, 40, 20, 24, BFLOAT, BFLOAT)
    want = lowrank_linear(*arguments, backend="triton")
    for first, last in ((0, 1), (127, 131), (128, 130)):
        assert same_bits(lowrank_linear(arguments[0][first:last], *arguments[1:], backend="triton"), want[first:last])


def test_what_is_not_finite_goes_where_arithmetic_takes_it() -> None:
    x, down, up, bias = case(3, 20, 5, 7, FLOAT, FLOAT)
    x[1, 4] = torch.inf
    x[2, 4] = torch.nan
    y, want = lowrank_linear(x, down, up, bias, backend="triton"), lowrank_linear_ref(x, down, up, bias)
    assert (y.isnan() == want.isnan()).all() and (y.isinf() == want.isinf()).all()


@pytest.mark.parametrize("types", [PAIRS[0], PAIRS[1], PAIRS[4]], ids=str)
@pytest.mark.parametrize("needs", [(0, 1, 2, 3), (0,), (1,), (2,), (3,)])
def test_gradients(types: tuple[torch.dtype, torch.dtype], needs: tuple[int, ...]) -> None:
    arguments = case(5, 24, 18, 20, *types)
    exact = [tensor.double() for tensor in arguments]
    for i in needs:
        arguments[i].requires_grad_()
        exact[i].requires_grad_()
    lowrank_linear(*arguments, backend="triton").float().square().sum().backward()
    functional.linear(functional.linear(exact[0], exact[1]), exact[2], exact[3]).square().sum().backward()
    for got, want in zip(arguments, exact, strict=True):
        assert (got.grad is None) == (want.grad is None)
        if got.grad is not None and want.grad is not None:
            assert got.grad.dtype == got.dtype
            bound = (2e-6 if types == PAIRS[0] else 2e-2) * want.grad.abs().max()
            assert ((got.grad.double() - want.grad).abs() <= bound).all()


def test_second_derivatives() -> None:
    gradients = []
    for compute in (lambda *a: lowrank_linear(*a, backend="triton"), lambda x, p, u, b: (x @ p.T) @ u.T + b):
        arguments = [tensor.requires_grad_() for tensor in case(4, 6, 3, 5, FLOAT, FLOAT)]
        first = torch.autograd.grad(compute(*arguments).pow(3).sum(), arguments, create_graph=True)
        gradients.append(torch.autograd.grad(sum(g.square().sum() for g in first), arguments))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_autocast_takes_its_dtype() -> None:
    arguments = case(3, 20, 5, 7, FLOAT, FLOAT)
    with torch.autocast("cpu", torch.bfloat16):
        y = lowrank_linear(*arguments, backend="triton")
    assert same_bits(y, lowrank_linear(*(t.bfloat16() for t in arguments), backend="triton"))


def test_vmap() -> None:
    x, down, up, bias = case(6, 20, 5, 7, FLOAT, FLOAT)
    want = lowrank_linear(x, down, up, bias, backend="triton")
    with rmtkernels.use_backend("triton"):
        assert same_bits(torch.vmap(lowrank_linear, (0, None, None, None))(x, down, up, bias), want)


@pytest.mark.parametrize(("k", "dtype"), [(513, BFLOAT), (257, FLOAT), (3, torch.float64)])
def test_what_does_not_fit_is_refused(k: int, dtype: torch.dtype) -> None:
    with pytest.raises(BackendError, match="'triton' was asked for"):
        lowrank_linear(*case(2, 5, k, 3, dtype, dtype), backend="triton")


def test_bad_arguments_have_typed_errors() -> None:
    x, down, up, bias = case(2, 5, 3, 4, FLOAT, FLOAT)
    with pytest.raises(ShapeError, match="up must be"):
        lowrank_linear(x, down, up[:, :2], bias, backend="triton")
    with pytest.raises(ShapeError, match="bias"):
        lowrank_linear(x, down, up, bias[:2], backend="triton")


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_opcheck(dtype: torch.dtype) -> None:
    for keep_hidden in (False, True):
        arguments = [tensor.requires_grad_() for tensor in case(3, 9, 4, 5, dtype, dtype)]
        torch.library.opcheck(torch.ops.rmtkernels.lowrank_linear_triton.default, (*arguments, keep_hidden))


# (text as shipped, text broken, what finds it)
MUTANTS = {
    "rows that do not exist are loaded": ("(row < rows) & (i[None, :] < d_in)", "i[None, :] < d_in", "bounds"),
    "rows that do not exist are stored": (
        "y.to(out.dtype.element_ty), mask=(row < rows) & ", "y.to(out.dtype.element_ty), mask=", "bounds"),
    "the rank is not masked": ("(i[:, None] < d_in) & (rank[None, :] < k)", "(i[:, None] < d_in)", "bounds"),
    "the result's columns are not masked": ("mask=(row < rows) & (j[None, :] < d_out))", "mask=row < rows)", "race"),
    "all programs take the first rows": ("tl.program_id(0).to(tl.int64)", "tl.cast(0, tl.int64)", "race"),
    "TF32, silently": (
        'b.to(COMPUTE), sums, input_precision="ieee"', 'b.to(COMPUTE), sums, input_precision="tf32"', "values"),
    "the second product begins anew": ("tl.dot(kept, weights", "tl.dot(kept * 0 + 1, weights", "values"),
    "the bias of another tile": ("tl.load(bias + j,", "tl.load(bias + j - first,", "values"),
    "the padding reaches the result": ("tl.where(rank[None, :] < k, sums, 0.0)", "(sums + 0.0)", "padding"),
}  # fmt: skip


@pytest.mark.parametrize("name", chosen(MUTANTS))
def test_a_broken_kernel_is_found(tmp_path: Path, name: str) -> None:
    text, broken, finding = MUTANTS[name]
    module = mutant(tmp_path, "lowrank_linear", text, broken)
    arguments = case(70, 40, 17, 70, FLOAT, FLOAT)
    if finding == "padding":
        arguments = [tensor.abs() for tensor in arguments]
        arguments[0][0, 0] = torch.inf
        assert not lowrank_linear(*arguments, backend="triton")[0].isnan().any()
        assert module.lowrank_linear(*arguments, False)[0][0].isnan().any()
    elif finding == "values":
        y = module.lowrank_linear(*arguments, False)[0]
        with pytest.raises(AssertionError):
            assert_right(y, arguments)
    else:
        with pytest.raises(InterpreterError, match=f"CheckError.*{finding}"):
            module.lowrank_linear(*arguments, False)


def test_arithmetic_on_bfloat16_is_found(tmp_path: Path) -> None:
    module = mutant(tmp_path, "lowrank_linear", "other=0.0).to(tl.float32)[None, :]", "other=0.0)[None, :] * 2")
    with pytest.raises(InterpreterError, match=r"CheckError.*arithmetic on bfloat16"):
        module.lowrank_linear(*case(3, 9, 4, 5, BFLOAT, BFLOAT), False)


def test_the_launcher_knows_no_other_tiles_than_the_table() -> None:
    for table, most in ((shipped.TILES_HALF, shipped.MAX_RANK), (shipped.TILES_FLOAT32, shipped.MAX_RANK_FLOAT32)):
        assert max(table) == most and all(rank & (rank - 1) == 0 for rank in table)
