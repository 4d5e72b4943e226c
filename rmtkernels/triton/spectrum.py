"""spectrum in Triton: all eigenvalues of one small symmetric matrix by one program, in registers and float64.

As the CUDA kernel does it: the matrix is scaled by a power of two, sorted by its diagonal, reduced to tridiagonal form
by Householder reflections, and its eigenvalues are bisected by counting signs of Sturm sequences. Lanczos with full
reorthogonalisation would give the same tridiagonal form for twice the operations and lose the small eigenvalues of
graded matrices, of which the contract keeps the digits; and it would need a restart where a Krylov space ends.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmtkernels.errors import BackendError

WIDTH_FLOAT32, WIDTH_FLOAT64 = 2.0**-40, 2.0**-51  # of an interval, in units of its ends; as the CUDA kernel
# Warps of a program, by size rounded up to a power of two: few, since they meet several times in each reflection, and
# enough for the matrix to stay in registers.
WARPS = {16: 2, 32: 4, 64: 8}

NEGLIGIBLE_SQUARE = tl.constexpr(1e-200)  # of entries near 1: far below every rounding, above underflow
SMALLEST_PIVOT = tl.constexpr(2.0**-900)
SMALLEST_WIDTH = tl.constexpr(2.0**-80)  # of an interval, in units of the largest row sum
MARGIN = tl.constexpr(1.0 + 2.0**-30)
POINTS = tl.constexpr(4)  # of an interval, at which a pass counts; it keeps a fifth
MOST_PASSES = tl.constexpr(48)  # 5^48 = 2^111 times narrower: a safety net


@triton.jit
def diagonal_order(entry, n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where rows and columns come from that are to stand in the order of their diagonal entries, largest first, those
    past n last. So a reflection never mixes a large row into the smaller ones that are still to be reduced."""
    row = tl.arange(0, N)
    entry = tl.where(entry == entry, tl.abs(entry), 0.0)  # NaN has no order
    entry = tl.where(row < n, entry, -1.0)
    first = (entry[:, None] > entry[None, :]) | ((entry[:, None] == entry[None, :]) & (row[:, None] < row[None, :]))
    rank = tl.sum(first.to(tl.int32), axis=0)
    return tl.sum(tl.where(rank[:, None] == row[None, :], row[:, None], 0), axis=0)


@triton.jit
def load_sorted(matrix, n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The matrix in the order of its diagonal; zeros past n."""
    row = tl.arange(0, N)
    order = diagonal_order(tl.load(matrix + row * (n + 1), mask=row < n, other=0.0).to(tl.float64), n, N)
    i, j = tl.maximum(order[:, None], order[None, :]), tl.minimum(order[:, None], order[None, :])
    return tl.load(matrix + i * n + j, mask=i < n, other=0.0).to(tl.float64)


@triton.jit
def tridiagonalise(a, diagonal, squares, n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes the diagonal of the tridiagonal form and the squares of its subdiagonal.

    The update is symmetric to the bit (no fused multiply-add may make it otherwise), so a row is read for a column.
    """
    row = tl.arange(0, N)
    for k in range(n - 1):
        column = tl.sum(tl.where(row[:, None] == k, a, 0.0), axis=0)
        head = tl.sum(tl.where(row == k + 1, column, 0.0), axis=0)
        column = tl.where(row > k + 1, column, 0.0)
        # The tail is summed apart: beside a head 1e8 times larger its square is lost, but not its effect.
        tail = tl.sum(column * column, axis=0)
        squared = tail + head * head
        negligible = squared < NEGLIGIBLE_SQUARE
        norm = tl.sqrt(squared)
        pivot = norm + tl.abs(head)
        nothing = negligible | (tail == 0.0)
        beta = tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, norm * pivot))
        v = tl.where(row == k + 1, tl.where(head < 0.0, -pivot, pivot), column)
        tl.store(squares + k, tl.where(negligible, 0.0, squared))
        w = tl.where(row > k, beta * tl.sum(a * v[:, None], axis=0), 0.0)
        w -= 0.5 * beta * tl.sum(v * w, axis=0) * v
        a -= v[:, None] * w[None, :] + w[:, None] * v[None, :]
    tl.store(diagonal + row, tl.sum(tl.where(row[:, None] == row[None, :], a, 0.0), axis=0), mask=row < n)
    tl.store(squares + n - 1, 0.0)


