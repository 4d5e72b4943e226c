"""What nvcc makes of the kernels: no warning, no spill, no more registers than budgeted. To set a new budget, delete
register_budget.json and run this test: it writes the file and fails once."""

import ctypes
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Path(__file__).with_name("register_budget.json")
ARCHITECTURE = "sm_90"
SHIPPED = ("80", "86", "89", "90", "100", "120")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-Werror",
    "all-warnings",
    "-Xcompiler",
    "-Wall,-Wextra,-fPIC",
    "-Icsrc/include",
    "-Icsrc",
]
PTXAS = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Xptxas", "-Werror"]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")

KERNEL = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                    r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)", re.DOTALL)  # fmt: skip
TYPES = {"f": "<float>", "d": "<double>", None: ""}
# Kernels of each slice. A compiler is busy for ten seconds with those of spectrum: its other architectures wait for
# RMTKERNELS_PROVE=1.
SLICES = {"sliding_window": 6, "spectrum": 3}
PROVE = os.environ.get("RMTKERNELS_PROVE") == "1"
NO_DRIVER, NO_DEVICE = 35, 100


def readable(mangled: str) -> str:
    """A kernel's name and row type, from its Itanium name."""
    length, rest = re.fullmatch(r"_ZN10rmtkernels(\d+)(\w+)", mangled).groups()
    name, rest = rest[: int(length)], rest[int(length) :]
    row_type = re.match(r"I(?:NS_\d+(\w+?)E|(f|d))E", rest)
    if row_type is None:
        return name
    return f"{name}<{row_type[1]}>" if row_type[1] else name + TYPES[row_type[2]]


class Compiled(NamedTuple):
    kernels: dict[str, dict[str, int]]
    object_file: Path


@pytest.fixture(scope="module", params=SLICES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    output = tmp_path_factory.mktemp("nvcc") / f"{request.param}.o"
    command = ["nvcc", *FLAGS, *PTXAS, f"-arch={ARCHITECTURE}", "-c", f"csrc/cuda/{request.param}.cu", "-o", output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for mangled, stack, stores, loads, registers, rest in KERNEL.findall(done.stderr):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[readable(mangled)] = {
            "registers": int(registers),
            "local_bytes": int(stack) + int(stores) + int(loads),
            "static_shared_bytes": int(shared[1]) if shared else 0,
        }
    assert len(found) == SLICES[request.param]
    return Compiled(dict(sorted(found.items())), output)


def test_no_kernel_uses_local_or_static_shared_memory(compiled: Compiled) -> None:
    """What they need of shared memory is dynamic; spectrum.cuh asserts that it fits 99 KB."""
    used = {name for name, k in compiled.kernels.items() if k["local_bytes"] > 0 or k["static_shared_bytes"] > 0}
    assert used == set()


@pytest.mark.parametrize("name", ["sliding_window", *(["spectrum"] if PROVE else [])])
def test_no_shipped_architecture_spills(tmp_path: Path, name: str) -> None:
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in SHIPPED]
    source, output = f"csrc/cuda/{name}.cu", f"{tmp_path}/all.o"
    command = ["nvcc", *FLAGS, *PTXAS, *targets, "--threads=2", "-c", source, "-o", output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # ptxas warnings about spills and local memory are errors


def test_registers_stay_within_budget(compiled: Compiled) -> None:
    registers = {name: used["registers"] for name, used in compiled.kernels.items()}
    budget = json.loads(BUDGET.read_text())[ARCHITECTURE] if BUDGET.exists() else {}
    if not registers.keys() <= budget.keys():
        BUDGET.write_text(json.dumps({ARCHITECTURE: dict(sorted({**budget, **registers}.items()))}, indent=2) + "\n")
        pytest.fail(f"wrote {BUDGET.name}: look at it and commit it")
    assert {name: (used, budget[name]) for name, used in registers.items() if used > budget[name]} == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, and these pointers lead nowhere")
@pytest.mark.parametrize("n", [5, 128])
def test_a_launch_without_a_device_is_a_clean_error(compiled: Compiled, n: int) -> None:
    if compiled.object_file.stem != "spectrum":
        pytest.skip("asked of spectrum, whose largest block asks the runtime for shared memory first")
    library = compiled.object_file.with_suffix(".so")
    subprocess.run(["nvcc", "-shared", "-o", library, compiled.object_file], check=True)
    launch = ctypes.CDLL(str(library)).rmtkernels_cuda_spectrum_eigvalsh
    error = launch(None, None, ctypes.c_bool(False), ctypes.c_int64(n), ctypes.c_int64(1), None)
    assert error in (NO_DRIVER, NO_DEVICE)
