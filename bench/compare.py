"""Two runs of the bench: what became slower or faster, and whether that is more than noise.

Seconds of two runs differ by what else the machine did and how fast it was. The ratios to a peer do not: the peer was
timed in the same rounds. So the change of a case is that of its ratio to the peer that was timed most precisely, and
that of its seconds only if it has no peer in common.
"""

from dataclasses import dataclass
from typing import Any

# Of the machine: where these differ, a peer may have changed instead of ours
SAME = ("cpu", "instruction set", "torch", "numpy", "scipy", "scikit-learn", "hessian-eigenthings", "transformers")


@dataclass(frozen=True)
class Change:
    """Time of ours, new over old, and limits that hold if both runs' 95 % limits do."""

    against: str
    middle: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "within noise"


def report(old: dict[str, Any], new: dict[str, Any], margin: float) -> tuple[str, bool]:
    """A line per case of both runs, and whether one is slower by more than `margin`, or wrong.

    A case counts as slower by more than the margin only if its whole interval is beyond it.
    """
    lines = [f"{what}: {was} -> {now}" for what, was, now in _differences(old["machine"], new["machine"])]
    regressed = False
    for name, before in old["cases"].items():
        if name in new["cases"]:
            found = change(before, new["cases"][name])
            worse = found.low > 1 + margin
            regressed |= worse
            verdict = "REGRESSION" if worse else found.verdict
            against = f"against {found.against}" if found.against else "in seconds"
            lines.append(
                f"{name:<48} {found.middle:5.2f} times as long ({found.low:.2f} to {found.high:.2f})  {verdict}"
                f"  ({against})"
            )
        elif name not in new.get("wrong", {}):
            lines.append(f"{name:<48} not in the new run")
    for name, why in new.get("wrong", {}).items():
        regressed = True
        lines.append(f"{name:<48} WRONG in the new run: {why}")
    lines += [f"{name:<48} not in the old run" for name in new["cases"] if name not in old["cases"]]
    return "\n".join(lines), regressed


def change(old: dict[str, Any], new: dict[str, Any]) -> Change:
    """Of one case."""
    changes = []
    for peer in old["ratios"].keys() & new["ratios"].keys():
        before, after = old["ratios"][peer], new["ratios"][peer]
        (low, high), (new_low, new_high) = _limits(before), _limits(after)
        changes.append(Change(peer, before["median"] / after["median"], low / new_high, high / new_low))
    if changes:
        return min(changes, key=lambda one: (one.high / one.low, one.against))
    was, now = old["seconds"]["ours"], new["seconds"]["ours"]
    low, high = _spread(old)
    new_low, new_high = _spread(new)
    return Change("", now / was, new_low / high, new_high / low)


def _limits(ratio: dict[str, Any]) -> tuple[float, float]:
    """Of the median. Results of version 0.1.0 have no confidence limits, but the wider range of 90 % of the rounds."""
    low, high = ratio.get("confidence", (ratio["low"], ratio["high"]))
    return low, high


def _spread(case: dict[str, Any]) -> tuple[float, float]:
    found = case["percentiles"]["ours"]
    return found["5"], found["95"]


def _differences(old: dict[str, str], new: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(what, old[what], new[what]) for what in SAME if what in old and what in new and old[what] != new[what]]
