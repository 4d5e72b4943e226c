"""What nvcc makes of the kernels: no warning, no spill, no more registers than budgeted. To set a new budget, delete
register_budget.json and run this test: it writes the file and fails once."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Path(__file__).with_name("register_budget.json")
ARCHITECTURE = "sm_90"
SHIPPED = ("80", "86", "89", "90", "100", "120")
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Icsrc/include", "-Icsrc"]
PTXAS = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Xptxas", "-Werror"]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")

KERNEL = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                    r"(\d+) bytes spill loads.*?Used (\d+) registers", re.DOTALL)  # fmt: skip


def readable(mangled: str) -> str:
    """A kernel's name and row type, from its Itanium name."""
    name, row_type = re.fullmatch(r"_ZN10rmtkernels\d+(\w+?)I(f|NS_\d+\w+?E)E.*", mangled).groups()
    return f"{name}<{'float' if row_type == 'f' else re.sub(r'^NS_[0-9]+|E$', '', row_type)}>"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    output = tmp_path_factory.mktemp("nvcc") / "sliding_window.o"
    command = ["nvcc", *FLAGS, *PTXAS, f"-arch={ARCHITECTURE}", "-c", "csrc/cuda/sliding_window.cu", "-o", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for mangled, stack, stores, loads, registers in KERNEL.findall(done.stderr):
        found[readable(mangled)] = {"registers": int(registers), "local_bytes": int(stack) + int(stores) + int(loads)}
    return dict(sorted(found.items()))


def test_no_kernel_uses_local_memory(kernels: dict[str, dict[str, int]]) -> None:
    assert len(kernels) == 6
    assert {name for name, used in kernels.items() if used["local_bytes"] > 0} == set()


def test_no_shipped_architecture_spills(tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in SHIPPED]
    command = [
        "nvcc",
        *FLAGS,
        *PTXAS,
        *targets,
        "--threads=2",
        "-c",
        "csrc/cuda/sliding_window.cu",
        "-o",
        f"{tmp_path}/all.o",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # ptxas warnings about spills and local memory are errors


def test_registers_stay_within_budget(kernels: dict[str, dict[str, int]]) -> None:
    registers = {name: used["registers"] for name, used in kernels.items()}
    if not BUDGET.exists():
        BUDGET.write_text(json.dumps({ARCHITECTURE: registers}, indent=2) + "\n")
        pytest.fail(f"wrote {BUDGET.name}: look at it and commit it")
    budget = json.loads(BUDGET.read_text())[ARCHITECTURE]
    assert registers.keys() == budget.keys()
    assert {name: (used, budget[name]) for name, used in registers.items() if used > budget[name]} == {}
