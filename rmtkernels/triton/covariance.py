"""covariance in Triton: squared norms of the rows, their weighted column sums, and the scatter matrix' lower tiles.

What lies between the three launches is small and PyTorch's: which rows count, their total weight, whether the sums
fit. All of it is decided on the device, and nothing waits: where a weight is out of range or the sums would overflow,
every row offered is counted as rejected, and nothing else changes. There is no atomic.

Status: interpreted and compiled, never run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmtkernels.ops.covariance import check_layout

NORM_ROWS, NORM_WIDTH = 16, 128  # of a program of norms_kernel, at once
SUM_ROWS, SUM_WIDTH = 64, 16
TILE, DEPTH = 64, 16  # of the scatter matrix; rows that a product adds at once
RUN = tl.constexpr(128)  # rows added to one another before they are added to the others: keeps float32's digits


@triton.jit
def to_double(x):  # type: ignore[no-untyped-def]
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)  # the interpreter knows no other way
    return x.to(tl.float64)


# batch (rows, dim); norms (rows,) float64.
@triton.jit
def norms_kernel(  # type: ignore[no-untyped-def]
    batch, norms, rows, dim, row_stride, column_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, WIDTH), tl.float64)
    for first in range(0, dim, WIDTH):
        column = first + tl.arange(0, WIDTH).to(tl.int64)
        at = batch + row[:, None] * row_stride + column[None, :] * column_stride
        x = to_double(tl.load(at, mask=(row < rows)[:, None] & (column < dim)[None, :], other=0.0))
        sums += x * x
    tl.store(norms + row, tl.sum(sums, axis=1), mask=row < rows)


# kept (rows,) float64: the weight of a row, 0 if it does not count; then it is not multiplied, whatever it holds.
@triton.jit
def sums_kernel(  # type: ignore[no-untyped-def]
    batch, kept, sums, rows, dim, row_stride, column_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    column = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        weight = tl.load(kept + row, mask=row < rows, other=0.0)[:, None]
        at = batch + row[:, None] * row_stride + column[None, :] * column_stride
        x = to_double(tl.load(at, mask=(weight > 0.0) & (column < dim)[None, :], other=0.0))
        total += weight * x
    tl.store(sums + column, tl.sum(total, axis=0), mask=column < dim)


# plan (4,) float64: 1 or 0 (then nothing is to be done), decay, weight of the squared gap, 1 if the state is fresh.
# mean and gap (dim,) float64; scatter (dim, dim) is contiguous. A program owns a tile that is not above the diagonal.
@triton.jit
def scatter_kernel(  # type: ignore[no-untyped-def]
    batch, kept, mean, gap, plan, scatter, rows, dim, row_stride, column_stride,
    TILE: tl.constexpr, DEPTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    if (tl.program_id(1) > tl.program_id(0)) | (tl.load(plan) == 0.0):
        return
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mean_i = tl.load(mean + i, mask=i < dim, other=0.0)
    mean_j = tl.load(mean + j, mask=j < dim, other=0.0)
    total = tl.zeros((TILE, TILE), SUM)
    for begin in range(0, rows, RUN):
        run = tl.zeros((TILE, TILE), SUM)
        for first in range(begin, tl.minimum(begin + RUN, rows), DEPTH):
            row = first + tl.arange(0, DEPTH).to(tl.int64)
            weight = tl.load(kept + row, mask=row < rows, other=0.0)
            counts = weight > 0.0
            at = batch + row * row_stride
            mask_i = (i < dim)[:, None] & counts[None, :]
            a = to_double(tl.load(at[None, :] + i[:, None] * column_stride, mask=mask_i, other=0.0))
            a = tl.where(mask_i, a - mean_i[:, None], 0.0)
            mask_j = counts[:, None] & (j < dim)[None, :]
            b = to_double(tl.load(at[:, None] + j[None, :] * column_stride, mask=mask_j, other=0.0))
            b = tl.where(mask_j, weight[:, None] * (b - mean_j[None, :]), 0.0)
            run = tl.dot(a.to(SUM), b.to(SUM), run, input_precision="ieee", out_dtype=SUM)
        total += run
    between = tl.load(plan + 2)
    gap_i = tl.load(gap + i, mask=i < dim, other=0.0)
    gap_j = tl.load(gap + j, mask=j < dim, other=0.0)
    total += (between * gap_i[:, None] * gap_j[None, :]).to(SUM)
    lower = (i[:, None] >= j[None, :]) & (i < dim)[:, None]
    at = scatter + i[:, None] * dim + j[None, :]
    width = tl.where(tl.load(plan + 3) == 0.0, dim, 0)  # a fresh state is not read
    old = tl.load(at, mask=lower & (i < width)[:, None], other=0.0)
    tl.store(at, tl.load(plan + 1).to(SUM) * old + total, mask=lower)


def covariance_update_(
    mean: Tensor,
    scatter: Tensor,
    totals: Tensor,
    batch: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    decay: float,
) -> None:
    """Adds a batch to a state."""
    check_layout(mean, scatter, totals, batch, weights, mask, decay)
    if len(batch) == 0:
        return
    largest = torch.finfo(scatter.dtype).max
    norms = _norms(batch)
    given = torch.ones_like(norms) if weights is None else weights.double()
    given = given if mask is None else torch.where(mask, given, 0.0)
    offered, usable = given != 0, (given >= 0) & (given < torch.inf)
    kept = torch.where(usable & (norms <= largest), given, 0.0)
    total = kept.sum()
    batch_mean = _sums(batch, kept) / total

    fresh = totals[0] == 0
    before = decay * totals[0]
    after = before + total
    between = torch.where(fresh, 0.0, before * (total / after))
    gap = torch.where(fresh, 0.0, batch_mean - mean)
    energy = torch.where(kept > 0, kept * norms, 0.0).sum() - total * batch_mean.square().sum()
    old_trace = torch.where(fresh, 0.0, decay * scatter.diagonal().double().sum())
    trace = old_trace + between * gap.square().sum() + energy.clamp(min=0.0)
    in_range = usable.all() & (before >= 0) & (after < torch.inf) & (trace <= largest / 2)
    act = in_range & (total > 0)

    plan = torch.stack([act, torch.full_like(total, decay), between, fresh])
    blocks = triton.cdiv(scatter.shape[0], TILE)
    scatter_kernel[(blocks, blocks)](
        batch, kept, batch_mean, gap, plan, scatter, *batch.shape, *batch.stride(),
        TILE=TILE, DEPTH=DEPTH, SUM=tl.float32 if scatter.dtype == torch.float32 else tl.float64,
        num_warps=8, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    mean.copy_(torch.where(act, torch.where(fresh, batch_mean, mean + total / after * gap), mean))
    squares = torch.where(fresh, 0.0, decay * decay * totals[1]) + kept.square().sum()
    decays = totals[4] + (~fresh & (decay < 1))
    rejected = totals[3] + torch.where(in_range, (offered & (kept == 0)).sum(), offered.sum())
    updated = torch.stack([after, squares, totals[2] + (kept > 0).sum(), rejected, decays])
    totals.copy_(torch.where(act, updated, torch.cat([totals[:3], rejected[None], totals[4:]])))


def _norms(batch: Tensor) -> Tensor:
    norms = batch.new_empty(len(batch), dtype=torch.float64)
    norms_kernel[(triton.cdiv(len(batch), NORM_ROWS),)](
        batch, norms, *batch.shape, *batch.stride(),
        ROWS=NORM_ROWS, WIDTH=NORM_WIDTH, num_warps=4, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
    return norms


def _sums(batch: Tensor, kept: Tensor) -> Tensor:
    sums = batch.new_empty(batch.shape[1], dtype=torch.float64)
    sums_kernel[(triton.cdiv(batch.shape[1], SUM_WIDTH),)](
        batch, kept, sums, *batch.shape, *batch.stride(),
        ROWS=SUM_ROWS, WIDTH=SUM_WIDTH, num_warps=4, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
    return sums
