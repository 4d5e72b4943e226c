"""Boxes, arrows and text on a canvas whose unit is one character of text, from the top down."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.slices import ROOT

FOLDER = ROOT / "docs" / "figures"
STYLE = {
    "font.size": 8.5,
    "svg.fonttype": "none",  # text stays text: it can be searched, and tests can read it
    "svg.hashsalt": "rmtkernels",  # so that the same picture gives the same file
}
# Okabe and Ito's, light enough to write on.
BLUE, GREEN, ORANGE, GREY, RED = "#cfe5f5", "#cdeadb", "#fbe3b8", "#ececec", "#f6cfc0"
LINE = {"edgecolor": "0.3", "linewidth": 0.8}


class Canvas:
    def __init__(self, axes: Any) -> None:
        self.axes = axes

    def box(
        self, x: float, y: float, width: float, height: float, text: str = "", colour: str = GREY, **options: Any
    ) -> None:
        """`options`: gid, the name of the box in the file; size of the text."""
        from matplotlib.patches import Rectangle

        size = options.pop("size", None)
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, **LINE, **options))
        self.text(x + width / 2, y + height / 2, text, size=size)

    def cells(self, x: float, y: float, rows: int, columns: int, colours: Any, **options: Any) -> None:
        """A grid of unit squares; colours(row, column) says which, None for no square. `options`: size of a square."""
        from matplotlib.patches import Rectangle

        size = options.get("size", 1.0)
        for i in range(rows):
            for j in range(columns):
                if colour := colours(i, j):
                    at = (x + j * size, y + i * size)
                    self.axes.add_patch(Rectangle(at, size, size, facecolor=colour, edgecolor="0.6", linewidth=0.4))

    def text(self, x: float, y: float, text: str, size: float | None = None, align: str = "center") -> None:
        self.axes.text(x, y, text, ha=align, va="center", size=size, linespacing=1.35)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], dashed: bool = False, **options: Any) -> None:
        """`options`: gid, and bend of the line."""
        from matplotlib.patches import FancyArrowPatch

        bend = options.pop("bend", 0.0)
        self.axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                mutation_scale=9,
                linewidth=0.9,
                color="0.25",
                linestyle="--" if dashed else "-",
                connectionstyle=f"arc3,rad={bend}",
                shrinkA=0,
                shrinkB=0,
                **options,
            )
        )


@contextmanager
def canvas(name: str, width: float, height: float, folder: Path = FOLDER) -> Iterator[Canvas]:
    """Writes <folder>/<name>.svg when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure = pyplot.figure(figsize=(width / 12, height / 12))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        yield Canvas(axes)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)
