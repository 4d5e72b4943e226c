"""One picture per slice, for docs/kernels/: what lies where in memory, and who works on it."""

from pathlib import Path

from tools.pictures.drawing import BLUE, FOLDER, GREEN, GREY, ORANGE, RED, canvas

WHITE = "#ffffff"


def sliding_window(folder: Path = FOLDER) -> None:
    """A token replaces one slot of the ring, and one row and column of the Gram matrix."""
    slots, slot, in_use = 8, 2, 8
    with canvas("kernel-sliding_window", 84, 30, folder) as c:
        c.text(14, 2, "new row  (D)")
        c.box(2, 4, 24, 2, "one token, one layer", RED)
        c.text(14, 10, "ring  (N, D)")
        for j in range(slots):
            c.box(2, 12 + 2 * j, 24, 2, "slot s: written" if j == slot else f"slot {j}", RED if j == slot else BLUE)
        c.arrow((27, 5), (31, 5))
        c.box(31, 3, 20, 4, "is |row|² finite\nin every layer?", ORANGE)
        c.arrow((41, 7), (41, 11.6))
        for j in range(in_use):
            y = 13 + 2 * j
            c.arrow((26, y), (33, y))
            c.box(33, 12 + 2 * j, 16, 2, f"<row, slot {j}>", GREEN)
            c.arrow((49, y), (56, y))
        c.text(41, 29, "a warp per slot")
        c.text(65, 10, "Gram matrix  (N, N)")
        c.cells(57, 12, slots, slots, lambda i, j: RED if slot in (i, j) else BLUE, size=2)
        c.text(65, 29.2, "row and column s are new, the rest stays")


def spectrum(folder: Path = FOLDER) -> None:
    """Dense to tridiagonal to eigenvalues, one matrix per block; on the CPU four matrices to a vector."""
    size = 8
    with canvas("kernel-spectrum", 88, 34, folder) as c:
        c.text(9, 2, "packed lower triangle")
        c.cells(2, 4, size, size, lambda i, j: BLUE if j <= i else None, size=1.75)
        c.text(2, 20.5, "x: a row per thread\ny: a quarter of its columns", align="left")
        c.arrow((18, 11), (27, 11))
        c.text(22.5, 9, "N − 2\nreflections")
        c.text(35, 2, "tridiagonal")
        c.cells(28, 4, size, size, lambda i, j: (GREEN if i == j else ORANGE) if abs(i - j) < 2 else None, size=1.75)
        c.arrow((44, 11), (52, 11))
        c.text(48, 9, "Sturm\ncounts")
        c.text(69, 2, "one eigenvalue, four threads")
        for step, (left, width) in enumerate(((53, 32), (65.8, 6.4), (67.08, 1.28))):
            y = 5 + 5 * step
            for part in range(5):
                c.box(left + part * width / 5, y, width / 5, 2.2, "", RED if part == 2 else WHITE)
        c.text(69, 19.2, "each pass counts at four points\nand keeps one fifth")
        c.text(2, 25, "on the CPU: QL instead of Sturm, and a tridiagonal matrix to a lane", align="left")
        for lane in range(8):
            c.box(2 + 8 * lane, 27, 8, 4, f"matrix {lane}", BLUE if lane < 4 else GREEN)
        c.text(67, 29, "two vectors of\nfour float64 lanes", align="left")


def covariance(folder: Path = FOLDER) -> None:
    """Centred rows in panels; a tile of the lower triangle stays in registers while rows pass."""
    size, row, column = 8, 5, 2
    with canvas("kernel-covariance", 84, 30, folder) as c:
        c.text(1, 2, "rows less their mean  (n, d)", align="left")
        for j in range(size):
            c.box(1 + 3 * j, 4, 3, 18, "", RED if j == row else ORANGE if j == column else BLUE)
        c.text(13, 24.5, "panels of columns, each packed\nrow behind row")
        c.arrow((26, 9), (33, 9))
        c.arrow((26, 12), (33, 12))
        c.text(42, 2, "registers")
        c.cells(36, 5, 4, 6, lambda i, j: GREEN, size=2)
        c.text(42, 18.5, "a tile of sums\n4 × 24 with AVX2,\n128 × 128 per block\non a GPU")
        c.arrow((49, 9), (57, 9))
        c.text(53, 7, "added\nat the end")
        c.text(67, 2, "scatter matrix  (d, d)")
        colours = {(row, column): GREEN}
        c.cells(58, 4, size, size, lambda i, j: colours.get((i, j), BLUE) if j <= i else GREY, size=2.25)
        c.text(67, 24.5, "only tiles of the lower triangle\nare computed")


