"""`python -m bench list | verify [CASE ...] | run [CASE ...] [--json FILE] | table FILE [--targets]`."""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bench.cases  # noqa: F401  (registers the cases)
import rmtkernels
from bench.case import REGISTRY, Case
from bench.table import markdown
from bench.timer import Times, copy_bandwidth, gemm_peak, interleave, ratio


def main() -> int:
    """Exit status 0 if every case was right and met its targets, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("action", choices=("list", "verify", "run", "table"))
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names, or beginnings of names (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results of a run")
    parser.add_argument("--targets", action="store_true", help="in a table, only the peers that have a target")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(markdown(json.loads(Path(arguments.cases[0]).read_text()), arguments.targets))
        return 0
    names = [n for n in REGISTRY if not arguments.cases or any(n.startswith(c) for c in arguments.cases)]
    if not names:
        parser.error(f"no case begins with any of {arguments.cases}; there is: {', '.join(REGISTRY)}")
    if arguments.action == "list":
        print("\n".join(names))
        return 0
    results = {}
    for name in names:
        threads, setup = REGISTRY[name]
        torch.set_num_threads(threads)
        prepared = setup()
        prepared.verify()
        print(f"{name} ({threads} thread{'s' * (threads > 1)}): results right", flush=True)
        if arguments.action == "run":
            results[name] = measure(prepared)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "cases": results}, indent=2) + "\n")
    return int(any(not line["met"] for result in results.values() for line in result["targets"]))


def measure(prepared: Case) -> dict[str, Any]:
    """Times one verified case and prints what came out."""
    times = interleave({"ours": prepared.ours, **prepared.peers}, prepared.rounds)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ratios = {peer: dict(zip(("median", "low", "high"), ratio(times, peer), strict=True)) for peer in prepared.peers}
    for name, seconds in medians.items():
        line = f"  {name:<44} {seconds * 1e6:10.1f} us"
        if name != "ours":
            line += "   {median:6.2f} x ours ({low:.2f} to {high:.2f})".format(**ratios[name])
        print(line)
    result: dict[str, Any] = {"seconds": medians, "ratios": ratios, "extra": prepared.extra()}
    if prepared.bytes_read:
        arithmetic = prepared.flops / gemm_peak(prepared.flops_dtype)
        floor = max(prepared.bytes_read / copy_bandwidth(prepared.bytes_read), arithmetic)
        result["floor_seconds"] = floor
        what = "floor: its bytes or operations at the peak"
        print(f"  {what:<44} {floor * 1e6:10.1f} us   {floor / medians['ours']:.0%} reached")
    for what, value in result["extra"].items():
        print(f"  {what}: {value:.3g}")
    result["targets"] = targets(prepared, times, result["extra"])
    for line in result["targets"]:
        print(f"  {'met ' if line['met'] else 'MISS'} {line['what']}: {line['value']:.3g}, target {line['target']}")
    return result


def targets(prepared: Case, times: Times, extra: dict[str, float]) -> list[dict[str, Any]]:
    """Each target with what was reached: ratios must be at least the target, extra figures at most."""
    candidates = [name for name in prepared.peers if name.startswith("best of:")]
    lines = []
    for peer, target in prepared.targets.items():
        chosen = min(candidates, key=lambda name: float(np.median(times[name]))) if peer == "best" else peer
        value = ratio(times, chosen)[0]
        lines.append({"what": f"times faster than {chosen}", "value": value, "target": target, "met": value >= target})
    for what, limit in prepared.limits.items():
        lines.append({"what": what, "value": extra[what], "target": limit, "met": extra[what] <= limit})
    return lines


def machine() -> dict[str, str]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": cpu,
        "instruction set": rmtkernels.cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": str(torch.backends.mkl.is_available()),
        "descriptors": str(len(rmtkernels.DESCRIPTORS)),
        "commit": commit,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


sys.exit(main())
