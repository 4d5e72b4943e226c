"""Everything that waits for a GPU, in one go: `python -m tools.gpu_check [--output FILE]`.

Builds for the GPU that is there, runs every test marked gpu, calls every operator under compute-sanitizer's four tools,
and times all slices beside their peers; one JSON takes it all, by default bench/results/gpu-<device>.json. It needs
neither network nor a virtual environment, but what a build and the tests need, and takes less than eight minutes.

Where there is no GPU, or with --dry, every stage does what a CPU can: tests are collected, operators called and benches
run on the CPU at tiny shapes; what was not done is said, and nothing is written unless --output names a file.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tools import slices
from tools.slices import ROOT
from tools.versions import versions

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
FOUND = "ended with 9"  # what run() says of such an exit
SECONDS = 240  # a stage may take
Stage = dict[str, Any]


class StageError(Exception):
    """A program failed; the end of what it printed."""


def run(command: list[str], **variables: str) -> str:
    """What the command printed; StageError if it fails or does not end."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"} | variables
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, check=False, timeout=SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise StageError(f"{shown(command)} took more than {SECONDS} s") from error
    if done.returncode != 0:
        raise StageError(f"{shown(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def shown(command: list[str]) -> str:
    """The command without a folder of this machine."""
    return " ".join([Path(command[0]).name, *command[1:]])


def build(device: str) -> Stage:
    """In place, for the architecture of this GPU alone."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if device == "cpu":
        return {"status": "not run", "why": "no GPU: the package is taken as it was built", "command": shown(command)}
    major, minor = torch.cuda.get_device_capability()
    run(command, RMTKERNELS_CUDA="on", TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")
    return {"status": "passed", "architecture": f"{major}.{minor}"}


def tests(device: str) -> Stage:
    """All tests marked gpu, wherever they are."""
    files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").rglob("test_*.py")) if _waits(file)]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files]
    if device == "cpu":
        count = len(re.findall(r"^tests/\S+::", run([*command, "--collect-only"]), re.MULTILINE))
        if count == 0:
            raise StageError("no test is marked gpu")
        return {"status": "not run", "why": "no GPU", "collected": count, "files": files}
    if find_spec("xdist"):
        command.append("--numprocesses=8")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        try:
            run([*command, f"--junitxml={report}", "-o", "junit_family=xunit1"])
        except StageError as error:
            if not report.exists():
                raise
            return {"status": "failed", "why": str(error), **count_tests(report)}
        return {"status": "passed", **count_tests(report)}


def count_tests(report: Path) -> Stage:
    """Slice -> backend -> how many tests passed, failed and were skipped; names of those that failed."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    failed = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        test = f"{case.get('file')}::{case.get('name')}"
        result = "skipped" if case.find("skipped") is not None else "passed"
        if case.find("failure") is not None or case.find("error") is not None:
            result = "failed"
            failed.append(test)
        backend = "triton" if "triton" in test else "cuda"
        for name in owners(test):
            of_backend = counts.setdefault(name, {}).setdefault(backend, {"passed": 0, "failed": 0, "skipped": 0})
            of_backend[result] += 1
    return {"counts": counts, "failed": failed}


def owners(test: str) -> list[str]:
    """Slices that a test is about, by its name; "shared" if it names none."""
    found = [name for name in slices.slices() if any(word in test for word in (name, *slices.operators(name)))]
    return found or ["shared"]


def sanitizers(device: str) -> Stage:
    """The four tools at a time, each over one call of every operator, with an allocation for each tensor. A tool that
    does not find the bug planted for it has failed."""
    call = [sys.executable, "-m", "tools.gpu_calls", "--device", device]
    commands = {tool: [*SANITIZER, tool, *call] for tool in SANITIZERS}
    if device == "cpu":
        called = json.loads(run(call).splitlines()[-1])
        if shutil.which("nvcc"):
            with tempfile.TemporaryDirectory() as folder:
                planted_bugs(folder, "sm_90")
        return {"status": "not run", "why": "no GPU", "calls on the CPU": called, "tools": list(commands)}
    if shutil.which("compute-sanitizer") is None:
        raise StageError("compute-sanitizer is not on PATH")
    results: dict[str, Stage] = {}
    for tool, outcome in _together(commands).items():
        if isinstance(outcome, StageError):
            results[tool] = {"status": "failed", "why": str(outcome)}
        else:
            results[tool] = {"status": "passed", **json.loads(next(x for x in outcome.splitlines() if x[:1] == "{"))}
    for tool in missed_bugs():
        results[tool] = {"status": "failed", "why": "the bug planted for it was not found", "called": {}}
    passed = all(result["status"] == "passed" for result in results.values())
    return {"status": "passed" if passed else "failed", "tools": results}


def planted_bugs(folder: str, architecture: str) -> str:
    """The program with a bug for each tool, compiled."""
    program = f"{folder}/planted_bugs"
    run(["nvcc", "-std=c++17", f"-arch={architecture}", "-o", program, "tests/gpu/planted_bugs.cu"])
    return program


def missed_bugs() -> list[str]:
    """Tools that say nothing of the bug planted for them."""
    with tempfile.TemporaryDirectory() as folder:
        program = planted_bugs(folder, "sm_{}{}".format(*torch.cuda.get_device_capability()))
        outcomes = _together({tool: [*SANITIZER, tool, program, tool] for tool in SANITIZERS})
    return [tool for tool, outcome in outcomes.items() if FOUND not in str(outcome)]


def bench(device: str) -> Stage:
    """Times, and on the CPU whether everything still runs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        try:
            run([sys.executable, "-m", "bench.gpu", str(file), "--device", device])
        except StageError as error:
            if not file.exists():
                raise
            return {"status": "failed", "why": str(error), **json.loads(file.read_text())}
        result: Stage = json.loads(file.read_text())
    if device == "cpu":
        return {"status": "not run", "why": "no GPU", "ran on the CPU": sorted(result["cases"])}
    return {"status": "passed", **result}


def describe(device: str) -> Stage:
    """What the figures depend on: device, versions, and a hash of the kernels of each slice."""
    hashes = {
        name: {
            backend: slices.hash_of(files)
            for backend in ("cuda", "triton")
            if (files := slices.kernel_files(name, backend))
        }
        for name in slices.slices()
    }
    named: Stage = {"device": "none"}
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        named = {"device": found.name, "multiprocessors": found.multi_processor_count, "memory": found.total_memory}
    return {**named, "date": datetime.now(timezone.utc).date().isoformat(), "tools": versions(), "kernels": hashes}


STAGES: dict[str, Callable[[str], Stage]] = {"build": build, "tests": tests, "sanitizers": sanitizers, "bench": bench}


def check(device: str, output: Path | None) -> Stage:
    """Runs all stages; one that fails does not stop the others, and each is written when it is through."""
    stages: dict[str, Stage] = {}
    result = {"dry": device == "cpu", **describe(device), "stages": stages}
    for name, stage in STAGES.items():
        began = time.monotonic()
        try:
            stages[name] = stage(device)
        except StageError as error:
            stages[name] = {"status": "failed", "why": str(error)}
        stages[name]["seconds"] = round(time.monotonic() - began, 1)
        why = stages[name].get("why", "")
        print(f"gpu-check: {name}: {stages[name]['status']} in {stages[name]['seconds']} s {why}", flush=True)
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _waits(file: Path) -> bool:
    return "pytest.mark.gpu" in file.read_text()


def _together(commands: dict[str, list[str]]) -> dict[str, str | StageError]:
    """What each command printed, or why it failed; all of them at a time."""

    def outcome(command: list[str]) -> str | StageError:
        try:
            return run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        except StageError as error:
            return error

    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(zip(commands, pool.map(outcome, commands.values()), strict=True))


def main() -> int:
    """Exit status 1 if a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--dry", action="store_true", help="as if there were no GPU")
    options = parser.parse_args()
    device, output = "cpu", options.output
    if not options.dry and torch.cuda.is_available():
        device = "cuda"
        slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        output = output or ROOT / f"bench/results/gpu-{slug}.json"
    stages = check(device, output)["stages"].values()
    return int(any(stage["status"] == "failed" for stage in stages))


if __name__ == "__main__":
    sys.exit(main())