def lanczos(folder: Path = FOLDER) -> None:
    """Eight vectors to a SIMD register; the new block against the basis, twice."""
    with canvas("kernel-lanczos", 88, 34, folder) as c:
        c.text(9, 2, "A  (d, d)")
        c.cells(2, 4, 8, 8, lambda i, j: RED if (i, j) == (3, 4) else ORANGE if i == 3 else BLUE, size=1.75)
        c.text(9, 20, "each entry is read once")
        c.arrow((16.5, 10.1), (25, 10.1))
        c.box(25, 9, 16, 2.2, "a a a a a a a a", RED)
        c.text(33, 7.4, "spread over 8 lanes")
        c.text(33, 13, "×")
        c.box(25, 14.5, 16, 2.2, "v₀ v₁ v₂ … v₇", GREEN)
        c.text(33, 20, "one entry of each\nof eight vectors")
        c.arrow((42, 13), (48, 13))
        c.box(48, 11, 14, 4, "A v₀ … A v₇", GREEN)
        c.arrow((62, 13), (67, 13))
        c.box(67, 4, 19, 3.4, "C = X Qᵀ", BLUE)
        c.box(67, 9, 19, 3.4, "X − C Q, and C again", BLUE)
        c.box(67, 14, 19, 3.4, "factor of X Xᵀ − C Cᵀ", ORANGE)
        c.box(67, 19, 19, 3.4, "orthonormal block", GREEN)
        for y in (7.4, 12.4, 17.4):
            c.arrow((76.5, y), (76.5, y + 1.6))
        c.text(76.5, 2, "reorthogonalised twice")
        c.arrow((67, 20.7), (33, 26), bend=-0.15)
        c.box(2, 25, 31, 5, "basis Q: one more block\nprojection T = Q A Qᵀ: one more band", BLUE)
        c.arrow((33, 28.5), (48, 28.5))
        c.box(48, 26, 38, 5, "Ritz values of T; when Q is full, the best\nRitz vectors stay (thick restart)", GREEN)


def lowrank_linear(folder: Path = FOLDER) -> None:
    """Two thin products; the k values between them never leave fast memory."""
    with canvas("kernel-lowrank_linear", 84, 28, folder) as c:
        c.text(8, 2, "x  (rows, d_in)")
        c.cells(2, 4, 2, 8, lambda i, j: RED, size=1.5)
        c.text(27, 2, "down  (k, d_in)")
        c.cells(21, 4, 3, 8, lambda i, j: ORANGE if i == 1 else BLUE, size=1.5)
        c.text(2, 12.5, "a team of threads per row of weights:\n16 bytes, used for all rows of x", align="left")
        c.arrow((15, 5.5), (20, 5.5))
        c.arrow((34, 6), (40, 6))
        c.text(44.5, 2, "x downᵀ  (rows, k)")
        c.cells(42, 4.5, 2, 3, lambda i, j: GREEN, size=1.5)
        c.text(44.5, 9.5, "float32,\nin the cache")
        c.arrow((48, 6), (54, 6))
        c.text(58.5, 2, "up  (d_out, k)")
        c.cells(56, 4, 8, 3, lambda i, j: ORANGE if i == 2 else BLUE, size=1.5)
        c.arrow((62, 6), (68, 6))
        c.text(76, 2, "y  (rows, d_out)")
        c.cells(70, 4.5, 2, 8, lambda i, j: GREEN, size=1.5)
        c.box(2, 21, 80, 4, "reads (d_in + d_out) k weights once, where the dense layer reads d_in d_out", GREY)


ALL = (sliding_window, spectrum, covariance, lanczos, lowrank_linear)


def draw(folder: Path = FOLDER) -> None:
    for picture in ALL:
        picture(folder)
