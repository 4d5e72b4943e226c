"""sliding_window in Triton: one token of all layers and sequences in two launches.

The first decides for every sequence whether its new row is taken in all layers, and says so in `seen`; the second puts
the rows into the rings and refreshes the Gram matrices. One launch could not: a program would need the norms of all
layers before it may write in its own, and that costs as many bytes as the dot products. Nothing is allocated and the
host waits for nothing. No program reads a ring row that another of the same launch writes, and there is no atomic.
"""

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from rmtkernels.ops.sliding_window import check_push

MOST_LAYERS = 64  # of a launch: each is a kernel parameter
# Elements of a row, and ring slots of one stream, that a program has in registers; warps.
ACCEPT_WIDTH, ACCEPT_WARPS = 256, 8
PUSH_WIDTH, PUSH_SLOTS, PUSH_WARPS = 1024, 2, 4
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
SEEN = tl.constexpr(3)  # columns of `seen`: rows accepted, rows rejected, slot of the row offered last


# rows: a tuple of LAYERS pointers to (B, D) with the same strides. mask: (B,) or None. seen (B, 3). PADDED >= LAYERS is
# a power of two. A program decides for one sequence. The layers may come in several launches: until the last,
# a slot >= 0 means that no layer has objected so far, and a launch that finds -1 there has nothing to add.
@triton.jit
def accept_kernel(  # type: ignore[no-untyped-def]
    rows, mask, seen, dim, window, row_offset, row_batch, row_column, mask_offset, mask_batch,
    FIRST: tl.constexpr, LAST: tl.constexpr, LAYERS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    counters = seen + sequence * SEEN
    accepted, rejected = tl.load(counters), tl.load(counters + 1)
    offered = True
    if mask is not None:
        offered = tl.load(mask + mask_offset + sequence * mask_batch).to(tl.int32) != 0
    if not FIRST:
        offered = offered & (tl.load(counters + 2) >= 0)

    layer = tl.arange(0, PADDED)
    data = rows[0] + tl.zeros((PADDED,), tl.int64)
    for other in tl.static_range(1, LAYERS):
        data = tl.where(layer == other, rows[other], data)
    data += row_offset + sequence * row_batch
    width = tl.where(offered, dim, 0)
    sums = tl.zeros((PADDED, WIDTH), tl.float32)
    for first in range(0, dim, WIDTH):
        i = first + tl.arange(0, WIDTH).to(tl.int64)
        read = (layer < LAYERS)[:, None] & (i < width)[None, :]
        values = tl.load(data[:, None] + i[None, :] * row_column, mask=read, other=0.0).to(tl.float32)
        sums = tl.fma(values, values, sums)
    norms = tl.sum(sums.to(tl.float64), axis=1)
    wrong = tl.max((~(norms <= FLOAT32_MAX)).to(tl.int32), axis=0) > 0  # NaN fails the comparison

    taken = offered & ~wrong
    tl.debug_barrier()  # all threads have read the counters
    tl.store(counters + 1, rejected + wrong.to(tl.int64))
    tl.store(counters + 2, tl.where(taken, accepted % window, -1))
    if LAST:
        tl.store(counters, accepted + taken.to(tl.int64))


# ring (L, B, N, D), gram (L, B, N, N), seen (B, 3) are contiguous, ring and gram from the first of LAYERS layers on. A
# program owns SLOTS slots of one stream: it writes the ring row and the Gram entries that belong to them, and no other.
@triton.jit
def push_kernel(  # type: ignore[no-untyped-def]
    rows, ring, gram, seen, batch, window, dim, row_offset, row_batch, row_column,
    LAYERS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(window, SLOTS)
    sequence, layer = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    slot = tl.load(seen + sequence * SEEN + 2)
    if slot < 0:
        return
    used = tl.minimum(tl.load(seen + sequence * SEEN), window)
    data = rows[0]
    for other in tl.static_range(1, LAYERS):
        data = tl.where(layer == other, rows[other], data)
    data += row_offset + sequence * row_batch

    stream = layer * batch + sequence
    block = tl.program_id(0) % blocks
    j = block * SLOTS + tl.arange(0, SLOTS).to(tl.int64)
    own = (j == slot)[:, None]
    written = tl.where(slot // SLOTS == block, dim, 0)  # elements of the row that this program stores
    sums = tl.zeros((SLOTS, WIDTH), tl.float32)
    for first in range(0, dim, WIDTH):
        i = first + tl.arange(0, WIDTH).to(tl.int64)
        new = tl.load(data + i * row_column, mask=i < dim, other=0.0)
        tl.store(ring + (stream * window + slot) * dim + i, new, mask=i < written)
        wide = new.to(tl.float32)[None, :]
        at = ring + (stream * window + j[:, None]) * dim + i[None, :]
        old = tl.load(at, mask=(j < used)[:, None] & ~own & (i < dim)[None, :], other=0.0).to(tl.float32)
        sums = tl.fma(wide, tl.where(own, wide, old), sums)
    # An entry beside a norm that just fits float32 may round beyond it.
    dots = tl.sum(sums.to(tl.float64), axis=1)
    dots = tl.minimum(tl.maximum(dots, -FLOAT32_MAX), FLOAT32_MAX).to(tl.float32)
    entries = gram + stream * window * window
    tl.store(entries + slot * window + j, dots, mask=j < used)
    tl.store(entries + j * window + slot, dots, mask=j < used)


def window_push_(ring: Tensor, gram: Tensor, seen: Tensor, rows: Sequence[Tensor], mask: Tensor | None) -> None:
    """Pushes one row, or several one after another, into all windows."""
    check_push(ring, gram, seen, rows, mask)
    if ring.shape[0] == 0 or ring.shape[1] == 0:
        return
    for step in range(rows[0].shape[1] if rows[0].dim() == 3 else 1):
        for first, last in _chunks(rows):
            _accept(seen, rows[first:last], mask, step, ring.shape[2], first == 0, last == len(rows))
        for first, last in _chunks(rows):
            _push(ring[first:last], gram[first:last], seen, rows[first:last], step)


def _chunks(rows: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Neighbouring layers whose rows are laid out alike, as many at a time as a launch takes."""
    first = 0
    for layer in range(1, len(rows) + 1):
        full = layer - first == MOST_LAYERS
        if layer == len(rows) or full or rows[layer].stride() != rows[first].stride():
            yield first, layer
            first = layer


def _offsets(rows: Tensor, step: int) -> tuple[int, int, int]:
    """Where the step's rows begin, and from sequence to sequence, and from element to element."""
    strides = rows.stride()
    return step * strides[1] if len(strides) == 3 else 0, strides[0], strides[-1]


def _accept(
    seen: Tensor, rows: Sequence[Tensor], mask: Tensor | None, step: int, window: int, first: bool, last: bool
) -> None:
    mask_offset = step * mask.stride(1) if mask is not None and mask.dim() == 2 else 0
    accept_kernel[(len(seen),)](
        tuple(rows), mask, seen, rows[0].shape[-1], window, *_offsets(rows[0], step),
        mask_offset, 0 if mask is None else mask.stride(0),
        FIRST=first, LAST=last, LAYERS=len(rows), PADDED=triton.next_power_of_2(len(rows)), WIDTH=ACCEPT_WIDTH,
        num_warps=ACCEPT_WARPS, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip


def _push(ring: Tensor, gram: Tensor, seen: Tensor, rows: Sequence[Tensor], step: int) -> None:
    layers, batch, window, dim = ring.shape
    push_kernel[(batch * triton.cdiv(window, PUSH_SLOTS), layers)](
        tuple(rows), ring, gram, seen, batch, window, dim, *_offsets(rows[0], step),
        LAYERS=layers, SLOTS=PUSH_SLOTS, WIDTH=PUSH_WIDTH,
        num_warps=PUSH_WARPS, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
