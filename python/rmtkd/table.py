"""Tables of text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of cells in columns two spaces apart: the first `left` columns begin, the others end at one place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def count(number: int) -> str:
    """1234 as "1.23 k", 22700000 as "22.7 M"."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {unit}"
    return str(number)


def change(before: float, after: float) -> str:
    """By what share a number changed: "−58.8 %"."""
    if before == 0:
        return "0.0 %"
    share = round(100 * (after / before - 1), 1)
    return f"{'−' if share < 0 else '+' if share > 0 else ''}{abs(share):.1f} %"
