"""lowrank_linear: what the kernel computes, and what its result may not depend on."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmtkernels import lowrank_linear
from rmtkernels.reference import lowrank_linear_ref
from tests.helpers import normal, same_bits

pytestmark = pytest.mark.usefixtures("isa")

kernel = torch.ops.rmtkernels.lowrank_linear
DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = (1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 33, 64, 100, 263)
Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def factors(rows: int, d_in: int, k: int, d_out: int, x_dtype: torch.dtype, dtype: torch.dtype) -> Factors:
    return (
        normal(rows, d_in, seed=1, dtype=x_dtype),
        (normal(k, d_in, seed=2) / math.sqrt(d_in)).to(dtype),
        (normal(d_out, k, seed=3) / math.sqrt(k)).to(dtype),
        normal(d_out, seed=4, dtype=dtype),
    )


def roundings(width: int) -> int:
    """Of one float32 sum: a lane's products, the lanes, and up to seven products beside them, each rounded twice."""
    return width // 8 + 3 + 2 * 7


def assert_near_oracle(y: Tensor, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    """Within the bound of its own summation (Higham, gamma_n), and of one rounding to bfloat16 if y is that."""
    exact = lowrank_linear_ref(x, down, up, bias)
    size = lowrank_linear_ref(x.abs(), down.abs(), up.abs(), None if bias is None else bias.abs())
    count = roundings(down.shape[1]) + roundings(down.shape[0]) + 2
    bound = 1.01 * count * 2.0**-24 * size + 2.0**-140
    if y.dtype == torch.bfloat16:
        bound = bound + 2.0**-8 * (exact.abs() + bound)
    assert y.shape == exact.shape and y.dtype == x.dtype and y.is_contiguous()
    assert ((y.double() - exact).abs() <= bound).all()


def in_layout(layout: str, tensor: Tensor) -> Tensor:
    """The same values, lying in memory in another way."""
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.mT.contiguous().mT
    if layout == "every_other":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1).flatten(-2)[..., ::2]
    if layout == "sliced":
        return torch.nn.functional.pad(tensor, (3, 2), value=torch.nan)[..., 3:-2]
    return tensor


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    layouts = st.sampled_from(("dense", "dense", "transposed", "every_other", "sliced"))
    return {
        "shape": draw(st.lists(st.integers(0, 5), max_size=3)) if draw(st.booleans()) else [draw(st.integers(1, 40))],
        "d_in": draw(st.sampled_from((0, *WIDTHS))),
        "k": draw(st.sampled_from((0, *WIDTHS))),
        "d_out": draw(st.sampled_from((0, *WIDTHS))),
        "dtypes": (draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))),
        "bias": draw(st.booleans()),
        "scale": draw(st.sampled_from((1e-18, 1.0, 1e12))),
        "layouts": [draw(layouts) for _ in range(4)],
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=200)
@given(cases())
def test_agrees_with_the_oracle(case: dict[str, Any]) -> None:
    x_dtype, dtype = case["dtypes"]
    d_in, k, d_out, seed = case["d_in"], case["k"], case["d_out"], case["seed"]
    x = (normal(*case["shape"], d_in, seed=seed) * case["scale"]).to(x_dtype)
    weights = [normal(k, d_in, seed=seed + 1, dtype=dtype), normal(d_out, k, seed=seed + 2, dtype=dtype)]
    bias = (normal(d_out, seed=seed + 3) * case["scale"]).to(dtype) if case["bias"] else None
    x, *weights = [in_layout(layout, t) for layout, t in zip(case["layouts"], (x, *weights), strict=False)]
    bias = None if bias is None else in_layout(case["layouts"][3], bias)
    assert_near_oracle(kernel(x, *weights, bias), x, *weights, bias)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d_in", "k", "d_out"), [(1, 384, 64, 384), (5, 768, 128, 3072), (16, 4096, 40, 11)])
def test_sizes_of_models(rows: int, d_in: int, k: int, d_out: int, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    case = factors(rows, d_in, k, d_out, x_dtype, dtype)
    assert_near_oracle(kernel(*case), *case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 16, 31, 64])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 16])
