"""The generated parts of docs/benchmarks.md, from the committed results of `python -m bench run` and `scale`."""

import json
import re
from pathlib import Path
from typing import Any

from bench.table import time_of

RESULTS = Path(__file__).with_name("results")
# In the order of the page. Each is what `python -m bench run PARTS --json FILE` wrote.
FILES = {
    "first-run.json": "eigentrack sliding_window spectrum",
    "operators.json": "covariance lanczos lowrank_linear",
    "rmtkd-speed.json": "rmtkd",
    "systems.json": "detector methods state",
}
SCALE = "scale.json"
NOT_YET = "Not measured yet: `{command}`."
BLOCK = "<!-- begin: {name} (python -m bench page --write docs/benchmarks.md) -->\n{body}\n<!-- end: {name} -->"


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every generated part made anew.

    Raises:
        KeyError: if a part is missing from the page.
    """
    for name, body in blocks(results).items():
        pattern = rf"<!-- begin: {re.escape(name)} \(.*?<!-- end: {re.escape(name)} -->"
        if not re.search(pattern, page, re.DOTALL):
            raise KeyError(f"the page has no part called {name!r}")
        text = BLOCK.format(name=name, body=body).replace("\\", "\\\\")  # no escape of re.sub
        page = re.sub(pattern, text, page, flags=re.DOTALL)
    return page


def blocks(results: Path) -> dict[str, str]:
    """Name of a generated part -> its text. A result that is not there is said to be missing."""
    found = {"targets": targets_table(results)}
    for file, parts in FILES.items():
        command = f"python -m bench run {parts} --json bench/results/{file}"
        run = _read(results / file)
        found[file] = NOT_YET.format(command=command) if run is None else run_table(run, command)
    command = f"python -m bench scale --json bench/results/{SCALE}"
    scale = _read(results / SCALE)
    found["scaling"] = NOT_YET.format(command=command) if scale is None else scale_table(scale, command)
    return found


def targets_table(results: Path) -> str:
    """Every target of the committed results, with what was reached."""
    lines = ["| case | what | reached | target | |", "|---|---|---|---|---|"]
    for file in FILES:
        run = _read(results / file) or {"cases": {}}
        for name, case in run["cases"].items():
            for line in case["targets"]:
                ratio = line["what"].startswith("times faster")
                at_least = line.get("at_least", ratio)
                shown = [f"{line[key]:.3g} ×" if ratio else f"{line[key]:.3g}" for key in ("value", "target")]
                sign, met = "≥" if at_least else "≤", "met" if line["met"] else "**missed**"
                lines.append(f"| `{name}` | {line['what']} | {shown[0]} | {sign} {shown[1]} | {met} |")
    return "\n".join(lines)


def run_table(run: dict[str, Any], command: str) -> str:
    """A row per case and peer: medians with the middle half of the rounds, the floor with the share reached."""
    lines = [
        f"{_machine(run['machine'])} `{command}`",
        "",
        "| case | threads | ours | floor | reached | against | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in run["cases"].items():
        ours, floor = case["seconds"]["ours"], case.get("floor_seconds")
        limit = f"{time_of(floor)}{_of(case)}" if floor else "not counted"
        share = f"{floor / ours:.0%}" if floor else ""
        for peer, ratio in case["ratios"].items():
            against = f"{peer.removeprefix('best of: ')} ({_spread(case, peer)})"
            times = f"{ratio['median']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})"
            cells = [f"`{name}`", case.get("threads", ""), _spread(case, "ours"), limit, share, against, times]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    for name, why in run.get("wrong", {}).items():
        lines.append(f"| `{name}` | | **wrong** | | | {why} | |")
    return "\n".join(lines)


def _of(case: dict[str, Any]) -> str:
    return f", {case['floor']}" if "floor" in case else ""


def _spread(case: dict[str, Any], name: str) -> str:
    """The median, and where percentiles were kept, the middle half of the rounds."""
    middle = time_of(case["seconds"][name])
    if "percentiles" not in case:
        return middle
    found = case["percentiles"][name]
    return f"{middle}, {time_of(found['25'])} … {time_of(found['75'])}"


def scale_table(scale: dict[str, Any], command: str) -> str:
    lines = [
        f"{_machine(scale['machine'])} `{command}`",
        "",
        "| operator | against | from … to | seconds | exponent | theory | resident |",
        "|---|---|---|---|---|---|---|",
    ]
    for operator, sweeps in scale["scales"].items():
        for axis, sweep in sweeps.items():
            sizes, seconds, resident = sweep["sizes"], sweep["seconds"], sweep["bytes"]
            exponent = sweep["exponent"]
            error = exponent["standard error"]
            fitted = f"{exponent['fitted']:.2f}" + ("" if error is None else f" ± {error:.2f}")
            memory = f"{resident[0] / 2**20:.1f} … {resident[-1] / 2**20:.1f} MiB"
            times = f"{time_of(seconds[0])} … {time_of(seconds[-1])}"
            cells = [f"`{operator}`", axis, f"{sizes[0]} … {sizes[-1]}", times, fitted, exponent["theory"], memory]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _machine(machine: dict[str, str]) -> str:
    cores = f", {machine['cores']} cores" if "cores" in machine else ""
    return (
        f"{machine['cpu']}{cores}, {machine['instruction set']} kernels, torch {machine['torch']}, commit "
        f"{machine['commit'][:12]}{' with changes' * machine['commit'].endswith('changes')}."
    )


def _read(file: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return found
