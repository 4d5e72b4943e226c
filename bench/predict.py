"""Fills docs/performance.md: bytes and operations, the floor on three GPUs, what the machine code does, a predicted
time, and beside it what was measured: `python -m bench.predict [--write docs/performance.md]`."""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.work import LAYERS, STURM_PASSES, Work, all_work
from tools import machine_code
from tools.slices import ROOT, slices

RESULTS = ROOT / "bench/results"
BLOCK = "<!-- begin: {name} (python -m bench.predict --write docs/performance.md) -->\n{body}\n<!-- end: {name} -->"


@dataclass(frozen=True)
class Device:
    """Figures of a data sheet: bytes and operations per second, multiprocessors, clock while computing."""

    name: str
    architecture: str
    bandwidth: float
    operations: dict[str, float]
    multiprocessors: int
    clock: float


DEVICES = [
    Device("A100", "sm_80", 2.039e12, {"float64": 9.7e12, "float32": 19.5e12, "tensor": 312e12}, 108, 1.41e9),
    Device("H100", "sm_90", 3.35e12, {"float64": 34e12, "float32": 67e12, "tensor": 989e12}, 132, 1.98e9),
    Device("B200", "sm_100", 7.7e12, {"float64": 37e12, "float32": 75e12, "tensor": 2250e12}, 148, 1.965e9),
]
# What the prediction assumes beyond the floor: the share of the data sheet's bandwidth and peak that plain code
# reaches, a launch inside a CUDA graph, and cycles on the critical path of the reduction and of a Sturm count (chains
# of shared memory, shuffles, barriers, square roots and divisions in float64).
REACHED_BANDWIDTH, REACHED_PEAK, LAUNCH = 0.8, 0.6, 2e-6
CYCLES_PER_COLUMN, CYCLES_PER_ENTRY, CYCLES_PER_COUNT = 900, 15, 60


def floor(work: Work, device: Device) -> float:
    """Seconds below which no kernel goes."""
    return max(work.bytes / device.bandwidth, work.operations / device.operations[work.unit])


def predicted(work: Work, device: Device) -> float:
    """Seconds that we expect of our kernel."""
    busy = max(
        work.bytes / (REACHED_BANDWIDTH * device.bandwidth),
        work.operations / (REACHED_PEAK * device.operations[work.unit]),
    )
    return max(busy, chain(work, device)) + work.launches * LAUNCH


def chain(work: Work, device: Device) -> float:
    """Seconds of a window's critical path, times the blocks that wait for one another; 0 but for spectrum."""
    if work.slice != "spectrum":
        return 0.0
    batch, window = work.sizes
    cycles = CYCLES_PER_COLUMN * window + CYCLES_PER_ENTRY * window**2 / 2
    cycles += CYCLES_PER_COUNT * STURM_PASSES * window
    threads = 4 * 32 * math.ceil(window / 32)
    budget = machine_code.read_budget("spectrum")[device.architecture]["spectrum_descriptors_kernel"]
    share = budget["occupancy"][f"N = {window}"]
    blocks = int(share * machine_code.DEVICES[device.architecture][2] / threads)
    return math.ceil(LAYERS * batch / (blocks * device.multiprocessors)) * cycles / device.clock


