"""What each kernel must move and compute at the shapes of an 8B language model and of RMT-KD: counted from the sizes,
each input read once and each output written once."""

from dataclasses import dataclass

LAYERS, WIDTH = 32, 4096  # of an 8B model; activations are bfloat16
WINDOWS, BATCHES = (32, 64), (1, 16, 64)
STEPS = (2048, 8192)  # of a whole sequence
SAMPLES, WIDTHS = 100_000, (1024, 2048, 4096, 8192)  # of RMT-KD
RANKS, ROWS = (256, 1024), (1, 16, 64)
VECTORS, PAIRS = 8, 64  # of a Lanczos block; eigenpairs asked for
DESCRIPTORS = 24
ITEM = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Work:
    """One call. `unit` is what computes: "float64", "float32" or "tensor" (bfloat16 tensor cores)."""

    name: str
    slice: str
    shape: str
    bytes: int
    operations: int
    unit: str
    launches: int
    sizes: tuple[int, ...]
    dtype: str = "bfloat16"


def push(batch: int, window: int) -> Work:
    """The new rows are read by both launches, once from memory; all ring rows but the new one's; a row and 2 N floats
    written."""
    streams = LAYERS * batch
    moved = streams * (WIDTH * 2 * (1 + (window - 1) + 1) + 2 * window * 4)
    return Work(
        f"sliding_window.push_b{batch}_n{window}", "sliding_window", f"{LAYERS} layers, batch {batch}, N = {window}",
        moved, 2 * streams * (window + 1) * WIDTH, "float32", 2, (batch, window),
    )  # fmt: skip


def gram(steps: int, window: int) -> Work:
    """The windows of one sequence at one layer, one for each row: rows read once, each inner product computed once,
    N² entries a window written."""
    moved = steps * (WIDTH * 2 + window * window * 4 + 8)
    return Work(
        f"sliding_window.gram_t{steps}_n{window}", "sliding_window", f"all windows of {steps} rows, N = {window}",
        moved, 2 * steps * window * WIDTH, "tensor", 5, (steps, window),
    )  # fmt: skip


def descriptors(batch: int, window: int) -> Work:
    """Householder reduction, and Sturm counts: 26 passes of four points per eigenvalue, four operations a row."""
    problems = LAYERS * batch
    operations = problems * (4 * window**3 // 3 + STURM_PASSES * 4 * window * window * 4)
    moved = problems * (window * window * 4 + (window + DESCRIPTORS) * 4)
    return Work(
        f"spectrum.descriptors_b{batch}_n{window}", "spectrum", f"{LAYERS} layers, batch {batch}, N = {window}",
        moved, operations, "float64", 1, (batch, window), "float32",
    )  # fmt: skip


# An interval shrinks fivefold a pass: 18 passes to 2^-40 of an eigenvalue as large as the largest, 35 for the smallest
# that are told from zero. What a window takes lies between; this is the middle.
STURM_PASSES = 26


def covariance(width: int, dtype: str) -> Work:
    """The lower triangle is read and written once."""
    moved = SAMPLES * width * ITEM[dtype] + 2 * (width * (width + 1) // 2) * 4
    return Work(
        f"covariance.update_{width}_{dtype}", "covariance", f"n = 10⁵, d = {width}, {dtype}", moved,
        SAMPLES * width * (width + 1), "tensor" if dtype == "bfloat16" else "float32", 1, (width,), dtype,
    )  # fmt: skip


def multiply(width: int) -> Work:
    """One product of a symmetric matrix with eight vectors."""
    return Work(
        f"lanczos.multiply_{width}", "lanczos", f"d = {width}, {VECTORS} vectors", 4 * (width**2 + 2 * VECTORS * width),
        2 * VECTORS * width**2, "float32", 1, (width,), "float32",
    )  # fmt: skip


def multiply_gram(width: int) -> Work:
    """XᵀX times eight vectors, in one pass over X."""
    return Work(
        f"lanczos.multiply_gram_{width}", "lanczos", f"n = 10⁵, d = {width}, {VECTORS} vectors",
        4 * (SAMPLES * width + 2 * VECTORS * width), 4 * VECTORS * SAMPLES * width, "float32", 1, (width,), "float32",
    )  # fmt: skip


def top(width: int) -> Work:
    """The 64 largest eigenpairs of a spiked covariance: sixteen products (CONTRIBUTING.md), nothing else counted."""
    products = 16
    return Work(
        f"lanczos.top{PAIRS}_{width}", "lanczos", f"d = {width}, {PAIRS} eigenpairs", products * 4 * width**2,
        products * 2 * VECTORS * width**2, "float32", products, (width,), "float32",
    )  # fmt: skip


def lowrank(rows: int, rank: int, dtype: str) -> Work:
    """Both factors once; d_in = d_out = 4096."""
    moved = ITEM[dtype] * (2 * rank * WIDTH + 2 * rows * WIDTH)
    return Work(
        f"lowrank_linear.rows{rows}_k{rank}_{dtype}", "lowrank_linear", f"{rows} rows, k = {rank}, {dtype}", moved,
        4 * rows * rank * WIDTH, "float32", 2, (rows, rank), dtype,
    )  # fmt: skip


def all_work() -> list[Work]:
    return [
        *(push(batch, window) for window in WINDOWS for batch in BATCHES),
        *(gram(steps, window) for window in WINDOWS for steps in STEPS),
        *(descriptors(batch, window) for window in WINDOWS for batch in BATCHES),
        *(covariance(width, dtype) for dtype in ("bfloat16", "float32") for width in WIDTHS),
        top(WIDTH),
        *(multiply(width) for width in WIDTHS),
        *(multiply_gram(width) for width in WIDTHS),
        *(lowrank(rows, rank, dtype) for dtype in ("bfloat16", "float32") for rank in RANKS for rows in ROWS),
    ]
