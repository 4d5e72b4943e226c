"""`python -m bench.gpu FILE [--device cpu]`: verifies and times every slice on a GPU, and writes what came out.

An operator without a kernel on the device is named as not run. On the CPU shapes are tiny and times mean nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_cases import GpuCase, cases
from bench.gpu_timer import captured, interleave_cold
from bench.work import Work
from rmtkernels import dispatch

SECONDS_PER_CASE = 0.4


def main() -> int:
    """Exit status 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    results: dict[str, Any] = {"cases": {}, "not run": {}, "wrong": {}}
    for work, operator, setup in cases(small=options.device == "cpu"):
        backends = dispatch.backends(operator)
        ours = [name for name in (options.device, "triton") if backends.get(name) == "available"]
        if not ours:
            results["not run"][work.name] = backends[options.device]
            continue
        try:
            results["cases"][work.name] = measure(work, setup(options.device), ours, options.device)
        except (AssertionError, RuntimeError) as error:
            results["wrong"][work.name] = f"{type(error).__name__}: {error}"
        print(work.name, results["cases"].get(work.name, results["wrong"].get(work.name)), flush=True)
    if options.device == "cuda":
        results |= {"copy bytes per second": copy_bandwidth(), "seconds of a tiny graph": tiny_graph()}
    options.file.write_text(json.dumps(results, indent=1) + "\n")
    return int(bool(results["wrong"]))


def measure(work: Work, case: GpuCase, backends: list[str], device: str) -> dict[str, Any]:
    """Seconds of ours, by each backend, and of the peers; the results of all are checked first."""
    calls = {"ours" if name == device else f"ours, {name}": with_backend(case.ours, name) for name in backends}
    calls |= case.peers
    for name, call in calls.items():
        case.verify(name, call)
    capturable = [name for name in calls if name not in case.waits and device == "cuda"]
    graphs = {name: graph for name in capturable if (graph := captured(calls[name]))}
    functions = {**calls, **graphs}
    once = sum(float(times[0]) for times in interleave_cold(functions, 1, device).values())
    times = interleave_cold(functions, int(np.clip(SECONDS_PER_CASE / once, 3, 50)), device)
    return {
        "bytes": work.bytes,
        "operations": work.operations,
        "seconds": {name: float(np.median(values)) for name, values in times.items()},
        "from 5 to 95 %": {name: np.percentile(values, [5, 95]).tolist() for name, values in times.items()},
        "in a graph": list(graphs),
    }


def with_backend(call: Callable[[], Any], backend: str) -> Callable[[], Any]:
    def inner() -> Any:
        with dispatch.use_backend(backend):
            return call()

    return inner


def copy_bandwidth() -> float:
    """Bytes per second, read and written together, of a copy between two buffers of a gigabyte."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    seconds = interleave_cold({"copy": lambda: target.copy_(source)}, 20, "cuda")["copy"]
    return 2 * source.numel() * 4 / float(np.median(seconds))


def tiny_graph() -> float:
    """What the events see of a graph that adds two numbers: the least that any time here can be."""
    number = torch.zeros(1, device="cuda")
    call = captured(lambda: number.add_(1))
    assert call is not None
    return float(np.median(interleave_cold({"tiny": call}, 50, "cuda")["tiny"]))


if __name__ == "__main__":
    sys.exit(main())
