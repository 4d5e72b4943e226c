"""lowrank_linear in Triton: both products in one kernel; what lies between them stays on chip.

A program takes a tile of rows of x. It runs along them once, keeps the tile's (rows, k) intermediate in registers, and
multiplies that with all of `up`. No program waits for another and there is no atomic. Which sums are added in which
order depends on k, the widths and the dtypes alone, so a row has the same bits in any batch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmtkernels.errors import BackendError
from rmtkernels.ops.lowrank_linear import check
from rmtkernels.triton.target import is_hopper, shared_memory

MAX_RANK, MAX_RANK_FLOAT32 = 512, 256


class Tiles(NamedTuple):
    """What a program works on at once."""

    rows: int
    inner: int  # columns of x
    columns: int  # of the result
    warps: int


# By rank, rounded up to a power of two. Chosen so that nothing spills (tests/triton/budget.json); of what does not, the
# fastest on an H100 for bfloat16.
TILES_HALF = {
    16: Tiles(128, 64, 128, 4),
    32: Tiles(128, 64, 128, 4),
    64: Tiles(128, 64, 64, 4),
    128: Tiles(128, 64, 64, 8),
    256: Tiles(128, 64, 64, 8),
    512: Tiles(64, 32, 32, 8),
}
TILES_HALF_HOPPER = TILES_HALF | {64: Tiles(128, 64, 128, 4)}  # a fifth faster there; spills on others
TILES_FLOAT32 = {
    16: Tiles(64, 32, 64, 8),
    32: Tiles(64, 32, 64, 8),
    64: Tiles(64, 32, 64, 8),
    128: Tiles(32, 16, 32, 8),
    256: Tiles(32, 16, 32, 8),
}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# x (rows, d_in), down (k, d_in), up (d_out, k), bias (d_out,) or None; out (rows, d_out) and hidden (rows, k) or None
# are contiguous. RANK >= k is a power of two.
@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    x, down, up, bias, out, hidden,
    rows, d_in, k, d_out,
    x_row, x_column, down_row, down_column, up_row, up_column,
    ROWS: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    rank = tl.arange(0, RANK).to(tl.int64)
    sums = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, d_in, INNER):
        i = first + tl.arange(0, INNER).to(tl.int64)
        a = tl.load(x + row * x_row + i[None, :] * x_column, mask=(row < rows) & (i[None, :] < d_in), other=0.0)
        b = tl.load(
            down + i[:, None] * down_column + rank[None, :] * down_row,
            mask=(i[:, None] < d_in) & (rank[None, :] < k),
            other=0.0,
        )
        sums = tl.dot(a.to(COMPUTE), b.to(COMPUTE), sums, input_precision="ieee")
    # Where x is infinite its product with the padding of `down` is NaN.
    kept = tl.where(rank[None, :] < k, sums, 0.0).to(COMPUTE)
    if hidden is not None:
        tl.store(hidden + row * k + rank[None, :], kept, mask=(row < rows) & (rank[None, :] < k))
    for first in range(0, d_out, COLUMNS):
        j = first + tl.arange(0, COLUMNS).to(tl.int64)
        weights = tl.load(
            up + j[None, :] * up_row + rank[:, None] * up_column,
            mask=(j[None, :] < d_out) & (rank[:, None] < k),
            other=0.0,
        )
        y = tl.dot(kept, weights.to(COMPUTE), input_precision="ieee")
        if bias is not None:
            y += tl.load(bias + j, mask=j < d_out, other=0.0).to(tl.float32)[None, :]
        tl.store(out + row * d_out + j[None, :], y.to(out.dtype.element_ty), mask=(row < rows) & (j[None, :] < d_out))


def lowrank_linear(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    """The result, and x downᵀ as it was multiplied with up (empty unless it is to be kept)."""
    check(x, down, up, bias)
    k, d_in = down.shape
    d_out = len(up)
    compute = x.dtype if x.dtype == down.dtype else torch.float32
    check_fits(k, compute)
    out = x.new_empty((*x.shape[:-1], d_out))
    flat = x.reshape(-1, d_in) if d_in else x.new_empty((out.shape[:-1].numel(), 0))
    rows = len(flat)
    hidden = x.new_empty((rows, k) if keep_hidden else (0,), dtype=compute)
    if rows == 0 or (d_out == 0 and not keep_hidden):
        return out, hidden
    rank = max(16, triton.next_power_of_2(k))
    half = TILES_HALF_HOPPER if is_hopper() else TILES_HALF
    tiles = (TILES_FLOAT32 if compute == torch.float32 else half)[rank]
    product_kernel[(triton.cdiv(rows, tiles.rows),)](
        flat, down, up, bias, out, hidden if keep_hidden else None,
        rows, d_in, k, d_out,
        *flat.stride(), *down.stride(), *up.stride(),
        ROWS=tiles.rows, RANK=rank, INNER=tiles.inner, COLUMNS=tiles.columns, COMPUTE=TYPES[compute],
        num_warps=tiles.warps, num_stages=_stages(tiles, rank, compute.itemsize), enable_fp_fusion=True,
    )  # fmt: skip
    return out, hidden


def check_fits(k: int, compute: torch.dtype) -> None:
    """Raises BackendError if the kernel has no such dtype, or no room on chip for so many columns of x downᵀ."""
    if compute not in TYPES:
        raise BackendError(f"lowrank_linear: backend 'triton' was asked for: it has no kernel for {compute}")
    most = MAX_RANK_FLOAT32 if compute == torch.float32 else MAX_RANK
    if k > most:
        raise BackendError(
            f"lowrank_linear: backend 'triton' was asked for: it keeps a rank of {most} at most, got {k}"
        )


def _stages(tiles: Tiles, rank: int, itemsize: int) -> int:
    """How many loads of a loop may be under way: as many as shared memory holds, which sums may use too."""
    loads = max((tiles.rows + rank) * tiles.inner, rank * tiles.columns) * itemsize
    return max(1, min(3, (shared_memory() - tiles.rows * rank * itemsize) // loads))