def results() -> list[dict[str, Any]]:
    """Every committed result of gpu-check."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("gpu-*.json"))]


def measured() -> dict[str, dict[str, float]]:
    """GPU -> name of the work -> seconds."""
    return {
        result["device"]: {name: _ours(case)[1] for name, case in result["stages"]["bench"]["cases"].items()}
        for result in results()
    }


def _ours(case: dict[str, Any]) -> tuple[str, float]:
    """Our first backend that was timed, and its seconds: CUDA, and Triton where there is no CUDA kernel."""
    name = next(name for name in case["seconds"] if name.startswith("ours"))
    return name, case["seconds"][name]


def work_table(name: str) -> str:
    """Floors, prediction and measurement of one slice."""
    times_of = measured()
    heads = [f"floor {device.name}" for device in DEVICES] + [f"predicted {device.name}" for device in DEVICES]
    lines = _header(["shape", "bytes", "operations", *heads, *(f"measured: {gpu}" for gpu in times_of)])
    for work in all_work():
        if work.slice == name:
            cells = [work.shape, _short(work.bytes, "B"), f"{_short(work.operations, '')} {work.unit}"]
            cells += [_time(floor(work, device)) for device in DEVICES]
            cells += [_time(predicted(work, device)) for device in DEVICES]
            cells += [_time(times[work.name]) if work.name in times else "not yet" for times in times_of.values()]
            lines.append(_row(cells))
    return "\n".join(lines)


def code_table(name: str) -> str:
    """What the machine code of a slice's kernels does on the H100."""
    budget = machine_code.read_budget(name).get(machine_code.QUICK)
    if budget is None:
        return "No CUDA kernel yet."
    lines = _header(["kernel", "registers", "static shared", "16-byte loads", "tensor core", "atomics", "occupancy"])
    for kernel, facts in budget.items():
        occupancy = ", ".join(
            f"{share:.0%}" if label == "any" else f"{share:.0%} ({label})"
            for label, share in facts["occupancy"].items()
        )
        cells = [f"`{kernel}`", facts["registers"], facts["static_shared"], facts["loads_of_16_bytes"]]
        lines.append(_row([*cells, facts["tensor_core"], facts["atomics"], occupancy]))
    return "\n".join(lines)


def peer_table() -> str:
    """Ours, by each backend, beside every peer. A star marks a call that is timed without a graph."""
    lines = _header(["case", "GPU", "ours", "against", "times as long"])
    for result in results():
        for name, case in result["stages"]["bench"]["cases"].items():
            seconds, graphs = case["seconds"], case["in a graph"]
            shown = {call: _time(value) + ("" if call in graphs else " *") for call, value in seconds.items()}
            ours, mine = _ours(case)
            for call in [call for call in seconds if call != ours]:
                ratio = f"{seconds[call] / mine:.2f}"
                lines.append(_row([f"`{name}`", result["device"], shown[ours], f"{call} ({shown[call]})", ratio]))
    return "\n".join(lines)


def device_table() -> str:
    lines = _header(["", "memory", "float64", "float32", "bfloat16 tensor", "multiprocessors"])
    for d in DEVICES:
        rates = [f"{d.operations[unit] / 1e12:g} TFLOP/s" for unit in ("float64", "float32", "tensor")]
        lines.append(_row([d.name, f"{d.bandwidth / 1e12:g} TB/s", *rates, d.multiprocessors]))
    return "\n".join(lines)


def blocks() -> dict[str, str]:
    """Name of a generated part of the page -> its text."""
    found = {"devices": device_table(), "peers": peer_table()}
    for name in slices():
        found[f"{name}, work"] = work_table(name)
        found[f"{name}, machine code"] = code_table(name)
    return found


def filled(page: str) -> str:
    """The page with every generated part made anew.

    Raises:
        KeyError: if a part is missing from the page.
    """
    for name, body in blocks().items():
        pattern = rf"<!-- begin: {re.escape(name)} \(.*?<!-- end: {re.escape(name)} -->"
        if not re.search(pattern, page, re.DOTALL):
            raise KeyError(f"the page has no part called {name!r}")
        text = BLOCK.format(name=name, body=body).replace("\\", "\\\\")  # no escape of re.sub
        page = re.sub(pattern, text, page, flags=re.DOTALL)
    return page


def _header(names: Sequence[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _short(count: float, unit: str) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {prefix}{unit}"
    return f"{count} {unit}"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs" if seconds * 1e6 >= 1 else f"{seconds * 1e6:.2g} µs"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the page whose generated parts are made anew")
    options = parser.parse_args()
    if options.write is None:
        print("\n\n".join(f"{name}\n\n{body}" for name, body in blocks().items()))
    else:
        options.write.write_text(filled(options.write.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
