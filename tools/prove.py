"""The long ladder of proofs, and a record of what passed: `python -m tools.prove [--slices NAME ...] [--check]`.

Runs all tests of a slice with RMTKERNELS_PROVE=1: every architecture, schedule, size, sanitizer and planted bug.
proofs.json keeps what passed, with a hash of the files that the slice depends on (tools/slices.py). Without --slices
those run whose hash has changed, but for those of ELSEWHERE; --check runs nothing, names what has changed, and exits
with 1 if there is any. Each slice is recorded when it is through: an interrupted run keeps what it has finished, and a
failing one is not recorded.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import slices
from tools.slices import ROOT
from tools.versions import versions

RECORD = "proofs.json"
WAITING = "RMTKERNELS_PROVE"
_EIGENTRACK = ["python/eigentrack/*.py"]  # without the plugin for vLLM
# Ladders that are not a slice's: what they depend on, and the folder whose waiting tests are theirs.
SYSTEMS = {
    "rmtkd": (["python/rmtkd"], "tests/integration"),
    "bad_input": (_EIGENTRACK, "tests/integration"),
    "examples": (["examples"], "tests/integration"),
    "kills": (
        [*_EIGENTRACK, "python/rmtkd", "bench/experiments/detector", "tests/integration/kills.py"],
        "tests/integration",
    ),
    "soak": (
        [
            *_EIGENTRACK,
            "rmtkernels/states.py",
            "csrc/cpu/sliding_window.cpp",
            "csrc/cpu/spectrum.cpp",
            "tests/integration/soak.py",
        ],
        "tests/integration",
    ),
    "monitor": (_EIGENTRACK, "tests/integration"),
    "sanitized": (
        [
            "csrc/cpu",
            "csrc/include",
            "csrc/tensor_check.h",
            "tools/sanitized_suite.py",
            "tools/fork_join.cpp",
            "tools/sanitized_suite.supp",
        ],
        "tests/integration",
    ),
}
# Ladders that `make test-vllm` runs in an environment of its own: what they depend on, and their tests.
_WATCHING = ("vllm", "detector.py", "files.py", "network.py", "options.py", "taps.py")
ELSEWHERE = {"vllm": ([*(f"python/eigentrack/{path}" for path in _WATCHING), "requirements/vllm.txt"], "tests/vllm")}
# Backend, rung (README, "What has been proved"), and the tests that stand for it. {poisons}: the file fills results
# with NaN before they are written. A test may stand for several.
RUNGS = [
    ("cpu", 1, r"^tests/unit/"),
    ("cpu", 2, r"^tests/(unit|sanitize|compile)/"),
    ("cpu", 7, r"^tests/compile/"),
    ("cpu", 8, r"^tests/unit/(?!.*_cuda).*{poisons}"),
    ("triton", 3, r"^tests/triton/(?!test_compiled)"),
    ("triton", 4, r"^tests/triton/test_compiled"),
    ("cuda", 5, r"^tests/emulate/test_nvcc"),
    ("cuda", 6, r"^tests/emulate/(?!test_nvcc)"),
    ("cuda", 7, r"^tests/unit/.*_cuda"),
    ("cuda", 8, r"^tests/emulate/.*{poisons}"),
]
# Why a test may be left out: a package that is optional. Its rungs are then not counted.
MAY_BE_ABSENT = {"Triton is not installed"}
# In tests/emulate results are np.full(…, nan); elsewhere such a tensor is an argument, and a fixture poisons results.
POISONS = {
    "cpu": re.compile(r"nan_memory|empty_state|empty_covariance"),
    "cuda": re.compile(r"full\([^\n]*\bnan\b"),
}


@dataclass(frozen=True)
class Ladder:
    """What to run for a name, and a hash of what it depends on."""

    name: str
    hash: str
    arguments: list[str]  # pytest's


class LadderError(Exception):
    """Why a ladder is not recorded."""


def ladders(root: Path = ROOT) -> dict[str, Ladder]:
    found = {}
    for name in slices.slices(root):
        tests = [str(file.relative_to(root)) for file in slices.programs_of(name, root) if _is_test(file)]
        digest = slices.hash_of(slices.files_of(name, root), root)
        found[name] = Ladder(name, digest, [*sorted(tests), "-k", slices.keywords(name, root)])
    for name, (paths, tests_of) in SYSTEMS.items():
        tests = [
            str(file.relative_to(root))
            for file in sorted((root / tests_of).glob(f"test_{name}*.py"))
            if WAITING in file.read_text()
        ]
        if tests:
            digest = slices.hash_of([*_files(root, paths), *(root / test for test in tests)], root)
            found[name] = Ladder(name, digest, tests)
    for name, (paths, tests_of) in ELSEWHERE.items():
        found[name] = Ladder(name, slices.hash_of(_files(root, [*paths, tests_of]), root), [tests_of])
    return found


def changed(record: dict[str, Any], all_ladders: dict[str, Ladder]) -> list[str]:
    return [name for name, ladder in all_ladders.items() if record.get(name, {}).get("hash") != ladder.hash]


def prove(ladder: Ladder, root: Path, jobs: int) -> dict[str, Any]:
    """Runs one ladder and returns its record. Raises LadderError if a test failed, was left out, or none ran."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu and not timing", *ladder.arguments]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
        command += [f"--numprocesses={jobs}", "--dist=loadfile"] if jobs > 1 else []
        environment = os.environ | {WAITING: "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, cwd=root, env=environment, check=False).returncode
        if status != 0:
            raise LadderError(f"pytest ended with {status}")
        passed, skipped = read_report(report)
    left_out = {reason: count for reason, count in skipped.items() if reason not in MAY_BE_ABSENT}
    if left_out:
        raise LadderError(f"left out: {'; '.join(f'{reason} ({count})' for reason, count in left_out.items())}")
    if not passed:
        raise LadderError("no test ran")
    return {
        "hash": ladder.hash,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seconds": round(time.monotonic() - began),
        "passed": len(passed),
        "rungs": rungs(passed, root),
        "tools": versions(),
    }


def read_report(report: Path) -> tuple[list[str], dict[str, int]]:
    """Files of the tests that passed, one entry for each, and reasons of those that were skipped."""
    passed: list[str] = []
    skipped: Counter[str] = Counter()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        reason = case.find("skipped")
        if reason is None:
            passed.append(str(case.get("file")))
        else:
            skipped[reason.get("message", "no reason")] += 1
    return passed, dict(skipped)


def rungs(passed: list[str], root: Path = ROOT) -> dict[str, dict[str, int]]:
    """Backend -> rung -> how many tests stand for it."""
    found: dict[str, dict[str, int]] = {}
    for file, count in Counter(passed).items():
        text = (root / file).read_text()
        for backend, rung, pattern in RUNGS:
            if "{poisons}" in pattern and not POISONS[backend].search(text):
                continue
            if re.search(pattern.removesuffix("{poisons}"), file):
                of_backend = found.setdefault(backend, {})
                of_backend[str(rung)] = of_backend.get(str(rung), 0) + count
    return {backend: dict(sorted(counts.items())) for backend, counts in sorted(found.items())}


def read_record(root: Path = ROOT) -> dict[str, Any]:
    file = root / RECORD
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return record


def run(names: list[str], all_ladders: dict[str, Ladder], root: Path, jobs: int) -> int:
    """Exit status 0 if every ladder passed. What passed is written at once."""
    failed = []
    for name in names:
        print(f"prove: {name}", flush=True)
        try:
            result = prove(all_ladders[name], root, jobs)
        except LadderError as error:
            failed.append(name)
            print(f"prove: {name} is not recorded: {error}", flush=True)
            continue
        record = {**read_record(root), name: result}
        kept = {name: record[name] for name in sorted(record) if name in all_ladders}
        (root / RECORD).write_text(json.dumps(kept, indent=2) + "\n")
        print(f"prove: {name} passed {result['passed']} tests in {result['seconds']} s; commit {RECORD}", flush=True)
    return int(bool(failed))


def _files(root: Path, paths: list[str]) -> list[Path]:
    """Files, and the sources in folders."""
    places = [place for path in paths for place in root.glob(path)]
    found = [place for place in places if place.is_file()]
    return [*found, *(file for place in places for file in place.rglob("*") if file.suffix in slices.SUFFIXES)]


def _is_test(file: Path) -> bool:
    return file.name.startswith("test_") and file.suffix == ".py"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.prove", description=__doc__.split("\n\n")[0])
    parser.add_argument("--slices", nargs="+", metavar="NAME", help="these, whether they have changed or not")
    parser.add_argument("--check", action="store_true", help="name what has changed and run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="test processes at a time")
    options = parser.parse_args(arguments)
    all_ladders = ladders(root)
    unknown = set(options.slices or []) - all_ladders.keys()
    if unknown:
        parser.error(f"no ladder is called {', '.join(sorted(unknown))}; there is: {', '.join(all_ladders)}")
    due = [name for name in all_ladders if options.check or name not in ELSEWHERE]
    names = options.slices or due
    if options.check or not options.slices:
        stale = changed(read_record(root), all_ladders)
        names = [name for name in names if name in stale]
    print(f"prove: changed since they were proved: {', '.join(names)}" if names else "prove: nothing has changed")
    if options.check:
        return int(bool(names))
    return run(names, all_ladders, root, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
