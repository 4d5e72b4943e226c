"""Times a case that has been verified, and says what the figures depend on."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rmtkernels
from bench.case import Case
from bench.timer import Times, copy_of, gemm_of, interleave, median_interval, ratio

PERCENTILES = (5, 25, 50, 75, 95)
COPY, GEMM = "a copy of its bytes", "a GEMM at its peak"
# Where ours and the peers come from; what is not installed is left out
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "hessian-eigenthings", "transformers")


def measure(prepared: Case) -> dict[str, Any]:
    """Times one case, prints what came out and returns it. The machine's own limits are timed in the same rounds."""
    copy, copied = copy_of(prepared.footprint or prepared.bytes_read)
    gemm, operations = gemm_of(prepared.flops_dtype)
    limits = {COPY: copy, GEMM: gemm} if prepared.bytes_read or prepared.flops else {}
    times = interleave({"ours": prepared.ours, **prepared.peers, **limits}, prepared.rounds)
    seconds = {name: float(np.median(values)) for name, values in times.items() if name not in limits}
    result: dict[str, Any] = {
        "rounds": prepared.rounds,
        "seconds": seconds,
        "percentiles": {
            name: dict(zip(map(str, PERCENTILES), np.percentile(times[name], PERCENTILES).tolist(), strict=True))
            for name in seconds
        },
        "ratios": {peer: _ratio(times, peer) for peer in prepared.peers},
        "extra": prepared.extra(),
    }
    if limits:
        moved = prepared.bytes_read * float(np.median(times[COPY])) / copied
        computed = prepared.flops * float(np.median(times[GEMM])) / operations
        result["floor_seconds"] = max(moved, computed)
        result["floor"] = "memory" if moved >= computed else "arithmetic"
    result["targets"] = targets(prepared, times, result)
    _print(result)
    return result


def _ratio(times: Times, peer: str) -> dict[str, Any]:
    middle, low, high = ratio(times, peer)
    return {"median": middle, "low": low, "high": high, "confidence": median_interval(times[peer] / times["ours"])}


def targets(prepared: Case, times: Times, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with what was reached: ratios and the share of the floor at least, extra figures at most."""
    candidates = [name for name in prepared.peers if name.startswith("best of:")]
    lines = []

    def add(what: str, value: float, target: float, at_least: bool) -> None:
        met = value >= target if at_least else value <= target
        lines.append({"what": what, "value": value, "target": target, "at_least": at_least, "met": met})

    for peer, target in prepared.targets.items():
        chosen = min(candidates, key=lambda name: float(np.median(times[name]))) if peer == "best" else peer
        add(f"times faster than {chosen}", ratio(times, chosen)[0], target, at_least=True)
    if prepared.floor_share:
        share = result["floor_seconds"] / result["seconds"]["ours"]
        add("share of the floor reached", share, prepared.floor_share, at_least=True)
    for what, limit in prepared.limits.items():
        add(what, result["extra"][what], limit, at_least=False)
    return lines


def _print(result: dict[str, Any]) -> None:
    for name, seconds in result["seconds"].items():
        line = f"  {name:<44} {seconds * 1e6:10.1f} us"
        if name != "ours":
            line += "   {median:6.2f} x ours ({low:.2f} to {high:.2f})".format(**result["ratios"][name])
        print(line)
    if "floor_seconds" in result:
        floor, what = result["floor_seconds"], f"floor: {result['floor']}"
        print(f"  {what:<44} {floor * 1e6:10.1f} us   {floor / result['seconds']['ours']:.0%} reached")
    for what, value in result["extra"].items():
        print(f"  {what}: {value:.3g}")
    for line in result["targets"]:
        print(f"  {'met ' if line['met'] else 'MISS'} {line['what']}: {line['value']:.3g}, target {line['target']}")


def machine() -> dict[str, str]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    found = {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "instruction set": rmtkernels.cpu_isa(),
        "python": platform.python_version(),
        "mkl": str(torch.backends.mkl.is_available()),
        "descriptors": str(len(rmtkernels.DESCRIPTORS)),
        "commit": commit + (" with changes" if changed else ""),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
