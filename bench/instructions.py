"""Instructions that each CPU kernel executes on fixed numbers, counted by valgrind: a gate that no noise moves.

The kernels are compiled with the build's own optimisation flags and called without Python or PyTorch
(instructions_driver.cpp). `instructions.json` is the budget. A count depends on the compiler, so a budget names it, and
is compared with counts of the same compiler alone. It says nothing of caches, memory or threads: those are timed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.experiments.results import write_json

ROOT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("instructions.json")
SLICES = ("covariance", "lanczos", "lowrank_linear", "sliding_window", "spectrum")
TOLERANCE = 0.01  # logarithms and square roots are the C library's, whose version may differ


class CountError(Exception):
    """Why nothing could be counted or compared."""


def compiler() -> str:
    """Such as "g++ 12.2.0". Raises CountError if there is none."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise CountError(f"there is no compiler called {name}: set CXX, or install g++")
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"\b\d+\.\d+\.\d+\b", said)
    return f"{Path(name).name} {version[0] if version else 'unknown'}"


def build(folder: Path, isa: str, root: Path = ROOT) -> Path:
    """The driver with the kernels of one instruction set, as the package builds them."""
    sys.path.insert(0, str(ROOT / "build_tools"))  # not a package: the build backend imports it so
    from native_modules import AVX2_FLAGS, BASELINE_FLAGS, CXX_FLAGS, INCLUDES

    sources = ["bench/instructions_driver.cpp", *(f"csrc/cpu/{name}_kernels.cpp" for name in SLICES)]
    program = folder / f"instructions_{isa}"
    flags = [*CXX_FLAGS, *INCLUDES, *(AVX2_FLAGS if isa == "avx2" else BASELINE_FLAGS)]
    command = [os.environ.get("CXX", "g++"), *flags, *sources, "-o", str(program)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CountError(f"the kernels do not compile:\n{done.stderr}")
    return program


def count(program: Path) -> dict[str, int]:
    """Kernel -> instructions of one call."""
    if shutil.which("valgrind") is None:
        raise CountError("there is no valgrind: install the package of that name")
    names = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    return {name: count_one(program, name) for name in names}


def count_one(program: Path, name: str) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=measured*"]
    done = subprocess.run([*command, str(program), name], capture_output=True, text=True, check=False)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or found is None or found[1] == "0":
        raise CountError(f"valgrind counted nothing of {name} (status {done.returncode}):\n{done.stderr[-2000:]}")
    return int(found[1])


def counts_of_all(root: Path = ROOT) -> dict[str, dict[str, int]]:
    """Instruction set -> kernel -> instructions, for the sets that this processor has."""
    import rmtkernels

    with tempfile.TemporaryDirectory() as folder:
        return {isa: count(build(Path(folder), isa, root)) for isa in rmtkernels.cpu_isas()}


def over_budget(counts: dict[str, int], budget: dict[str, int]) -> list[str]:
    """What takes more than its budget, or has none; budgets of kernels that are gone."""
    found = [f"{name}: {n} instructions and no budget" for name, n in counts.items() if name not in budget]
    found += [f"{name}: a budget and no kernel" for name in budget if name not in counts]
    for name in counts.keys() & budget.keys():
        change = counts[name] / budget[name] - 1
        if change > TOLERANCE:
            found.append(f"{name}: {counts[name]} instructions, {change:+.1%} of {budget[name]}")
    return sorted(found)


def read_budget() -> dict[str, dict[str, int]]:
    """Of this compiler. Raises CountError if the budget is another's."""
    written = json.loads(BUDGET.read_text())
    if written["compiler"] != compiler():
        raise CountError(
            f"the budget is of {written['compiler']}, this is {compiler()}: compare counts of two commits with this "
            "compiler instead, by --write before and without it after"
        )
    budget: dict[str, dict[str, int]] = written["instructions"]
    return budget


def main(write: bool) -> int:
    """Prints all counts. Exit status 1 if one is over its budget, 2 if nothing could be counted or compared."""
    try:
        counts = counts_of_all()
        budget = counts if write else read_budget()
    except CountError as error:
        print(error, file=sys.stderr)
        return 2
    failed = []
    for isa, found in counts.items():
        for name, number in found.items():
            before = budget.get(isa, {}).get(name)
            print(f"{isa:9} {name:30} {number:10}" + (f"   {number / before - 1:+.2%}" if before else ""))
        failed += [f"{isa} {line}" for line in over_budget(found, budget.get(isa, {}))]
    if write:
        write_json(BUDGET, {"compiler": compiler(), "instructions": counts})
    print("\n".join(failed) or "within the budget")
    return int(bool(failed))
