"""The kernels of lowrank_linear under the sanitizers and nvcc, and with one line broken, which must be found.

RMTKERNELS_PROVE=1 runs all of it; else what takes seconds."""

import ctypes
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc/include/rmtkernels"
BUDGET = Path(__file__).with_name("register_budget.json")
SLICE, HEADER = "lowrank_linear", "lowrank_linear.cuh"
SHIPPED = ("80", "86", "89", "90", "100", "120")
NVCC = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-fPIC", "-Icsrc/include",
        "-Icsrc", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Xptxas", "-Werror"]  # fmt: skip
NO_DEVICE = (35, 100)  # the driver is missing or too old; no device

prove = pytest.mark.skipif("RMTKERNELS_PROVE" not in os.environ, reason="RMTKERNELS_PROVE=1 runs it")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def run(program: Path, workers: int, schedule: str = "rand") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"EMU_WORKERS": str(workers), "EMU_SCHED": schedule, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600, check=False)


@prove
@pytest.mark.parametrize(("build", "blocks"), [("thread", 1), ("thread", 2), ("memory", 1), ("wavefronts of 64", 1)])
def test_checkers_are_silent(builder, build: str, blocks: int) -> None:
    done = run(builder.driver(build, SLICE), blocks)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


# (text as shipped, text broken, build, what it says). The plain build says what the driver's reference found.
MUTANTS = {
    "the barrier before the last sum is missing": ("__syncthreads();", "", "thread", "data race"),
    "all lanes store a sum": ("if (lane % kSame != 0) return;", "", "thread", "data race"),
    "lanes keep the other half": ("upper = lane & kOffset;", "upper = !(lane & kOffset);", "plain", "wrong result"),
    "a lane is left out": ("add_lanes<kLanes / 2, kSums>", "add_lanes<kLanes / 4, kSums>", "plain", "wrong result"),
    "a team's other warps are left out": ("k < parts_per_team", "k < 1", "plain", "wrong result"),
    "the bias of another column": ("p.bias)[column]", "p.bias)[column ^ 1]", "plain", "wrong result"),
    "the activations of another row": ("sum + r * kColumns, packs, row,", "sum, packs, row,", "plain", "wrong result"),
    "rows that do not exist are stored": ("r >= rows_left || ", "", "memory", "heap-buffer-overflow"),
    "the last pack reads past the row":
        ("first + kPack < dim ? first + kPack : dim;", "first + kPack;", "memory", "heap-buffer-overflow"),
    "packs past the row are read": ("if (i < dim) bits =", "bits =", "memory", "heap-buffer-overflow"),
    "columns that do not exist are read":
        ("mine < p.columns ? mine : p.columns - 1", "mine", "memory", "heap-buffer-overflow"),
    "any address is taken for aligned": ("(p.weights) % 16 == 0", "(p.weights) % 1 == 0", "memory", "misaligned"),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken_headers(builder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy of the headers for each mutant. All are sent to the compilers at once."""
    folders = {}
    for number, (mutant, (shipped, broken, build, _)) in enumerate(MUTANTS.items()):
        folders[mutant] = tmp_path_factory.mktemp(f"lowrank_mutant{number}")
        copy = folders[mutant] / "rmtkernels"
        shutil.copytree(HEADERS, copy)
        source = (copy / HEADER).read_text()
        assert source.count(shipped) == 1, f"{mutant}: {HEADER} has changed"
        (copy / HEADER).write_text(source.replace(shipped, broken))
        builder.start_driver(build, SLICE, folders[mutant])
    return folders


@prove
@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_kernel_is_found(builder, broken_headers: dict[str, Path], mutant: str) -> None:
    build, message = MUTANTS[mutant][-2:]
    done = run(builder.driver(build, SLICE, broken_headers[mutant]), 1)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def readable(mangled: str) -> str:
    """A kernel's name<weights, activations, rows, columns>, from its Itanium name."""
    name, *types, rows, columns = re.fullmatch(
        r"_ZN10rmtkernels\d+(\w+?)I(f|NS_\d+\w+?E)(f|NS_\d+\w+?E|S1_)Li(\d+)ELi(\d+)EEEv\w+", mangled
    ).groups()
    weights, activations = ("float" if t == "f" else re.sub(r"^NS_[0-9]|E$", "", t) for t in types)
    return f"{name}<{weights}, {weights if activations == 'S1_' else activations}, {rows}, {columns}>"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The kernels for one architecture as a shared library, and the registers of each; a spill is an error."""
    library = tmp_path_factory.mktemp("nvcc") / "lowrank_linear.so"
    command = [*NVCC, "-arch=sm_90", "-shared", f"csrc/cuda/{SLICE}.cu", "-o", str(library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", done.stderr, re.DOTALL)
    return library, {readable(mangled): int(registers) for mangled, registers in found}


@needs_nvcc
def test_registers_stay_within_budget(compiled: tuple[Path, dict[str, int]]) -> None:
    budget = json.loads(BUDGET.read_text())["lowrank_linear sm_90"]
    assert compiled[1].keys() == budget.keys()
    assert {name: (used, budget[name]) for name, used in compiled[1].items() if used > budget[name]} == {}


@needs_nvcc
def test_a_launch_without_a_device_is_a_clean_error(compiled: tuple[Path, dict[str, int]]) -> None:
    class Layer(ctypes.Structure):
        _fields_ = [
            *[(name, ctypes.c_void_p) for name in ("x", "down", "up", "bias", "out", "hidden")],
            *[(name, ctypes.c_int64) for name in ("rows", "d_in", "k", "d_out")],
            *[(name, ctypes.c_int32) for name in ("type", "weight_type")],
        ]

    launch = ctypes.CDLL(str(compiled[0])).rmtkernels_cuda_lowrank_linear
    assert launch(ctypes.byref(Layer(rows=0, d_in=1, k=1, d_out=1)), None) == 0
    if shutil.which("nvidia-smi") is None:
        assert launch(ctypes.byref(Layer(rows=1, d_in=1, k=1, d_out=1)), None) in NO_DEVICE


@prove
@needs_nvcc
def test_no_shipped_architecture_spills(tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in SHIPPED]
    command = [*NVCC, *targets, "--threads=2", "-c", f"csrc/cuda/{SLICE}.cu", "-o", str(tmp_path / "all.o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@prove
@needs_nvcc
def test_every_kernel_loads_16_bytes_at_once(tmp_path: Path) -> None:
    """At least once for every weight row that a team reads; and there is no atomic."""
    command = ["nvcc", "-std=c++17", "-O3", "-Icsrc/include", "-Icsrc", "-arch=compute_80", "-ptx",
               f"csrc/cuda/{SLICE}.cu", "-o", str(tmp_path / "all.ptx")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    bodies = re.split(r"\.entry (\w+)", (tmp_path / "all.ptx").read_text())[1:]
    for mangled, body in zip(bodies[::2], bodies[1::2], strict=True):
        columns = int(readable(mangled).rstrip(">").split()[-1])
        assert len(re.findall(r"ld\.global\.v4", body)) >= columns, readable(mangled)
        assert not re.search(r"\b(atom|red)\.", body)
