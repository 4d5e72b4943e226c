"""README's table, made from a committed result."""

from typing import Any


def markdown(results: dict[str, Any], targets_only: bool = False) -> str:
    """One row per case and peer: medians, the ratio with the interval of 90 % of its rounds, target, floor.

    With `targets_only`, only the peers that a target names.
    """
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['instruction set']} kernels, torch {machine['torch']}; a ratio is the median over "
        "rounds in turn, with the interval of 90 % of them; the floor is what its bytes or operations take at the copy "
        "bandwidth or GEMM peak of the same run, in float64 for eigenvalues and float32 for products.",
        "",
        "| case | ours | against | ratio | target | floor |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results["cases"].items():
        ours = result["seconds"]["ours"]
        floor = f"{time_of(result['floor_seconds'])}" if "floor_seconds" in result else ""
        goals = {line["what"].removeprefix("times faster than "): line for line in result["targets"]}
        for peer, ratio in result["ratios"].items():
            goal = goals.pop(peer, None)
            if targets_only and goal is None:
                continue
            target = f"≥ {goal['target']} {_met(goal)}" if goal else ""
            against = f"{peer.removeprefix('best of: ')} ({time_of(result['seconds'][peer])})"
            interval = f"{ratio['median']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})"
            lines.append(f"| `{name}` | {time_of(ours)} | {against} | {interval} | {target} | {floor} |")
        for what, goal in goals.items():
            sign = "≥" if goal.get("at_least") else "≤"
            lines.append(f"| `{name}` | {goal['value']:.2%} | {what} | | {sign} {goal['target']:.0%} {_met(goal)} | |")
    return "\n".join(lines)


def _met(goal: dict[str, Any]) -> str:
    return "met" if goal["met"] else "**missed**"


def time_of(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.2g} µs"
