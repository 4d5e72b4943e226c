"""spectrum in Triton: eigenvalues and descriptors of the windows behind Gram matrices, a window (or, if layers are
joined, all windows of a sequence) to a program, in registers and float64.

As csrc/include/rmtkernels/spectrum.cuh and spectrum.h do it, and with their names: the Gram matrices are scaled, summed
and centred, their eigenvalues are found (spectrum.py), and the descriptors are made of them and of the table of laws.

Status: interpreted and compiled, never run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmtkernels.errors import BackendError, ShapeError
from rmtkernels.ops.law_table import law_table_size
from rmtkernels.ops.spectrum import check_buffers
from rmtkernels.triton.spectrum import WARPS, WIDTH_FLOAT32, diagonal_order, solve

# Of csrc/include/rmtkernels/spectrum.h, where they are explained: resolution, descriptors, table of laws.
RESOLUTION = tl.constexpr(2.0**-20)
SMALLEST_TRACE = tl.constexpr(1.1754943508222875e-38)
DESCRIPTORS = tl.constexpr(24)
TRACY_WIDOM_POINTS = tl.constexpr(338)
TRACY_WIDOM_START, TRACY_WIDOM_STEP = tl.constexpr(-9.0), tl.constexpr(0.0625)
LOG_FOUR_ROOT_PI = tl.constexpr(1.9586593040445907)
BINS, BIN_START, BIN_STEP = tl.constexpr(64), tl.constexpr(-4.0), tl.constexpr(0.25)
LAW_BINS, LAW_CELLS = tl.constexpr(3), tl.constexpr(67)
JOINT_TRACE = tl.constexpr(2)
NOISE_TRACE = tl.constexpr(1)


@triton.jit
def log1p(x):  # type: ignore[no-untyped-def]
    """ln(1 + x) for x >= 0, also where 1 + x rounds (Kahan)."""
    rounded = (1.0 + x) - 1.0
    lost = rounded == 0.0
    return tl.where(lost, x, tl.log(1.0 + rounded) * (x / tl.where(lost, 1.0, rounded)))


@triton.jit
def tracy_widom_log_survival(table, s):  # type: ignore[no-untyped-def]
    """Cubic interpolation in the table, the asymptotic series right of it."""
    position = (s - TRACY_WIDOM_START) / TRACY_WIDOM_STEP
    at = tl.minimum(tl.maximum(position, 1.0), TRACY_WIDOM_POINTS - 2.0)
    i = tl.minimum(at.to(tl.int32), TRACY_WIDOM_POINTS - 3)
    b = at - i
    a, c, d = b + 1.0, b - 1.0, b - 2.0  # Lagrange on the points -1, 0, 1, 2
    y = table + i
    cubic = -tl.load(y - 1) * b * c * d / 6.0 + tl.load(y) * a * c * d / 2.0
    cubic += -tl.load(y + 1) * a * b * d / 2.0 + tl.load(y + 2) * a * b * c / 6.0
    right = tl.maximum(s, 1.0)
    z = 1.0 / (right * tl.sqrt(right))
    series = ((8064605.0 / 4096.0 * z - 113967593.0 / 491520.0) * z + 68061.0 / 2048.0) * z - 56617.0 / 9216.0
    series = ((series * z + 105.0 / 64.0) * z - 41.0 / 48.0) * z
    series += -2.0 / 3.0 / z + 0.5 * tl.log(z) - LOG_FOUR_ROOT_PI
    cubic = tl.where(position > 1.0, cubic, tl.load(table + 1))
    return tl.where(position >= TRACY_WIDOM_POINTS - 2.0, series, cubic)


@triton.jit
def sum_all(a):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(a, axis=1), axis=0)


@triton.jit
def diagonal_of(a, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, N)
    return tl.sum(tl.where(row[:, None] == row[None, :], a, 0.0), axis=0)


@triton.jit
def centred_trace(trace, total, rows, CENTER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a block with this trace and sum of entries. What centring leaves of equal rows counts as zero."""
    centred = trace
    least = trace * 0.0
    if CENTER:
        centred = trace - total / rows
        least = RESOLUTION * trace
    return tl.where(total - total != 0.0, float("nan"), tl.where(centred <= least, 0.0, centred))


