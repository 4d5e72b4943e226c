"""`python -m bench.experiments.rmtkd_tables [--write FILE]`: tables from the committed results of RMT-KD's experiments.

With `--write` tables replace what stands between their two comments in a Markdown file, those that have any:
`<!-- begin: NAME (bench/results/rmtkd-NAME.json) -->` and `<!-- end: NAME -->`.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.experiments import texts
from bench.experiments.results import write_whole
from bench.experiments.rmtkd_statistics import over_seeds, paired
from bench.table import markdown

RESULTS = texts.ROOT / "bench" / "results"
Unit = dict[str, Any]
RULES = ("median", "trace", "fit", "spikes")


def classification(report: dict[str, Any]) -> str:
    """A row per method: size, accuracy before and after distillation, differences paired by seed and by sentence."""
    by_method = _by(report["units"], "method")
    dense = by_method["dense"]
    lines = [_head("before distillation", "accuracy", "against dense", "over test rows", "against dense, distilled")]
    for method, units in by_method.items():
        cells = [
            method,
            _size(units, dense),
            _percent(units, "accuracy before distillation"),
            _percent(units, "accuracy"),
            *_against(units, dense),
            _against(units, by_method.get("dense, distilled", []))[0],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _seeds(report["units"])])


def curve(report: dict[str, Any]) -> str:
    """A row per quantile and method."""
    units = report["units"]
    by_key = _by(units, "quantile", "method")
    dense, distilled = by_key[(0, "dense")], by_key.get((0, "dense, distilled"), [])
    columns = "before distillation", "accuracy", "against dense, distilled", "over test rows"
    lines = [_head(*columns, first=("quantile", "method", "widths (seed 0)", "parameters"))]
    for (quantile, method), found in by_key.items():
        shape = "/".join(map(str, found[0]["figures"].get("shape", [])))
        cells = [
            str(quantile or ""),
            method,
            shape,
            _size(found, dense),
            _percent(found, "accuracy before distillation"),
            _percent(found, "accuracy"),
            *_against(found, distilled),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _seeds(units)])


def staged(report: dict[str, Any]) -> str:
    """A row per way, and what each stage left: parameters and accuracy, mean over seeds."""
    lines = ["| way | after each stage | parameters | accuracy |", "|---|---|---|---|"]
    for way, units in _by(report["units"], "method").items():
        stages = zip(*(unit["figures"]["stages"] for unit in units), strict=True)
        steps = [
            f"{100 * (float(np.mean([stage['kept'] for stage in found])) - 1):+.0f} %: "
            f"{100 * float(np.mean([stage['score'] for stage in found])):.1f}"
            for found in stages
        ]
        kept = 100 * (float(np.mean([unit["figures"]["kept"] for unit in units])) - 1)
        lines.append(f"| {way} | {', '.join(steps)} | {kept:+.1f} % | {_percent(units, 'accuracy')} |")
    return "\n".join([*lines, "", _seeds(report["units"])])


def language(report: dict[str, Any]) -> str:
    """Perplexity at equal parameters; the interval is of the ratio to dense, over windows."""
    by_key = _by(report["units"], "method", "share")
    dense = by_key[("dense", 1.0)][0]["figures"]
    lines = ["| method | parameters | quantile | perplexity | × dense (95 % over windows) |", "|---|---|---|---|---|"]
    for (method, _), (unit, *_) in by_key.items():
        figures = unit["figures"]
        gap = np.subtract(figures["nats per token"], dense["nats per token"])
        mean, half = over_seeds(gap.tolist())
        ratio = f"{np.exp(mean):.2f} ({np.exp(mean - half):.2f} … {np.exp(mean + half):.2f})" if half > 0 else ""
        size = _size([unit], by_key[("dense", 1.0)])
        lines.append(f"| {method} | {size} | {figures.get('quantile', '')} | {figures['perplexity']:.2f} | {ratio} |")
    return "\n".join(lines)


def quantile(report: dict[str, Any]) -> str:
    """A row per kind of group: the median share of directions that every rule keeps."""
    lines: list[str] = []
    for unit in report["units"]:
        kinds: dict[str, list[Unit]] = {}
        for name, found in unit["figures"]["groups"].items():
            kinds.setdefault(name.rpartition(".")[2], []).append(found)
        quantiles = list(next(iter(kinds.values()))[0]["above the edge"])
        head = [
            f"{unit['key']['model']}, groups",
            "d",
            "λ₊/σ²",
            *(f"τ={q}" for q in quantiles),
            "0.45, no edge",
            *RULES,
        ]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, groups in kinds.items():
            spikes = [found["spikes"] for found in groups if found["spikes"] is not None]
            shares = [
                *([found["above the edge"][q] for found in groups] for q in quantiles),
                [found["above the quantile itself"]["0.45"] for found in groups],
                *([found["other estimators"][rule] for found in groups] for rule in RULES[:-1]),
            ]
            edge = np.median([found["edge / noise variance"] for found in groups])
            cells = [f"{name} ({len(groups)})", str(groups[0]["d"]), f"{edge:.2f}"]
            cells += [f"{np.median(share):.0%}" for share in shares]
            lines.append(f"| {' | '.join([*cells, f'{np.median(spikes):.1%}' if spikes else ''])} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def parts(report: dict[str, Any]) -> str:
    """A row per part that was narrowed, a column per task."""
    by_key = _by(report["units"], "part", "task")
    tasks = list(dict.fromkeys(unit["key"]["task"] for unit in report["units"]))
    lines = [f"| narrowed | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for part in dict.fromkeys(unit["key"]["part"] for unit in report["units"]):
        lines.append(f"| {' | '.join([part, *(_percent(by_key[part, task], 'accuracy') for task in tasks)])} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    **{
        f"{task}-{setting}": classification
        for task in ("sst2", "qnli", "ag_news")
        for setting in ("fine-tuned", "scratch")
    },
    "sst2-three-epochs": classification,
    **{f"{task}-cpu": classification for task in ("sst2-scratch", "ag_news", "qnli")},
    "staged": staged,
    "parts": parts,
    "resnet": curve,
    "resnet56": curve,
    "language": language,
    "quantile": quantile,
    "speed": markdown,
}


def _by(units: list[Unit], *names: str) -> dict[Any, list[Unit]]:
    """Units in the order they were made, each list sorted by seed."""
    found: dict[Any, list[Unit]] = {}
    for unit in units:
        key = tuple(unit["key"][name] for name in names)
        found.setdefault(key[0] if len(key) == 1 else key, []).append(unit)
    return {key: sorted(group, key=lambda unit: unit["key"].get("seed", 0)) for key, group in found.items()}


def _head(*columns: str, first: tuple[str, ...] = ("method", "parameters")) -> str:
    cells = (*first, *columns)
    return f"| {' | '.join(cells)} |\n{'|---' * len(cells)}|"


def _size(units: list[Unit], dense: list[Unit]) -> str:
    count = float(np.mean([unit["figures"]["parameters"] for unit in units]))
    whole = float(np.mean([unit["figures"]["parameters"] for unit in dense]))
    shown = f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"
    return shown if count == whole else f"{shown} ({count / whole - 1:+.1%})"


def _percent(units: list[Unit], figure: str) -> str:
    values = [100 * unit["figures"][figure] for unit in units if figure in unit["figures"]]
    if not values:
        return ""
    mean, half = over_seeds(values)
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


def _against(ours: list[Unit], theirs: list[Unit]) -> tuple[str, str]:
    """(points with the interval over seeds, interval over items) on the seeds both have."""
    pairs = [
        (one["figures"]["correct"], other["figures"]["correct"])
        for one in ours
        for other in theirs
        if one["key"]["seed"] == other["key"]["seed"] and one is not other
    ]
    if not pairs:
        return "", ""
    tables = [np.array([[int(hit) for hit in side] for side in sides]) for sides in zip(*pairs, strict=True)]
    found = paired(*tables)
    seeds = "" if np.isnan(found.seeds) else f" ± {100 * found.seeds:.1f}"
    return f"{100 * found.mean:+.1f}{seeds}", f"{100 * found.low:+.1f} … {100 * found.high:+.1f}"


def _seeds(units: list[Unit]) -> str:
    count = len({unit["key"]["seed"] for unit in units})
    seeds = f"{count} seeds; ± is the 95 % t-interval over seeds" if count > 1 else "one seed"
    return f"{seeds[0].upper()}{seeds[1:]}; the range over test rows is 95 % of a bootstrap of the paired difference."


def written(text: str, name: str, table: str) -> str:
    """The text with the table between its two comments. Raises ValueError if they are not there, once each."""
    pattern = re.compile(rf"(<!-- begin: {re.escape(name)}\b[^>]*-->\n).*?(<!-- end: {re.escape(name)} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"there must be one pair of comments 'begin: {name}' and 'end: {name}'")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown whose tables are replaced")
    arguments = parser.parse_args()
    text = arguments.write.read_text(encoding="utf-8") if arguments.write else ""
    for name, make in TABLES.items():
        file = RESULTS / f"rmtkd-{name}.json"
        if not file.is_file() or (arguments.write and f"<!-- begin: {name} " not in text):
            continue
        table = make(json.loads(file.read_text(encoding="utf-8")))
        if arguments.write:
            text = written(text, name, table)
        else:
            print(f"{name}\n\n{table}\n")
    if arguments.write:
        write_whole(arguments.write, text)


if __name__ == "__main__":
    main()
