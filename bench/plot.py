"""Pictures of results: of a run, a row for each peer; of the scaling curves, time and memory against each size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.figure_style import COLOURS, STYLE

OURS, PEERS, TARGET = COLOURS[0], COLOURS[1], COLOURS[2]
AGAIN = {"color": "0.6", "linewidth": 0.8, "linestyle": ":"}
PANEL = (2.6, 2.3)  # inches


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """One file for each slice or operator; the same results give the same files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = []
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(results, pyplot):
            files.append(folder / f"{name}.svg")
            figure.savefig(files[-1], metadata={"Date": None})
            pyplot.close(figure)
    return files


def _figures(results: dict[str, Any], pyplot: Any) -> Iterator[tuple[str, Any]]:
    slices = dict.fromkeys(name.split(".")[0] for name in results.get("cases", {}))
    for part in slices:
        yield (
            f"bench-{part}",
            ratios({name: case for name, case in results["cases"].items() if name.split(".")[0] == part}, pyplot),
        )
    for operator, sweeps in results.get("scales", {}).items():
        yield f"scale-{operator.rstrip('_')}", curves(sweeps, pyplot)


def ratios(cases: dict[str, Any], pyplot: Any) -> Any:
    """How many times as long each peer takes, with 90 % of the rounds; the target, and what the floor would allow."""
    rows = [(name.partition(".")[2], peer, case) for name, case in cases.items() for peer in case["ratios"]]
    figure, axes = pyplot.subplots(figsize=(7.2, 0.7 + 0.24 * len(rows)), layout="constrained")
    for place, (_, peer, case) in enumerate(rows):
        found = case["ratios"][peer]
        spread = [[found["median"] - found["low"]], [found["high"] - found["median"]]]
        axes.errorbar(found["median"], place, xerr=spread, fmt="o", ms=4, lw=1, color=OURS)
        for target in (line for line in case["targets"] if line["what"] == f"times faster than {peer}"):
            axes.plot(target["target"], place, marker="|", ms=11, mew=1.5, color=PEERS)
        if "floor_seconds" in case:
            axes.plot(case["seconds"][peer] / case["floor_seconds"], place, marker="x", ms=4, color=TARGET)
    axes.axvline(1, **AGAIN)
    axes.set_xscale("log")
    labels = [f"{case}: {peer.removeprefix('best of: ')}" for case, peer, _ in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time over ours (bar: 90 % of rounds, |: target, ×: floor)", loc="right")
    return figure


def curves(sweeps: dict[str, Any], pyplot: Any) -> Any:
    """Time above, memory below; a column for each size. Dotted: the theoretical slope through the last point."""
    size = (PANEL[0] * len(sweeps), 2 * PANEL[1])
    figure, axes = pyplot.subplots(2, len(sweeps), figsize=size, layout="constrained", squeeze=False)
    for (axis, sweep), (time, memory) in zip(sweeps.items(), axes.T, strict=True):
        x, seconds = np.array(sweep["sizes"], float), np.array(sweep["seconds"])
        low, high = np.array(sweep["confidence"]).T
        exponent = sweep["exponent"]
        time.errorbar(x, seconds, yerr=[seconds - low, high - seconds], fmt="o-", ms=3, lw=1, color=OURS)
        time.plot(x, seconds[-1] * (x / x[-1]) ** exponent["theory"], **AGAIN)
        error = "" if exponent["standard error"] is None else f" ± {exponent['standard error']:.2f}"
        time.set_title(f"{exponent['fitted']:.2f}{error}, theory {exponent['theory']:g}", fontsize=8)
        counts = np.maximum(sweep["bytes"], 4096) / 2**20
        memory.plot(x, counts, "o-", ms=3, lw=1, color=PEERS)
        memory.plot(x, counts[-1] * (x / x[-1]) ** exponent["memory"], **AGAIN)
        for panel in (time, memory):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            bottom, top = panel.get_ylim()
            panel.set_ylim(bottom / 2, top * 2)  # what is flat looks flat
            panel.set_xticks(x, [f"{int(value)}" for value in x])
            panel.minorticks_off()
        memory.set_xlabel(axis)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("MiB resident")
    return figure
