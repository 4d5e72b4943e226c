"""What the proofs of all slices share: sanitized runs of a slice's driver, and kernels with one line broken."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc/include/rmtkernels"
PROVE = "RMTKERNELS_PROVE" in os.environ

prove = pytest.mark.skipif(not PROVE, reason="RMTKERNELS_PROVE=1 runs it")
# Build and blocks in flight of the runs that must say nothing.
SILENT = [("thread", 1), ("thread", 2), ("memory", 1), ("wavefronts of 64", 1)]


@dataclass(frozen=True)
class Mutant:
    """One line of a header broken, the build that must find it, and what that says."""

    header: str
    shipped: str
    broken: str
    build: str
    message: str


def run(program: Path, workers: int, schedule: str = "rand") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"EMU_WORKERS": str(workers), "EMU_SCHED": schedule, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600, check=False)


def assert_silent(builder: Any, slice_name: str, build: str, blocks: int) -> None:
    done = run(builder.driver(build, slice_name), blocks)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def break_headers(
    builder: Any, folders: pytest.TempPathFactory, slice_name: str, mutants: dict[str, Mutant]
) -> dict[str, Path]:
    """A copy of the headers for each mutant. All are sent to the compilers at once."""
    broken = {}
    for number, (name, mutant) in enumerate(mutants.items()):
        broken[name] = folders.mktemp(f"{slice_name}_mutant{number}")
        copy = broken[name] / "rmtkernels"
        shutil.copytree(HEADERS, copy)
        source = (copy / mutant.header).read_text()
        assert source.count(mutant.shipped) == 1, f"{name}: {mutant.header} has changed"
        (copy / mutant.header).write_text(source.replace(mutant.shipped, mutant.broken))
        builder.start_driver(mutant.build, slice_name, broken[name])
    return broken


def assert_found(builder: Any, slice_name: str, headers: Path, mutant: Mutant) -> None:
    done = run(builder.driver(mutant.build, slice_name, headers), 1)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and mutant.message in said, said