@triton.jit
def sturm_counts(diagonal, squares, n, x):  # type: ignore[no-untyped-def]
    """How many eigenvalues of the tridiagonal matrix are less than each x: the signs of the pivots of T - x. In IEEE
    arithmetic a count never falls where x rises (Kahan). A pivot near zero is taken for a negative one."""
    count = (x != x).to(tl.int32)
    pivot = x * 0.0 + 1.0
    square = tl.load(squares + n - 1)  # 0
    for i in range(n):
        pivot = (tl.load(diagonal + i) - x) - square / pivot
        pivot = tl.where(tl.abs(pivot) < SMALLEST_PIVOT, -SMALLEST_PIVOT, pivot)
        count += (pivot < 0.0).to(tl.int32)
        square = tl.load(squares + i)
    return count


@triton.jit
def bisect(diagonal, squares, n, width, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eigenvalues, ascending. All start from one interval, and which fifth of it is kept depends on the counts and
    falls nowhere as the number rises: so the results are in order, rounding or not."""
    number = tl.arange(0, N)
    inside = number < n
    square = tl.load(squares + number, mask=inside, other=0.0)
    before = tl.load(squares + number - 1, mask=inside & (number > 0), other=0.0)
    sums = tl.abs(tl.load(diagonal + number, mask=inside, other=0.0)) + tl.sqrt(square) + tl.sqrt(before)
    bound = tl.max(sums, axis=0) * MARGIN
    high = tl.where(inside, bound, 0.0)
    low = -high
    share = (tl.arange(0, POINTS) + 1).to(tl.float64)
    passes = 0
    busy = 1
    while busy * (passes < MOST_PASSES) > 0:
        searching = (high - low > width * tl.maximum(tl.abs(low), tl.abs(high))) & (high - low > SMALLEST_WIDTH * bound)
        step = 0.2 * (high - low)
        counts = sturm_counts(diagonal, squares, n, low[:, None] + share[None, :] * step[:, None])
        fifth = tl.sum((counts <= number[:, None]).to(tl.int32), axis=1)  # points that have the eigenvalue above them
        high = tl.where(searching & (fifth < POINTS), low + (fifth + 1).to(tl.float64) * step, high)
        low = tl.where(searching & (fifth > 0), low + fifth.to(tl.float64) * step, low)
        busy = tl.max(searching.to(tl.int32), axis=0)
        passes += 1
    return 0.5 * (low + high)


@triton.jit
def solve(a, diagonal, squares, n, width, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eigenvalues, ascending, of a matrix that is zero past n; NaN if it is not finite. `diagonal` and `squares`, n
    numbers each, side by side, are scratch."""
    wrong = tl.max(tl.max((a - a != 0.0).to(tl.int32), axis=1), axis=0) > 0
    a = tl.where(wrong, 0.0, a)
    # By a power of two, so that the largest entry lies in [1/2, 1). IEEE 754 keeps the exponent of 2^e as e + 1023.
    largest = tl.max(tl.max(tl.abs(a), axis=1), axis=0)
    exponent = tl.maximum(2045 - (largest.to(tl.int64, bitcast=True) >> 52), 1)
    a *= (exponent << 52).to(tl.float64, bitcast=True)
    tridiagonalise(a, diagonal, squares, n, N)
    tl.debug_barrier()  # what follows reads what other threads of this program wrote
    values = bisect(diagonal, squares, n, width, N) * ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    return tl.where(wrong, float("nan"), values)


# matrices (problems, n, n) and eigenvalues (problems, n) are contiguous; tridiagonal (problems, 2, n) float64 is
# scratch. N >= n is a power of two. Reads the lower triangle.
@triton.jit
def eigvalsh_kernel(matrices, eigenvalues, tridiagonal, n, width, N: tl.constexpr):  # type: ignore[no-untyped-def]
    problem = tl.program_id(0).to(tl.int64)
    diagonal = tridiagonal + problem * 2 * n
    values = solve(load_sorted(matrices + problem * n * n, n, N), diagonal, diagonal + n, n, width, N)
    number = tl.arange(0, N)
    tl.store(eigenvalues + problem * n + number, values.to(eigenvalues.dtype.element_ty), mask=number < n)


def spectrum_eigvalsh(matrices: Tensor) -> Tensor:
    """Eigenvalues (..., n), ascending, of matrices (..., n, n)."""
    n = matrices.shape[-1]
    eigenvalues = matrices.new_empty(matrices.shape[:-1])
    problems = eigenvalues.numel() // n
    if problems == 0:
        return eigenvalues
    size = max(16, triton.next_power_of_2(n))
    if size not in WARPS:
        raise BackendError(f"spectrum_eigvalsh: backend 'triton' was asked for: it takes N up to {max(WARPS)}, got {n}")
    eigvalsh_kernel[(problems,)](
        matrices.contiguous(), eigenvalues, matrices.new_empty((problems, 2, n), dtype=torch.float64), n,
        WIDTH_FLOAT32 if matrices.dtype == torch.float32 else WIDTH_FLOAT64,
        N=size, num_warps=WARPS[size], num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return eigenvalues