def test_identities_return_x(rows: int, width: int, dtype: torch.dtype) -> None:
    x, eye, bias = normal(rows, width), torch.eye(width, dtype=dtype), normal(width, seed=1, dtype=dtype)
    assert torch.equal(kernel(x, eye, eye), x)
    assert same_bits(kernel(x, eye, eye, bias), x + bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_one_sums_of_whole_numbers_are_exact(dtype: torch.dtype) -> None:
    x = torch.arange(7 * 301).reshape(7, 301).remainder(13).float()
    up = torch.arange(-5, 6).to(dtype)[:, None]
    assert torch.equal(kernel(x, torch.ones(1, 301, dtype=dtype), up), x.sum(1, keepdim=True) * up.float().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_meets_its_own_weight(dtype: torch.dtype) -> None:
    """Permutations: a wrong order within the vectors would show, in either product."""
    for width in (16, 24, 39, 64):
        first = torch.randperm(width, generator=torch.Generator().manual_seed(width))
        second = torch.randperm(width, generator=torch.Generator().manual_seed(width + 1))
        x, eye = normal(3, width), torch.eye(width, dtype=dtype)
        assert torch.equal(kernel(x, eye[first], eye[second]), x[:, first][:, second])


def test_every_finite_bfloat16_weight_counts_exactly() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    up = torch.where(patterns.isfinite(), patterns, 0).roll(8)[: 24 * 2730].reshape(2730, 24)  # all but 16 NaN
    eye = torch.eye(24)
    assert torch.equal(kernel(eye, eye.bfloat16(), up), up.T.float())
    assert torch.equal(kernel(eye.bfloat16(), eye.bfloat16(), up), up.T)


@pytest.mark.parametrize("count", [2**16, 5])
def test_results_round_to_bfloat16_as_in_torch(count: int) -> None:
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(count))
    special = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x00000001, 0])
    up = torch.cat([bits, special, special - 2**31]).to(torch.int32).view(torch.float32)[:, None]
    y = kernel(torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1), up)[0]
    torch.testing.assert_close(y, up[:, 0].bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "down", "up", "bias"])
@pytest.mark.parametrize("position", [0, 9, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_goes_where_it_belongs(bad: float, where: str, position: int, dtype: torch.dtype) -> None:
    case = factors(5, 41, 41, 41, torch.float32, dtype)
    case[("x", "down", "up", "bias").index(where)].flatten()[41 + position if where != "bias" else position] = bad
    y, exact = kernel(*case), lowrank_linear_ref(*case)
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.isinf(), exact.isinf())
    assert not y.isfinite().all()
    assert y.isfinite().any() == (where != "down")


@pytest.mark.parametrize(("k", "d_in"), [(0, 5), (3, 0), (0, 0)])
def test_without_inner_elements_the_bias_is_left(k: int, d_in: int) -> None:
    x, down, up, bias = torch.ones(2, d_in), torch.ones(k, d_in), torch.ones(4, k), normal(4)
    assert torch.equal(lowrank_linear(x, down, up, bias), bias.expand(2, 4))
    assert torch.equal(lowrank_linear(x, down, up), torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (2, 0, 0, 5), (0,)])
def test_empty_results(shape: tuple[int, ...]) -> None:
    x, down, up = torch.zeros(shape), torch.ones(3, shape[-1]), torch.ones(4, 3)
    y = lowrank_linear(x, down, up)
    assert y.shape == (*shape[:-1], 4)
    assert not y.any()
    assert lowrank_linear(torch.ones(2, 5), torch.ones(3, 5), torch.ones(0, 3)).shape == (2, 0)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 4, 7, 16, 37])
def test_a_row_alone_gives_the_same_bits(rows: int, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x, down, up, bias = factors(rows, 100, 43, 37, x_dtype, dtype)
    together = kernel(x, down, up, bias)
    alone = torch.cat([kernel(row[None], down, up, bias) for row in x])
    assert same_bits(together, alone)
    x = x.clone()
    x[rows // 2] = torch.nan
    kept = torch.arange(rows) != rows // 2
    assert same_bits(kernel(x, down, up, bias)[kept], together[kept])


def test_rows_of_the_public_function_do_not_depend_on_each_other_up_to_sixteen() -> None:
    x, down, up, bias = factors(16, 768, 64, 40, torch.float32, torch.float32)
    together = lowrank_linear(x, down, up, bias)
    assert same_bits(together, torch.stack([lowrank_linear(row, down, up, bias) for row in x]))


@pytest.mark.parametrize("layout", ["transposed", "every_other", "sliced"])
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_does_not_change_a_bit(layout: str, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    case = factors(6, 55, 21, 19, x_dtype, dtype)
    before = [t.clone() for t in case]
    want = kernel(*case)
    assert same_bits(kernel(*(in_layout(layout, t) for t in case)), want)
    assert same_bits(kernel(case[0].reshape(3, 1, 2, 55), *case[1:]), want.reshape(3, 1, 2, 19))
    assert all(map(same_bits, case, before))


def test_expanded_rows() -> None:
    x, down, up, bias = factors(1, 20, 9, 10, torch.float32, torch.float32)
    assert same_bits(kernel(x.expand(5, 20), down, up, bias), kernel(x, down, up, bias).expand(5, 10))
    ones = torch.ones(1).expand(4, 20)
    assert same_bits(kernel(ones, down, up, bias), kernel(torch.ones(4, 20), down, up, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repetition_do_not_change_a_bit(set_threads: Callable[[int], None], dtype: torch.dtype) -> None:
    case = factors(3, 1024, 203, 1999, torch.float32, dtype)
    results = []
    for threads in (1, 2, 2, 3):
        set_threads(threads)
        results.append(kernel(*case))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_calls_from_several_threads_do_not_meet() -> None:
    calls = [factors(rows, 64, k, 33, torch.bfloat16, torch.bfloat16) for rows in (1, 4, 9) for k in (8, 40, 130)]
    want = [kernel(*call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert all(map(same_bits, pool.map(lambda call: kernel(*call), calls), want))
