"""sliding_window in Triton: the Gram matrices of all windows of whole sequences.

All windows are parts of one band: row r beside the N - 1 accepted rows before it. Three launches: rows are judged, the
band is multiplied in tiles near the diagonal of X Xᵀ, and each window takes its entries from it. In between PyTorch
counts and lists the rows that were accepted. Nothing waits for the device, no program reads what another of its launch
writes, and there is no atomic.

Status: interpreted and compiled, never run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmtkernels.ops.sliding_window import check_gram
from rmtkernels.triton.sliding_window import ACCEPT_WARPS, ACCEPT_WIDTH, FLOAT32_MAX

JUDGED = 8  # rows of a program of judge_kernel
TILE = 32  # of the band: a smaller part of a larger tile would be within the window
DEPTH_HALF, DEPTH_FLOAT32 = 128, 32  # products added in float32; their sums are added in float64
SLOTS = 16  # of a window, whose rows a program writes


# hidden (batch, steps, dim) of any strides, mask (batch, steps) or None. taken (batch, steps) int64: 1 for an accepted
# row, else 0. rows = batch * steps.
@triton.jit
def judge_kernel(  # type: ignore[no-untyped-def]
    hidden, mask, taken, rows, steps, dim,
    hidden_batch, hidden_step, hidden_column, mask_batch, mask_step,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = number < rows
    sequence, step = number // steps, number % steps
    offered = inside
    if mask is not None:
        at = mask + sequence * mask_batch + step * mask_step
        offered = offered & (tl.load(at, mask=inside, other=0).to(tl.int32) != 0)
    data = hidden + sequence * hidden_batch + step * hidden_step
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, dim, WIDTH):
        i = first + tl.arange(0, WIDTH).to(tl.int64)
        read = offered[:, None] & (i < dim)[None, :]
        values = tl.load(data[:, None] + i[None, :] * hidden_column, mask=read, other=0.0).to(tl.float32)
        sums = tl.fma(values, values, sums)
    finite = tl.sum(sums.to(tl.float64), axis=1) <= FLOAT32_MAX  # NaN fails the comparison
    tl.store(taken + number, (offered & finite).to(tl.int64), mask=inside)


# counts (batch, steps): rows accepted up to a step; order (batch, steps): the steps of accepted rows, then others.
# band (batch, steps, window): entry k of row r is its product with row r - k. A program owns the products of the rows
# of one tile with those of the tile program_id(1) tiles before it.
@triton.jit
def band_kernel(  # type: ignore[no-untyped-def]
    hidden, counts, order, band, steps, dim, window, hidden_batch, hidden_step, hidden_column,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(steps, TILE)
    sequence, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    count = tl.load(counts + sequence * steps + steps - 1)
    if (tile < tl.program_id(1)) | (tile * TILE >= count):
        return
    row = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    column = (tile - tl.program_id(1)).to(tl.int64) * TILE + tl.arange(0, TILE)
    row_step = tl.load(order + sequence * steps + row, mask=row < count, other=0)
    column_step = tl.load(order + sequence * steps + column, mask=column < count, other=0)
    data = hidden + sequence * hidden_batch
    total = tl.zeros((TILE, TILE), tl.float64)
    for first in range(0, dim, DEPTH):
        i = first + tl.arange(0, DEPTH).to(tl.int64)
        a = tl.load(
            data + row_step[:, None] * hidden_step + i[None, :] * hidden_column,
            mask=(row < count)[:, None] & (i < dim)[None, :],
            other=0.0,
        )
        b = tl.load(
            data + column_step[None, :] * hidden_step + i[:, None] * hidden_column,
            mask=(column < count)[None, :] & (i < dim)[:, None],
            other=0.0,
        )
        total += tl.dot(a, b, input_precision="ieee").to(tl.float64)
    # An entry beside a norm that just fits float32 may round beyond it.
    entries = tl.minimum(tl.maximum(total, -FLOAT32_MAX), FLOAT32_MAX).to(tl.float32)
    lag = row[:, None] - column[None, :]
    at = band + (sequence * steps + row)[:, None] * window + lag
    tl.store(at, entries, mask=(row < count)[:, None] & (lag >= 0) & (lag < window))


# seen (batch, windows), gram (batch, windows, window, window). PADDED >= window is a power of two. A program writes
# SLOTS rows of one window.
@triton.jit
def windows_kernel(  # type: ignore[no-untyped-def]
    band, seen, gram, windows, steps, window, SLOTS: tl.constexpr, PADDED: tl.constexpr
):
    number = tl.program_id(0).to(tl.int64)
    newest = tl.load(seen + number).to(tl.int32) - 1
    i = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)[:, None]
    j = tl.arange(0, PADDED)[None, :]
    # Slot i holds the last row, up to the newest, whose number leaves i when it is divided by the window's length.
    row, column = newest - (newest + window - i) % window, newest - (newest + window - j) % window
    inside = (i < window) & (j < window)
    at = (number // windows * steps + tl.maximum(row, column)) * window + tl.abs(row - column)
    entries = tl.load(band + at, mask=inside & (row >= 0) & (column >= 0), other=0.0)
    tl.store(gram + (number * window + i) * window + j, entries, mask=inside)


def window_gram(hidden: Tensor, window: int, stride: int = 1, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gram matrices (B, T // stride, N, N) of all windows, and how many rows had been accepted by then."""
    check_gram(hidden, window, stride, mask)
    batch, windows = hidden.shape[0], hidden.shape[1] // stride
    gram = hidden.new_empty((batch, windows, window, window), dtype=torch.float32)
    if batch * windows == 0:
        return gram, hidden.new_empty((batch, windows), dtype=torch.int64)
    hidden = hidden[:, : windows * stride]
    taken = _judged(hidden, mask)
    counts = taken.cumsum(1)
    seen = counts[:, stride - 1 :: stride].contiguous()
    band = _band(hidden, counts, (1 - taken).argsort(dim=1, stable=True), window)
    windows_kernel[(batch * windows, triton.cdiv(window, SLOTS))](
        band, seen, gram, windows, hidden.shape[1], window,
        SLOTS=SLOTS, PADDED=triton.next_power_of_2(window), num_warps=4, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
    return gram, seen


def _judged(hidden: Tensor, mask: Tensor | None) -> Tensor:
    batch, steps, dim = hidden.shape
    taken = hidden.new_empty((batch, steps), dtype=torch.int64)
    judge_kernel[(triton.cdiv(batch * steps, JUDGED),)](
        hidden, mask, taken, batch * steps, steps, dim, *hidden.stride(), *((0, 0) if mask is None else mask.stride()),
        ROWS=JUDGED, WIDTH=ACCEPT_WIDTH, num_warps=ACCEPT_WARPS, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
    return taken


def _band(hidden: Tensor, counts: Tensor, order: Tensor, window: int) -> Tensor:
    batch, steps, dim = hidden.shape
    band = hidden.new_empty((batch, steps, window), dtype=torch.float32)
    band_kernel[(batch * triton.cdiv(steps, TILE), triton.cdiv(window - 1, TILE) + 1)](
        hidden, counts, order, band, steps, dim, window, *hidden.stride(),
        TILE=TILE, DEPTH=DEPTH_FLOAT32 if hidden.dtype == torch.float32 else DEPTH_HALF,
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return band
