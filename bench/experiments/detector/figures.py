"""`python -m bench.experiments.detector.figures`: the pictures of docs/detector.md, from committed results alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.experiments.detector.baselines import LAYERS
from bench.experiments.detector.curves import FALSE_ALARMS, WINDOWS
from bench.experiments.detector.early import SEEN
from bench.experiments.detector.report import result_path
from bench.experiments.texts import ROOT
from bench.figure_style import COLOURS, STYLE

FOLDER = ROOT / "docs" / "figures"
CHANCE = {"color": "0.6", "linewidth": 0.8, "linestyle": ":"}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    FOLDER.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, (make, size, panels) in FIGURES.items():
            figure, axes = pyplot.subplots(1, panels, figsize=size, layout="constrained", sharey=True)
            make(axes)
            figure.savefig(path_of(name), metadata={"Date": None})
            pyplot.close(figure)


def path_of(name: str) -> Path:
    return FOLDER / f"detector-{name}.svg"


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result_path(name).read_text(encoding="utf-8"))
    return found


def roc(axes: Any) -> None:
    curves = sorted(result("curves")["roc"].items(), key=lambda item: -item[1]["auroc"][0])
    for (name, one), colour in zip(curves, COLOURS, strict=True):
        axes.plot(FALSE_ALARMS, one["hits"], color=colour, linewidth=1.2, label=f"{name} ({one['auroc'][0]:.3f})")
    axes.plot([0, 1], [0, 1], **CHANCE)
    axes.set(xlabel="right replies flagged (false positive rate)", ylabel="wrong replies found (true positive rate)")
    axes.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    axes.legend(title="AUROC in brackets", fontsize=7, title_fontsize=7, loc="lower right")


def tokens(axes: Any) -> None:
    for (name, one), colour in zip(result("dialogue")["early"].items(), COLOURS, strict=True):
        areas = [one["auroc after tokens"][str(seen)] for seen in SEEN]
        axes.plot(SEEN, areas, "o-", color=colour, markersize=3, linewidth=1.2, label=name)
    axes.axhline(0.5, **CHANCE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SEEN, [str(seen) for seen in SEEN])
    axes.set(xlabel="tokens of the reply seen", ylabel="AUROC")
    axes.legend(fontsize=7)


def windows(axes: Any) -> None:
    curves = result("curves")
    lines = [
        (f"{form}, {method}", [curves[f"window, {form}"][str(window)] for window in WINDOWS], key)
        for form in ("per layer", "joint")
        for method, key in (("GRU", "seeds"), ("logistic regression", "logistic regression"))
    ]
    for (name, points, key), colour, shift in zip(lines, COLOURS, (0.97, 0.99, 1.01, 1.03), strict=False):
        places = [window * shift for window in WINDOWS]
        if key == "seeds":
            middle = [sum(one[key]) / len(one[key]) for one in points]
            reach = [(min(one[key]), max(one[key])) for one in points]
        else:
            middle, reach = [one[key][0] for one in points], [tuple(one[key][1:]) for one in points]
        bars = [[m - low for m, (low, _) in zip(middle, reach, strict=True)]]
        bars.append([high - m for m, (_, high) in zip(middle, reach, strict=True)])
        axes.errorbar(places, middle, bars, fmt="o-", color=colour, markersize=3, linewidth=1.2, capsize=2, label=name)
    axes.axhline(0.5, **CHANCE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(WINDOWS, [str(window) for window in WINDOWS])
    axes.minorticks_off()
    axes.set(xlabel="window N (tokens)", ylabel="AUROC", ylim=(0.48, 0.8))
    axes.legend(fontsize=7, title="bars: three seeds (GRU), 95 % of bootstrap draws (regression)", title_fontsize=7)


def layers(axes: Any) -> None:
    curves = result("curves")["layer"]
    blocks = {layer: 0 if layer == "embedding" else int(layer.removeprefix("layer")) + 1 for layer in LAYERS}
    for name, colour in (("mean hidden state", COLOURS[0]), ("24 descriptors", COLOURS[1])):
        points = [(blocks[layer], curves[layer][name]) for layer in LAYERS if name in curves[layer]]
        places = [place for place, _ in points]
        axes.plot(places, [one[0] for _, one in points], "o-", color=colour, markersize=3, linewidth=1.2, label=name)
        low, high = ([one[end] for _, one in points] for end in (1, 2))
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0.5, **CHANCE)
    axes.set(xlabel="block whose output is watched (0: the embedding)", ylabel="AUROC", xticks=[*blocks.values()])
    title = "logistic regression on one layer;\nbands: 95 % of bootstrap draws"
    axes.legend(fontsize=7, title=title, title_fontsize=7)


def permuted(axes: Any) -> None:
    per_set(axes, "permuted", "AUROC lost when exchanged")


def left_out(axes: Any) -> None:
    per_set(axes, "left out", "AUROC lost when left out of training")


def per_set(axes: Any, kind: str, label: str) -> None:
    """One panel for each set, rows in the order of the first's GRU, most on top."""
    sets = result("importance")["sets"]
    first = next(iter(sets.values()))[kind]
    names = sorted(first, key=lambda name: first[name]["GRU"][0])
    for panel, (name, one) in zip(axes, sets.items(), strict=True):
        bars(panel, names, one[kind])
        areas = ", ".join(f"{method} {area:.3f}" for method, area in one["auroc"].items())
        panel.set_title(f"{name}\n(whole: {areas})", fontsize=7)
        panel.set_xlabel(label)
    axes[0].legend(fontsize=6, title="bars: 95 % of bootstrap draws", title_fontsize=6, loc="lower right")


def bars(axes: Any, names: list[str], table: dict[str, dict[str, list[float]]]) -> None:
    for shift, method, colour in ((0.2, "GRU", COLOURS[0]), (-0.2, "logistic regression", COLOURS[1])):
        values = [table[name][method] for name in names]
        reach = [[max(v - low, 0) for v, low, _ in values], [max(high - v, 0) for v, _, high in values]]
        axes.barh(
            [place + shift for place in range(len(names))],
            [one[0] for one in values],
            0.38,
            xerr=reach,
            color=colour,
            error_kw={"linewidth": 0.7, "ecolor": "0.3"},
            label=method,
        )
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=7)


FIGURES: dict[str, tuple[Callable[[Any], None], tuple[float, float], int]] = {  # what draws, inches, panels
    "roc": (roc, (5.2, 4.8), 1),
    "tokens": (tokens, (5.2, 3.6), 1),
    "windows": (windows, (5.2, 3.6), 1),
    "layers": (layers, (5.2, 3.6), 1),
    "permuted": (permuted, (7.2, 5.6), 2),
    "left-out": (left_out, (7.2, 2.8), 2),
}


if __name__ == "__main__":
    main()
