"""lanczos in Triton: rows made orthonormal, and orthogonal to a basis, in two passes over the basis.

As csrc/include/rmtkernels/lanczos.cuh does it, where the sweeps are explained, for groups of up to 16 rows: products
and sums are float64, Cholesky's factor of the rows' Gram matrix mixes them, and the device decides whether a third pass
over the basis is needed. No program waits for another, there is no atomic, and the host waits for nothing.

Status: interpreted and compiled, never run on a GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmtkernels.errors import DtypeError, ShapeError

ROWS = 16  # of a group: tl.dot takes no fewer
CHUNK, TAKEN = 32, 32  # columns, and rows of the basis, that a program has at once
MOST_PARTS = 128  # programs of a sweep: about one for each multiprocessor
SUM_PARTS, SUM_ENTRIES = 16, 32
SWEEPS, MORE_SWEEPS = 4, 6  # as many as the CUDA kernels have

# The state that a factorisation leaves: how the next sweep mixes the rows (16, 16), and by row the limit below which it
# drops out, whether a random one shall replace it now, and whether one has; then two numbers.
LIMIT, LEAVING, REPLACED, NEXT, SUBTRACT = (tl.constexpr(256 + 16 * i) for i in range(5))
STATE = 256 + 16 * 5
NOTHING, RENEW, RENEW_AND_MULTIPLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FLOOR = tl.constexpr(2.0**-46)  # of a pivot, relative to the row's own square: rounding of a float64 sum
SMALL = tl.constexpr(0.1)  # coefficients of a unit row below this are gone once they were taken off


class Precision(NamedTuple):
    """Thresholds of lanczos.cuh for one dtype."""

    rounding: float
    orthogonal: float  # norm of the coefficients a unit row may keep
    safe: float  # a pivot, relative to the row's own square, from which on the rounding of H does no harm


PRECISION = {
    torch.float32: Precision(2.0**-23, 2.0**-22, 2.0**-24),
    torch.float64: Precision(2.0**-52, 2.0**-46, 2.0**-4),
}


@triton.jit
def load_known(basis, unit, i, column, size, known, dim):  # type: ignore[no-untyped-def]
    """Rows i of the basis and, past it, of the groups before."""
    row = tl.where(i < size, basis + i * dim, unit + (i - size) * dim)
    inside = (i < known)[:, None] & (column < dim)[None, :]
    return tl.load(row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float64)


# rows (count, dim) and noise (count, dim) are this group's, basis (size, dim), unit (vectors, dim), where the group's
# place is `first`. coefficients (known + ROWS, ROWS) are C transposed, then H; parts (programs, known + ROWS, ROWS) are
# what a program adds to them. A program has every programs-th chunk of columns. All sweeps from 2 on do what the
# factorisation before them left in the state.
@triton.jit
def sweep_kernel(  # type: ignore[no-untyped-def]
    rows, basis, unit, noise, coefficients, parts, state, first, count, size, known, dim, shift,
    SWEEP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, ROWS).to(tl.int64)
    then = RENEW_AND_MULTIPLY
    if SWEEP > 1:
        then = tl.load(state + NEXT).to(tl.int32)
        if then == NOTHING:
            return
    own = unit + tl.cast(first, tl.int64) * dim
    begin, step = tl.program_id(0).to(tl.int64) * CHUNK, tl.num_programs(0) * CHUNK
    if SWEEP > 0:
        for chunk in range(begin, dim, step):
            column = chunk + tl.arange(0, CHUNK)
            inside = (r < count)[:, None] & (column < dim)[None, :]
            source = rows if SWEEP == 1 else own
            x = tl.load(source + r[:, None] * dim + column[None, :], mask=inside, other=0.0).to(tl.float64)
            taken_off = known
            if SWEEP > 1:
                taken_off = tl.where(tl.load(state + SUBTRACT) != 0.0, known, 0)
            for done in range(0, taken_off, TAKEN):
                i = done + tl.arange(0, TAKEN).to(tl.int64)
                at = coefficients + i[None, :] * ROWS + r[:, None]
                c = tl.load(at, mask=(i < known)[None, :], other=0.0)
                q = load_known(basis, unit, i, column, size, known, dim)
                x -= tl.dot(c, q, input_precision="ieee", out_dtype=tl.float64)
            if SWEEP > 1:
                leaves = (tl.load(state + LEAVING + r) != 0.0)[:, None]
                turned = tl.where(column >= shift, column - shift, column - shift + dim)
                random = tl.load(noise + r[:, None] * dim + turned[None, :], mask=inside & leaves, other=0.0)
                x = tl.where(leaves, random.to(tl.float64), x)
                mix = tl.load(state + r[:, None] * ROWS + r[None, :])
                x = tl.dot(mix, x, input_precision="ieee", out_dtype=tl.float64)
            tl.debug_barrier()  # all threads have read the rows
            tl.store(own + r[:, None] * dim + column[None, :], x.to(unit.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # what follows reads what other threads of this program wrote
    if then != RENEW_AND_MULTIPLY:
        return
    source = rows if SWEEP == 0 else own
    part = parts + tl.program_id(0).to(tl.int64) * (known + ROWS) * ROWS
    for done in range(0, known, TAKEN):
        i = done + tl.arange(0, TAKEN).to(tl.int64)
        sums = tl.zeros((TAKEN, ROWS), tl.float64)
        for chunk in range(begin, dim, step):
            column = chunk + tl.arange(0, CHUNK)
            inside = (r < count)[None, :] & (column < dim)[:, None]
            x = tl.load(source + r[None, :] * dim + column[:, None], mask=inside, other=0.0).to(tl.float64)
            q = load_known(basis, unit, i, column, size, known, dim)
            sums += tl.dot(q, x, input_precision="ieee", out_dtype=tl.float64)
        tl.store(part + i[:, None] * ROWS + r[None, :], sums, mask=(i < known)[:, None])
    gram = tl.zeros((ROWS, ROWS), tl.float64)
    for chunk in range(begin, dim, step):
        column = chunk + tl.arange(0, CHUNK)
        inside = (r < count)[:, None] & (column < dim)[None, :]
        x = tl.load(source + r[:, None] * dim + column[None, :], mask=inside, other=0.0).to(tl.float64)
        gram += tl.dot(x, tl.trans(x), input_precision="ieee", out_dtype=tl.float64)
    tl.store(part + (known + r[:, None]) * ROWS + r[None, :], gram)


# Adds up what the programs of a sweep found. After sweep 0 also hands out the products with the basis, and with the
# groups before: products (all rows, size), triangle (width, width).
@triton.jit
def sum_kernel(  # type: ignore[no-untyped-def]
    parts, coefficients, state, products, triangle, programs, first, count, size, known, width,
    SWEEP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    if SWEEP > 1:  # noqa: SIM102 (the compiler knows this condition, and not the other)
        if tl.load(state + NEXT) != RENEW_AND_MULTIPLY:
            return
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    entries = (known + ROWS) * ROWS
    sums = tl.zeros((PARTS, ENTRIES), tl.float64)
    for done in range(0, programs, PARTS):
        p = done + tl.arange(0, PARTS).to(tl.int64)
        inside = (p < programs)[:, None] & (entry < entries)[None, :]
        sums += tl.load(parts + p[:, None] * entries + entry[None, :], mask=inside, other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(coefficients + entry, total, mask=entry < entries)
    if SWEEP == 0:
        i, r = entry // ROWS, entry % ROWS
        tl.store(products + (first + r) * size + i, total, mask=(r < count) & (i < size))
        at = triangle + (i - size) * width + first + r
        tl.store(at, total, mask=(r < count) & (i >= size) & (i < known))


@triton.jit
def pick(x, i, k):  # type: ignore[no-untyped-def]
    """Entry k of a vector with indices i."""
    return tl.sum(tl.where(i == k, x, 0.0), axis=0)


# From C and H to the state of the sweep that follows; after that one there is no other if LAST. One program.
@triton.jit
def factor_kernel(  # type: ignore[no-untyped-def]
    coefficients, state, triangle, negligible, count, known, width, rounding, orthogonal, safe_pivot,
    BEGINS: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, ROWS)
    i, j = r[:, None], r[None, :]
    square = state + i * ROWS + j
    replaced = tl.zeros((ROWS,), tl.float64)
    limits = tl.zeros((ROWS,), tl.float64)
    before = tl.where((i == j) & (i < count), 1.0, 0.0).to(tl.float64)
    if not BEGINS:
        if tl.load(state + NEXT) != RENEW_AND_MULTIPLY:
            tl.debug_barrier()  # all threads have read it
            tl.store(state + NEXT, 0.0)
            return
        replaced = tl.load(state + REPLACED + r)
        limits = tl.load(state + LIMIT + r)
        before = tl.load(triangle + i * width + j, mask=(i < count) & (j < count), other=0.0)
    overlap = tl.zeros((ROWS, ROWS), tl.float64)
    for done in range(0, known, TAKEN):
        taken = done + tl.arange(0, TAKEN).to(tl.int64)
        inside = taken < known
        c = tl.load(coefficients + taken[:, None] * ROWS + j, mask=inside[:, None], other=0.0)
        overlap += tl.dot(tl.trans(c), c, input_precision="ieee", out_dtype=tl.float64)
    gram = tl.load(coefficients + (known + i) * ROWS + j)
    overlaps = tl.sum(tl.where(i == j, overlap, 0.0), axis=0)
    squares = tl.sum(tl.where(i == j, gram, 0.0), axis=0)
    diagonal = tl.sum(tl.where(i == j, before, 0.0), axis=0)

    # Gauss elimination of (H - C Cᵀ, 1) gives L, whose pivots are squares of its diagonal, and what L⁻¹ is made of.
    left = gram - overlap
    inverse = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    lower = tl.zeros((ROWS, ROWS), tl.float64)
    pivots = tl.zeros((ROWS,), tl.float64)
    leaving = tl.zeros((ROWS,), tl.float64)
    safe = 1
    for k in range(count):
        row = tl.sum(tl.where(i == k, left, 0.0), axis=0)
        column = tl.sum(tl.where(j == k, left, 0.0), axis=1)
        mixed = tl.sum(tl.where(i == k, inverse, 0.0), axis=0)
        size, found = pick(squares, r, k), pick(row, r, k)
        seen = tl.maximum(found, FLOOR * size)
        # What C Q leaves of a basis that is orthonormal to rounding only.
        pivot = tl.maximum(seen, rounding * pick(overlaps, r, k))
        root = tl.sqrt(pivot)
        limit = pick(limits, r, k)
        if BEGINS:
            limit = tl.maximum(tl.load(negligible), rounding * tl.sqrt(size))
        enough = pick(diagonal, r, k) * tl.sqrt(seen) > limit
        stays = enough | (pick(replaced, r, k) != 0.0) | LAST
        safe = safe & (stays & (found >= safe_pivot * size)).to(tl.int32)
        divides = stays & (pivot > 0.0)
        share = tl.where(divides, column / tl.where(divides, pivot, 1.0), 0.0)
        share = tl.where((r > k) & (r < count), share, 0.0)
        left -= share[:, None] * row[None, :]
        inverse -= share[:, None] * mixed[None, :]
        lower += tl.where(j == k, (share * root)[:, None] + tl.where(i == k, root, 0.0), 0.0)
        pivots = tl.where(r == k, pivot, pivots)
        limits = tl.where(r == k, limit, limits)
        leaving = tl.where(r == k, tl.where(stays, 0.0, 1.0), leaving)

    has = (pivots > 0.0) & (r < count)
    mix = tl.where(has[:, None], inverse / tl.sqrt(tl.where(has, pivots, 1.0))[:, None], 0.0)
    leaves = leaving[:, None] != 0.0
    kept = tl.where(leaves, 0.0, mix)
    products = tl.dot(kept, overlap, input_precision="ieee", out_dtype=tl.float64) * kept
    left_over = tl.max(tl.sum(products, axis=1), axis=0)  # square of the coefficients that a new row would keep
    triangular = tl.dot(tl.trans(lower), before, input_precision="ieee", out_dtype=tl.float64)
    again = (left_over > SMALL * SMALL) | (safe == 0)
    if LAST:
        again = safe < 0
    tl.debug_barrier()  # all threads have read the state and the triangle
    tl.store(triangle + i * width + j, triangular, mask=(i < count) & (j < count))
    tl.store(square, tl.where(leaves, inverse * 0.0 + tl.where(i == j, 1.0, 0.0), mix))
    tl.store(state + LIMIT + r, limits)
    tl.store(state + LEAVING + r, leaving)
    tl.store(state + REPLACED + r, tl.maximum(replaced, leaving))
    tl.store(state + NEXT, tl.where(again, RENEW_AND_MULTIPLY, RENEW).to(tl.float64))
    tl.store(state + SUBTRACT, (left_over > orthogonal * orthogonal).to(tl.float64))


class _Step:
    """One block step: the tensors of all groups, and the launches of one."""

    def __init__(self, rows: Tensor, basis: Tensor, noise: Tensor, negligible: Tensor, shift: int) -> None:
        (count, dim), size = rows.shape, len(basis)
        self.rows, self.basis, self.noise, self.negligible, self.shift = rows, basis, noise, negligible, shift
        self.unit = rows.new_empty((min(count, dim - size), dim))
        self.triangle = rows.new_zeros((count, count), dtype=torch.float64)
        self.products = rows.new_empty((count, size), dtype=torch.float64)
        self.programs = min(triton.cdiv(dim, CHUNK), MOST_PARTS)
        entries = (min(size + count, dim) + ROWS) * ROWS
        self.state = rows.new_empty(STATE, dtype=torch.float64)
        self.coefficients = rows.new_empty(entries, dtype=torch.float64)
        self.parts = rows.new_empty(self.programs * entries, dtype=torch.float64)

    def run(self) -> None:
        (rows, dim), size = self.rows.shape, len(self.basis)
        first = 0
        while first < rows:
            # Rows for which there is room and those beyond do not share a group.
            room = dim - size - first
            count = min(ROWS, rows - first, room if room > 0 else rows)
            self._group(first, count, min(size + first, dim))
            first += count

    def _group(self, first: int, count: int, known: int) -> None:
        (width, dim), dtype = self.rows.shape, self.rows.dtype
        self._sweep(0, first, count, known, sums=True)
        if known == dim:
            return
        self._sweep(1, first, count, known, sums=True)
        crowded = known + count > dim // 2  # little may be left of a random row
        sweeps = MORE_SWEEPS if dtype == torch.float64 or crowded else SWEEPS
        for number in range(2, sweeps):
            last = number == sweeps - 1
            factor_kernel[(1,)](
                self.coefficients, self.state, self.triangle[first:, first:], self.negligible, count, known, width,
                *PRECISION[dtype], BEGINS=number == 2, LAST=last, ROWS=ROWS, TAKEN=TAKEN,
                num_warps=4, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
            self._sweep(number, first, count, known, sums=not last)

    def _sweep(self, number: int, first: int, count: int, known: int, sums: bool) -> None:
        (width, dim), size = self.rows.shape, len(self.basis)
        which = min(number, 2)  # all from the second on are one kernel
        sweep_kernel[(self.programs,)](
            self.rows[first:], self.basis, self.unit, self.noise[first:], self.coefficients, self.parts, self.state,
            first, count, size, known, dim, self.shift, SWEEP=which, ROWS=ROWS, CHUNK=CHUNK, TAKEN=TAKEN,
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        if sums:
            sum_kernel[(triton.cdiv((known + ROWS) * ROWS, SUM_ENTRIES),)](
                self.parts, self.coefficients, self.state, self.products, self.triangle,
                self.programs, first, count, size, known, width,
                SWEEP=which, ROWS=ROWS, PARTS=SUM_PARTS, ENTRIES=SUM_ENTRIES,
                num_warps=4, num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip


def lanczos_orthonormalize(
    rows: Tensor, basis: Tensor, noise: Tensor, negligible: Tensor, shift: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit, triangle and products of rows = products @ basis + triangle.T @ unit."""
    _check(rows, basis, noise, negligible, shift)
    step = _Step(rows, basis, noise, negligible, shift)
    step.run()
    return step.unit, step.triangle, step.products


def _check(rows: Tensor, basis: Tensor, noise: Tensor, negligible: Tensor, shift: int) -> None:
    if rows.dtype not in PRECISION or negligible.dtype != torch.float64 or negligible.numel() != 1:
        raise DtypeError(
            f"rows must be float32 or float64 and negligible one float64 number, got {rows.dtype}, {negligible.dtype}"
        )
    for name, tensor in (("rows", rows), ("basis", basis), ("noise", noise)):
        if tensor.dtype != rows.dtype:
            raise DtypeError(f"{name} must have the rows' dtype {rows.dtype}, got {tensor.dtype}")
        if tensor.dim() != 2 or not tensor.is_contiguous() or tensor.shape[1] != rows.shape[-1]:
            raise ShapeError(f"{name} must be contiguous (vectors, {rows.shape[-1]}), got {tuple(tensor.shape)}")
    dim = rows.shape[1]
    if len(basis) > dim or len(noise) < len(rows) or not 0 <= shift < dim:
        raise ShapeError(
            f"{len(basis)} basis vectors and {len(noise)} random rows, shifted by {shift}, do not go with "
            f"{len(rows)} rows of {dim}"
        )
