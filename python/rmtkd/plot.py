"""A picture of a plan: each spectrum, and the Marchenko-Pastur law that tells its noise."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmtkd.plans import LayerPlan, Plan
from rmtkernels.laws import marchenko_pastur_cdf

_COLUMNS, _BINS = 3, 60
_SMALLEST = 1e-9  # of the largest eigenvalue: what lies below is zero up to rounding, and would stretch the axis


def plot_plan(plan: Plan, path: str | Path) -> Path:
    """Writes one histogram of eigenvalues per layer, on a logarithmic axis, to a .png, .pdf or .svg.

    Over it the law of pure noise of the chosen variance, in counts of the same bins. A solid line marks the edge, a
    dashed one the smallest eigenvalue that is kept. Where ranks are counted as spikes there is no variance, and the law
    is that of the configured quantile. Needs matplotlib.
    """
    draw_plan(plan).savefig(path, dpi=110)
    return Path(path)


def draw_plan(plan: Plan) -> Any:
    """The figure of `plot_plan`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(plan.layers))
    rows = math.ceil(len(plan.layers) / columns)
    figure = Figure(figsize=(4.6 * columns, 3 * rows))  # without pyplot, which would keep it for ever
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    method = "quantile" if plan.config.noise == "spikes" else plan.config.noise
    for panel, layer in zip(axes.flat, plan.layers, strict=False):
        _draw(panel, layer, method)
    for panel in axes.flat[len(plan.layers) :]:
        panel.axis("off")
    if axes[0, 0].has_data():
        axes[0, 0].legend(fontsize=7)
    figure.supxlabel("eigenvalue of the second moment")
    figure.supylabel("eigenvalues per bin")
    figure.tight_layout()
    return figure


def _draw(panel: Any, layer: LayerPlan, method: str) -> None:
    spectrum = np.asarray(layer.eigenvalues)
    panel.set_title(f"{layer.name[-40:]}: {layer.rank} of {layer.dim}".replace("$", r"\$"), fontsize=9)
    if not spectrum[0] > 0:
        return
    shown = spectrum[spectrum > _SMALLEST * spectrum[0]]
    bins = np.geomspace(0.9 * shown[-1], 1.1 * shown[0], _BINS)
    panel.hist(shown, bins, color="0.7", label="eigenvalues")
    variance, edge = layer.choice.sigma2[method], layer.choice.edges[method]
    if variance > 0:
        panel.stairs(
            law_counts(bins, variance, layer.choice.support, layer.choice.q),
            bins,
            color="tab:red",
            label=f"noise ({method})",
        )
        panel.axvline(edge, color="tab:red", linewidth=1, label="edge")
    kept = spectrum[layer.rank - 1]
    if kept >= bins[0]:
        panel.axvline(kept, color="tab:blue", linewidth=1, linestyle="--", label="smallest kept")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(bottom=0.5)


def law_counts(bins: NDArray[np.float64], variance: float, dim: int, q: float) -> NDArray[np.float64]:
    """How many of `dim` eigenvalues pure noise would have in each bin."""
    return dim * np.diff(np.asarray(marchenko_pastur_cdf(bins / variance, q)))