@triton.jit
def log_trace(trace, dim):  # type: ignore[no-untyped-def]
    return tl.log(tl.where(trace / dim > SMALLEST_TRACE, trace / dim, SMALLEST_TRACE))


@triton.jit
def mean_share(trace, total, rows):  # type: ignore[no-untyped-def]
    energy = trace > 0.0
    share = total / tl.where(energy, rows * trace, 1.0)
    return tl.where(energy & (share > 0.0), tl.where(share < 1.0, share, 1.0), 0.0)


@triton.jit
def scaled_rows(gram, diagonal, dim):  # type: ignore[no-untyped-def]
    """The Gram matrix of the rows divided by their root mean squares. A zero row stays one."""
    zero = diagonal <= 0.0
    inverse = tl.where(zero, 0.0, tl.sqrt(dim / tl.where(zero, 1.0, diagonal)))
    return gram * (inverse[:, None] * inverse[None, :])


# Adds up the Gram matrices of `layers` layers, `layer_stride` apart, and centres the sum.
@triton.jit
def load_window(  # type: ignore[no-untyped-def]
    gram, layers, layer_stride, window, rows, dim,
    CENTER: tl.constexpr, JOINT: tl.constexpr, NORMALIZE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The matrix, symmetric to the bit and zero past the rows, ln of its trace, and its mean row's share of it."""
    row = tl.arange(0, N)
    i, j = tl.maximum(row[:, None], row[None, :]), tl.minimum(row[:, None], row[None, :])
    count = tl.maximum(rows, 1).to(tl.float64)
    zero = tl.cast(0.0, tl.float64)
    a = tl.zeros((N, N), tl.float64)
    logs, raw_traces, shares, traces, totals = zero, zero, zero, zero, zero
    for layer in range(layers):
        block = tl.load(gram + layer * layer_stride + i * window + j, mask=i < rows, other=0.0).to(tl.float64)
        diagonal = diagonal_of(block, N)
        trace, total = tl.sum(diagonal, axis=0), sum_all(block)
        energy = centred_trace(trace, total, count, CENTER)
        raw_traces += energy
        logs += log_trace(energy, dim)
        if NORMALIZE:
            block = scaled_rows(block, diagonal, dim)
            trace, total = tl.sum(diagonal_of(block, N), axis=0), sum_all(block)
            energy = centred_trace(trace, total, count, CENTER)
        traces += trace
        totals += total
        shares += mean_share(trace, total, count)
        if JOINT == JOINT_TRACE:
            block *= 1.0 / tl.where(energy == 0.0, 1.0, energy)
        a += tl.where(energy == 0.0, 0.0, block)
    if CENTER:
        mean = tl.sum(a, axis=0) / count
        shift = tl.sum(mean, axis=0) / count - (mean[:, None] + mean[None, :])
        a += tl.where(i < rows, shift, 0.0)
    if JOINT == JOINT_TRACE:
        return a, logs / layers, shares / layers
    return a, log_trace(raw_traces, dim * layers), mean_share(traces, totals, count)


@triton.jit
def overlap_without_newest(a, newest, rows, CENTER: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Overlap of the window's covariance with that of its rows but the newest, from the (centred) Gram matrix: less
    the mean of the others, a row is y_i + f y_new with f = 1 / (rows - 1), or f = 0 if not centred."""
    row = tl.arange(0, N)
    column = tl.sum(tl.where(row[:, None] == newest, a, 0.0), axis=0)
    corner = tl.sum(tl.where(row == newest, column, 0.0), axis=0)
    f = corner * 0.0
    if CENTER:
        f = 1.0 / tl.maximum(rows - 1, 1).to(tl.float64)
    inside = (row[:, None] < rows) & (row[None, :] < rows)
    others = inside & (row[:, None] != newest)
    mixed = a + f * column[None, :]
    without = mixed + f * (column[:, None] + f * corner)
    squares = sum_all(a * a)
    cross = sum_all(tl.where(others, mixed * mixed, 0.0))
    rest = sum_all(tl.where(others & (row[None, :] != newest), without * without, 0.0))
    some = (rows > 1) & (rest > RESOLUTION * RESOLUTION * squares)
    return tl.where(some, tl.minimum(cross / tl.sqrt(tl.where(some, squares * rest, 1.0)), 1.0), 0.0)


@triton.jit
def sort_by_diagonal(a, rows, N: tl.constexpr):  # type: ignore[no-untyped-def]
    order = diagonal_order(diagonal_of(a, N), rows, N)
    a = tl.gather(a, tl.broadcast_to(order[:, None], (N, N)), 0)
    return tl.gather(a, tl.broadcast_to(order[None, :], (N, N)), 1)


@triton.jit
def put(out, number, value):  # type: ignore[no-untyped-def]
    """The descriptors with one more in its place."""
    return tl.where(tl.arange(0, 32) == number, value, out)


# lambdas: eigenvalues of the window, descending, in memory; law: row of the table for n of them.
@triton.jit
def spectral_descriptors(  # type: ignore[no-untyped-def]
    lambdas, n, dim, laws, law, logarithm, share, overlap, NOISE: tl.constexpr, N: tl.constexpr
):
    """All descriptors, numbered as csrc/include/rmtkernels/spectrum.h has them. Where there is no energy the ratios are
    1, and all else is 0 but what the eigenvalues do not know."""
    i = tl.arange(0, N)
    inside = i < n
    here = tl.load(lambdas + i, mask=inside, other=0.0)
    trace = tl.sum(here, axis=0)
    energy = trace > 0.0
    divisor = tl.where(energy, trace, 1.0)
    size = tl.maximum(n, 1).to(tl.float64)
    rank = tl.minimum(size, dim)
    middle = rank.to(tl.int32)
    upper = tl.load(lambdas + (middle - 1) // 2, mask=n > 0, other=0.0)
    median = 0.5 * (upper + tl.load(lambdas + middle // 2, mask=n > 0, other=0.0))
    largest = tl.load(lambdas, mask=n > 0, other=0.0)
    floor = RESOLUTION * largest
    variance = trace / size if NOISE == NOISE_TRACE else median / tl.load(law)
    variance = tl.where(energy, tl.maximum(variance, floor), 1.0)

    p = here / divisor
    logs = tl.where(p > 0.0, tl.log(tl.where(p > 0.0, p, 1.0)), -1e3)  # zero: below every bin
    entropy = -tl.sum(tl.where(p > 0.0, p * logs, 0.0), axis=0)
    squares = tl.sum(p * p, axis=0)
    deviation = size * p - 1.0
    cubes = tl.sum(tl.where(inside, deviation * deviation * deviation, 0.0), axis=0)
    enrichment = tl.sum(tl.where(inside, (n - i) * p, 0.0), axis=0)

    # A value's mass is shared linearly between the two points of the histogram that it lies between.
    bins = tl.arange(0, BINS)
    position = (logs + tl.log(divisor / variance) - BIN_START) / BIN_STEP
    position = tl.minimum(tl.maximum(position, 0.0), BINS - 1.0)
    hats = tl.maximum(1.0 - tl.abs(position[:, None] - bins[None, :]), 0.0)
    mass = tl.sum(tl.where((i < middle)[:, None] & inside[:, None], hats, 0.0), axis=0) / rank
    full = mass > 0.0
    gain = tl.log(tl.where(full, mass, 1.0)) - tl.load(law + LAW_BINS + bins)
    divergence = tl.sum(tl.where(full, mass * gain, 0.0), axis=0)
    cells = tl.load(law + LAW_CELLS + i, mask=inside & (i < middle), other=0.0)
    distance = tl.sum(tl.where(i < middle, tl.abs(here / variance - cells), 0.0), axis=0) / rank
    root = 1.0 + tl.sqrt(size / dim)
    above = tl.sum((inside & (here > variance * root * root)).to(tl.int32), axis=0)
    scale = tl.load(law + 2)
    statistic = (dim * largest / variance - tl.load(law + 1)) / tl.where(n > 0, scale, 1.0)
    size_of = tl.abs(statistic)
    arsinh = log1p(size_of + size_of * size_of / (1.0 + tl.sqrt(1.0 + size_of * size_of)))
    spread = tl.maximum(size * squares - 1.0, 0.0)
    regular = spread + RESOLUTION * RESOLUTION

    leading = tl.arange(0, 32)
    out = tl.load(lambdas + leading, mask=(leading < 5) & (leading < n), other=0.0) / divisor
    out = put(out, 5, tl.sum(out, axis=0))
    earlier = tl.load(lambdas + leading - 6, mask=(leading >= 6) & (leading < 10) & (leading - 5 < n), other=1.0)
    later = tl.load(lambdas + leading - 5, mask=(leading >= 6) & (leading < 10) & (leading - 5 < n), other=1.0)
    ratios = tl.maximum(earlier, floor) / tl.where(energy, tl.maximum(later, floor), 1.0)
    ratio = (leading >= 6) & (leading < 10)
    out = tl.where(ratio, tl.where(leading - 5 < n, ratios, 1.0), out)
    out = put(out, 12, entropy)
    out = put(out, 13, 1.0 / tl.where(energy, squares, 1.0))
    out = put(out, 14, spread)
    out = put(out, 15, cubes / size / (regular * tl.sqrt(regular)))
    out = put(out, 16, tl.log(tl.where(energy, tl.maximum(median, floor) / divisor * size, 1.0)))
    out = put(out, 17, (2.0 * enrichment - (size + 1.0)) / size)
    out = put(out, 18, divergence)
    out = put(out, 19, log1p(distance))
    out = put(out, 20, tl.where(statistic < 0.0, -arsinh, arsinh))
    out = put(out, 21, tracy_widom_log_survival(laws, statistic))
    out = put(out, 22, overlap)
    out = put(out, 23, above.to(tl.float64))
    out = tl.where(energy, out, tl.where(ratio, 1.0, 0.0))
    out = put(out, 10, logarithm)
    return put(out, 11, share)


# gram (layers, batch, window, window) is contiguous; seen (batch,); laws as rmtkernels/ops/law_table.py makes them for
# rows of all joined layers. descriptors (spectra, batch, 24) and eigenvalues (spectra, batch, window) have rows side by
# side; tridiagonal (spectra * batch, 2, window) float64 is scratch. N >= window is a power of two.
@triton.jit
def descriptors_kernel(  # type: ignore[no-untyped-def]
    descriptors, eigenvalues, gram, seen, laws, tridiagonal, layers, batch, window, dim, width,
    descriptors_layer, descriptors_batch, eigenvalues_layer, eigenvalues_batch, seen_batch,
    CENTER: tl.constexpr, JOINT: tl.constexpr, NORMALIZE: tl.constexpr, NOISE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    layer, sequence = problem // batch, problem % batch
    accepted = tl.load(seen + sequence * seen_batch)
    rows = tl.minimum(tl.maximum(accepted, 0), window).to(tl.int32)
    n = rows
    if CENTER:
        n = tl.maximum(rows - 1, 0)
    row_width = tl.cast(dim, tl.float64)
    stride = tl.cast(batch, tl.int64) * window * window
    a, logarithm, share = load_window(
        gram + problem * window * window, layers, stride, window, rows, row_width, CENTER, JOINT, NORMALIZE, N
    )
    overlap = overlap_without_newest(a, (tl.maximum(accepted, 1) - 1) % window, rows, CENTER, N)
    row_width *= layers
    diagonal = tridiagonal + problem * 2 * window
    values = solve(sort_by_diagonal(a, rows, N), diagonal, diagonal + window, rows, width, N) / row_width
    wrong = tl.max((values != values).to(tl.int32), axis=0) > 0
    number = tl.arange(0, N)
    tl.debug_barrier()  # all threads have read the scratch
    values = tl.where(wrong | (values < 0.0), 0.0, values)
    tl.store(diagonal + rows - 1 - number, values, mask=number < rows)
    tl.debug_barrier()  # what follows reads what other threads of this program wrote
    found = tl.load(diagonal + number, mask=number < n, other=0.0)
    found = tl.where(wrong & (number < n), float("nan"), found).to(tl.float32)
    at = eigenvalues + layer * eigenvalues_layer + sequence * eigenvalues_batch
    tl.store(at + number, found, mask=number < window)
    law = laws + TRACY_WIDOM_POINTS + n * (LAW_CELLS + window)
    out = spectral_descriptors(diagonal, n, row_width, laws, law, logarithm, share, overlap, NOISE, N)
    out = tl.where(wrong, float("nan"), out).to(tl.float32)
    number = tl.arange(0, 32)
    at = descriptors + layer * descriptors_layer + sequence * descriptors_batch
    tl.store(at + number, out, mask=number < DESCRIPTORS)


def spectrum_descriptors_(
    descriptors: Tensor,
    eigenvalues: Tensor,
    gram: Tensor,
    seen: Tensor,
    laws: Tensor,
    dim: int,
    center: bool,
    joint: int,
    normalize: bool,
    noise: int,
) -> None:
    """Eigenvalues and descriptors into the caller's buffers; 16 bytes of scratch for each row of a window."""
    check_buffers(descriptors, eigenvalues, gram, seen, dim, joint != 0)
    _check_layout(descriptors, eigenvalues, gram, laws, joint, noise)
    layers, batch, window, _ = gram.shape
    size = max(16, triton.next_power_of_2(window))
    if size not in WARPS:
        raise BackendError(
            f"spectrum_descriptors_: backend 'triton' was asked for: it takes N up to {max(WARPS)}, got {window}"
        )
    problems = batch * (1 if joint else layers)
    if problems == 0:
        return
    descriptors_kernel[(problems,)](
        descriptors, eigenvalues, gram, seen, laws, gram.new_empty((problems, 2, window), dtype=torch.float64),
        layers if joint else 1, batch, window, dim, WIDTH_FLOAT32,
        *descriptors.stride()[:2], *eigenvalues.stride()[:2], seen.stride(0),
        CENTER=center, JOINT=joint, NORMALIZE=normalize, NOISE=noise, N=size,
        num_warps=WARPS[size], num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip


def _check_layout(descriptors: Tensor, eigenvalues: Tensor, gram: Tensor, laws: Tensor, joint: int, noise: int) -> None:
    """What only a caller of the bare operator, or of the out variant, can get wrong."""
    if not gram.is_contiguous():
        raise ShapeError(f"gram must be contiguous, got strides {gram.stride()}")
    if laws.dtype != torch.float64 or laws.shape != (law_table_size(gram.shape[-1]),) or not laws.is_contiguous():
        raise ShapeError(f"laws must be the float64 table of windows of {gram.shape[-1]}, got {tuple(laws.shape)}")
    if joint not in (0, 1, 2) or noise not in (0, 1):
        raise ShapeError(f"joint must be 0, 1 or 2, noise 0 or 1, got {joint} and {noise}")
    for out in (descriptors, eigenvalues):
        inner, outer = sorted((stride, size) for stride, size in zip(out.stride()[:2], out.shape[:2], strict=True))
        if (inner[1] > 1 and inner[0] < out.shape[2]) or (outer[1] > 1 and outer[0] < inner[0] * inner[1]):
            raise ShapeError(f"rows of an output must not share memory, got {tuple(out.shape)}, strides {out.stride()}")
