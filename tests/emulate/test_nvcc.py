"""What nvcc makes of the kernels of every slice: no warning, no spill, machine code within its budget, and a clean
error where there is no GPU. A new budget is made by `python -m tools.machine_code --write SLICE`."""

import copy
import ctypes
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.emulate.lanczos_kernel import Rows
from tools import machine_code
from tools.machine_code import DEVICES, QUICK, Report, ToolError

ROOT = Path(__file__).resolve().parents[2]
PROVE = os.environ.get("RMTKERNELS_PROVE") == "1"
ARCHITECTURES = list(DEVICES) if PROVE else [QUICK]
NO_DRIVER, NO_DEVICE = 35, 100
LEAST_SHARED = 99 * 1024  # what every architecture gives a block

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


class Compiler:
    """Compiles a slice for an architecture once per test session, and keeps the library."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reports = folder, {}

    def library(self, name: str, architecture: str) -> Path:
        self.report(name, architecture)
        return self.folder / f"{name}.{architecture}.so"

    def report(self, name: str, architecture: str) -> Report:
        if (name, architecture) not in self.reports:
            library = self.folder / f"{name}.{architecture}.so"
            self.reports[name, architecture] = machine_code.report(name, architecture, library=library)
        return self.reports[name, architecture]


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(tmp_path_factory.mktemp("nvcc"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", machine_code.compiled_slices())
def test_machine_code_is_within_its_budget(compiler: Compiler, name: str, architecture: str) -> None:
    """A spill, or any local memory, already stops the compiler."""
    budget = machine_code.read_budget(name)
    assert architecture in budget, f"python -m tools.machine_code --write {name}"
    assert machine_code.over_budget(compiler.report(name, architecture), budget[architecture]) == []


@pytest.mark.parametrize("name", machine_code.compiled_slices())
def test_every_launch_fits_every_architecture(name: str) -> None:
    for launches in machine_code.launches(name).values():
        assert all(launch.shared <= LEAST_SHARED and 0 < launch.threads <= 1024 for launch in launches)


def broken_headers(folder: Path, header: str, shipped: str, broken: str) -> Path:
    """The headers with one line changed."""
    shutil.copytree(ROOT / "csrc/include/rmtkernels", folder / "rmtkernels")
    source = (folder / "rmtkernels" / header).read_text()
    assert source.count(shipped) == 1, f"{header} has changed"
    (folder / "rmtkernels" / header).write_text(source.replace(shipped, broken))
    return folder


def test_a_kernel_that_spills_is_found(tmp_path: Path) -> None:
    """The cap that somebody might give the compiler for the sake of occupancy: two blocks of 1024 threads."""
    bounds = "__launch_bounds__(kAcceptThreads)"
    overlay = broken_headers(tmp_path, "sliding_window.cuh", bounds, bounds.replace(")", ", 2)"))
    with pytest.raises(ToolError, match=r"[Ss]pill"):
        machine_code.report("sliding_window", QUICK, overlay=overlay)


def test_loads_that_became_narrow_are_found(tmp_path: Path) -> None:
    aligned = "return stride == 1 && dim % Pack<T>::kSize == 0"
    overlay = broken_headers(tmp_path, "sliding_window.cuh", aligned, aligned.replace("return ", "return false && "))
    found = machine_code.report("sliding_window", QUICK, overlay=overlay)
    budget = machine_code.read_budget("sliding_window")[QUICK]
    lines = machine_code.over_budget(found, budget)
    wide = [name for name, kernel in budget.items() if kernel["loads_of_16_bytes"]]
    assert len([line for line in lines if "loads_of_16_bytes 0, budget" in line]) == len(wide) > 10


@pytest.mark.parametrize(
    ("key", "worse"),
    [
        ("registers", 1), ("static_shared", 16), ("atomics", 1), ("local_bytes", 8), ("loads_of_16_bytes", -1),
        ("tensor_core", -1),
    ],
)  # fmt: skip
def test_each_figure_has_its_limit(key: str, worse: int) -> None:
    kernel = {"registers": 40, "static_shared": 0, "atomics": 0, "local_bytes": 0, "loads_of_16_bytes": 4}
    budget = {"kernel": {**kernel, "tensor_core": 8, "occupancy": {"any": 0.5}}}
    assert machine_code.over_budget(budget, budget) == []
    found = copy.deepcopy(budget)
    found["kernel"][key] += worse
    assert len(machine_code.over_budget(found, budget)) == 1
    found = copy.deepcopy(budget)
    found["kernel"]["occupancy"]["any"] = 0.4
    assert machine_code.over_budget(found, budget) == ["kernel: occupancy 0.4 (any), budget 0.5"]
    assert machine_code.over_budget({}, budget) == ["kernel: in the budget and not compiled"]
    assert machine_code.over_budget(budget, {}) == ["kernel: not in the budget"]


# One kernel launch of a slice, with pointers that lead nowhere. spectrum asks the runtime for shared memory first.
LAUNCHES = {
    "covariance": lambda library: library.rmtkernels_cuda_covariance_update((ctypes.c_int64 * 16)(*[0] * 7, 1), None),
    "lanczos": lambda library: library.rmtkernels_cuda_lanczos_orthonormalize(ctypes.byref(Rows(count=1, dim=1)), None),
    "lowrank_linear": lambda library: library.rmtkernels_cuda_lowrank_linear(
        ctypes.byref((ctypes.c_int64 * 11)(*[0] * 6, *[1] * 4, 0)), None
    ),
    "sliding_window": lambda library: library.rmtkernels_cuda_window_gram(
        (ctypes.c_int64 * 16)(*[0] * 7, *[1] * 4, *[0] * 3, 1), None
    ),
    "spectrum": lambda library: library.rmtkernels_cuda_spectrum_eigvalsh(
        None, None, ctypes.c_bool(False), ctypes.c_int64(128), ctypes.c_int64(1), None
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, and these pointers lead nowhere")
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_without_a_device_is_a_clean_error(compiler: Compiler, name: str) -> None:
    assert LAUNCHES[name](ctypes.CDLL(str(compiler.library(name, QUICK)))) in (NO_DRIVER, NO_DEVICE)
