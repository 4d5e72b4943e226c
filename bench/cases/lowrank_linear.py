"""lowrank_linear: one token, and 256, through the factors of a square layer and of a wide one.

The parameters require no gradient, as in a model that only generates. Activations are float32. With bfloat16 weights
the peers are what PyTorch can do instead: everything in float32, or everything in bfloat16. Compiled is fair for one
row: a model that generates can be, though there the guards are those of the whole model.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Case, case
from rmtkernels import lowrank_linear
from rmtkernels.reference import lowrank_linear_ref

SQUARE, WIDE = (384, 64, 384), (768, 128, 3072)  # d_in, k, d_out
FLOAT, HALF, COMPILED = "two F.linear", "two F.linear in bfloat16", "two F.linear, compiled"


def two_products(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, down), up, bias)


def layer(
    sizes: tuple[int, int, int], rows: int, targets: dict[str, float], weights: torch.dtype = torch.float32
) -> Case:
    d_in, k, d_out = sizes
    generator = torch.Generator().manual_seed(0)
    x, down = torch.randn(rows, d_in, generator=generator), torch.randn(k, d_in, generator=generator) / d_in**0.5
    up, bias = torch.randn(d_out, k, generator=generator) / k**0.5, torch.randn(d_out, generator=generator)
    full, half = (x, down, up, bias), tuple(t.bfloat16() for t in (x, down, up, bias))
    ours = full if weights == torch.float32 else (x, *half[1:])
    _, ours_down, ours_up, ours_bias = ours
    peers: dict[str, Callable[[], Tensor]] = {
        FLOAT: lambda: two_products(*full),
        "mm and addmm": lambda: torch.addmm(bias, torch.mm(x, down.T), up.T),
    }
    if rows == 1:
        compiled = torch.compile(two_products, fullgraph=True)
        peers[COMPILED] = lambda: compiled(*full)
    if weights == torch.bfloat16:
        peers[HALF] = lambda: functional.linear(functional.linear(half[0], half[1]), half[2], half[3])

    def verify() -> None:
        for name, function in {"ours": lambda: lowrank_linear(*ours), **peers}.items():
            want = lowrank_linear_ref(*(ours if name == "ours" else half if name == HALF else full))
            tolerance = (2e-2 if name == HALF else 1e-5) * want.abs().max()
            assert ((function() - want).abs() <= tolerance).all(), f"{name}: wrong product"

    return Case(
        ours=lambda: lowrank_linear(x, ours_down, ours_up, ours_bias),
        peers=peers,
        verify=verify,
        targets=targets,
        bytes_read=k * (d_in + d_out) * weights.itemsize,
        flops=2 * rows * k * (d_in + d_out),
        flops_dtype=torch.float32,
        rounds=300,  # microseconds, on whatever else the machine does
    )


@case("lowrank_linear.one_row_384_64_384")
def one_row_square() -> Case:
    return layer(SQUARE, 1, {FLOAT: 1.4})


@case("lowrank_linear.one_row_768_128_3072")
def one_row_wide() -> Case:
    return layer(WIDE, 1, {FLOAT: 1.2})


@case("lowrank_linear.one_row_384_64_384_bfloat16_weights")
def one_row_square_bfloat16() -> Case:
    """No target against float32: two thirds of the time is the way to the kernel, which bytes do not shorten."""
    return layer(SQUARE, 1, {HALF: 1.8}, torch.bfloat16)


@case("lowrank_linear.one_row_768_128_3072_bfloat16_weights")
def one_row_wide_bfloat16() -> Case:
    return layer(WIDE, 1, {FLOAT: 1.8, HALF: 1.8}, torch.bfloat16)


@case("lowrank_linear.256_rows_384_64_384")
def many_rows_square() -> Case:
    """The same two calls: no slower, up to the noise."""
    return layer(SQUARE, 256, {FLOAT: 0.98})


@case("lowrank_linear.256_rows_768_128_3072")
def many_rows_wide() -> Case:
    return layer(WIDE, 256, {FLOAT: 0.98})
