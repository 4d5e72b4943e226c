"""What the proofs of all slices share: sanitized runs of a slice's driver, and kernels with one line broken."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc/include/rmtkernels"
PROVE = "RMTKERNELS_PROVE" in os.environ

prove = pytest.mark.skipif(not PROVE, reason="RMTKERNELS_PROVE=1 runs it")
# Build and blocks in flight of the runs that must say nothing.
SILENT = [("thread", 1), ("thread", 2), ("memory", 1), ("wavefronts of 64", 1)]


# Header, text as shipped, text broken, build that must find it, what that says.
Mutant = tuple[str, str, str, str, str]


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
    for number, (name, (header, shipped, mutant, build, _)) in enumerate(mutants.items()):
        broken[name] = folders.mktemp(f"{slice_name}_mutant{number}")
        copy = broken[name] / "rmtkernels"
        shutil.copytree(HEADERS, copy)
        source = (copy / header).read_text()
        assert source.count(shipped) == 1, f"{name}: {header} has changed"
        (copy / header).write_text(source.replace(shipped, mutant))
        builder.start_driver(build, slice_name, broken[name])
    return broken


def assert_found(builder: Any, slice_name: str, headers: Path, mutant: Mutant) -> None:
    build, message = mutant[-2:]
    done = run(builder.driver(build, slice_name, headers), 1)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and message in said, said
