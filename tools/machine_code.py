"""What nvcc makes of the kernels, read from the compiler's report and the machine code: no GPU is needed.

`python -m tools.machine_code [SLICE ...]` compares with tests/emulate/machine_code/<slice>.json; --write makes the
files anew. A kernel that takes dynamic shared memory needs an entry under "launches" there: threads of a block, and the
bytes as a C++ expression over the slice's headers, for each size that matters.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ROOT / "tests/emulate/machine_code"
INCLUDES = ["-Icsrc/include", "-Icsrc"]
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-fPIC", *INCLUDES]
PTXAS = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Xptxas", "-Werror"]
# Shared memory of a multiprocessor, the most that one block may ask for, and threads of a multiprocessor: CUDA C++
# Programming Guide 13.0, "Technical Specifications per Compute Capability".
DEVICES = {
    "sm_80": (167936, 166912, 2048),
    "sm_86": (102400, 101376, 1536),
    "sm_89": (102400, 101376, 1536),
    "sm_90": (233472, 232448, 2048),
    "sm_100": (233472, 232448, 2048),
    "sm_120": (102400, 101376, 1536),
}
QUICK = "sm_90"
# What the machine code is searched for. LDGSTS copies from global to shared memory.
COUNTED = {
    "loads_of_16_bytes": r"(LDG|LDGSTS)\b\S*\.128",
    "tensor_core": r"(HMMA|IMMA|DMMA|BMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b",
    "atomics": r"(ATOM|ATOMG|ATOMS|RED)\b",
}
ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)
Kernel = dict[str, Any]
Report = dict[str, Kernel]


class ToolError(Exception):
    """A program of the CUDA toolkit is missing, or failed."""


@dataclass(frozen=True)
class Launch:
    """One way to launch a kernel: for what size, threads of a block, dynamic shared memory."""

    label: str
    threads: int
    shared: int


def compiled_slices() -> list[str]:
    """Slices with a .cu file that holds kernels of its own."""
    return sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu") if path.stem != "runtime")


def report(name: str, architecture: str, overlay: Path | None = None, library: Path | None = None) -> Report:
    """Kernels of a slice by name. Headers in `overlay` come before the repository's own; `library` is where the
    compiled slice is to be left.

    Raises:
        ToolError: if the compiler refuses, which it also does where a kernel spills.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = str(library or f"{folder}/{name}.so")
        includes = [f"-I{overlay}"] if overlay else []
        command = ["nvcc", *includes, *FLAGS, *PTXAS]
        command += [f"-arch={architecture}", "-shared", "--keep", f"--keep-dir={folder}", f"csrc/cuda/{name}.cu"]
        said = _run([*command, "-o", output]).stderr
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
        code = _run([_tool("cuobjdump"), "-sass", output]).stdout
    compiled = {}
    for mangled, stack, stores, loads, registers, rest in ENTRY.findall(said):
        shared = re.search(r"(\d+) bytes smem", rest)
        compiled[mangled] = {
            "registers": int(registers),
            "local_bytes": int(stack) + int(stores) + int(loads),
            "static_shared": int(shared[1]) if shared else 0,
            **_ptx_facts(ptx, mangled),
            **_counts(code, mangled),
        }
    names = _readable(compiled)
    kernels = {names[mangled]: facts for mangled, facts in compiled.items()}
    _add_occupancy(name, architecture, kernels)
    return dict(sorted(kernels.items()))


def over_budget(found: Report, budget: Report) -> list[str]:
    """What got worse, in words; and kernels that only one of the two has."""
    lines = [f"{name}: not in the budget" for name in found.keys() - budget.keys()]
    lines += [f"{name}: in the budget and not compiled" for name in budget.keys() - found.keys()]
    for name in found.keys() & budget.keys():
        got, want = found[name], budget[name]
        if got["local_bytes"]:
            lines.append(f"{name}: {got['local_bytes']} bytes of local memory")
        for key in ("registers", "static_shared", "atomics"):
            if got[key] > want[key]:
                lines.append(f"{name}: {key} {got[key]}, budget {want[key]}")
        for key in ("loads_of_16_bytes", "tensor_core"):
            if got[key] < want[key]:
                lines.append(f"{name}: {key} {got[key]}, budget {want[key]}")
        for label, share in want["occupancy"].items():
            if got["occupancy"].get(label, 0) < share:
                lines.append(f"{name}: occupancy {got['occupancy'].get(label, 0)} ({label}), budget {share}")
    return sorted(lines)


def read_budget(name: str) -> dict[str, Any]:
    """The committed file of a slice: "launches", and a report for each architecture."""
    file = BUDGETS / f"{name}.json"
    budget: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return budget


def launches(name: str) -> dict[str, list[Launch]]:
    """The launches that the slice's file names, their shared memory worked out by the slice's own header."""
    named = read_budget(name).get("launches", {})
    asked = [(kernel, label, shape) for kernel, shapes in named.items() for label, shape in shapes.items()]
    sizes = _evaluate(name, tuple(str(shape["shared"]) for _, _, shape in asked))
    found: dict[str, list[Launch]] = {}
    for (kernel, label, shape), size in zip(asked, sizes, strict=True):
        found.setdefault(kernel, []).append(Launch(label, shape["threads"], size))
    return found


def _add_occupancy(name: str, architecture: str, kernels: Report) -> None:
    """Adds the share of a multiprocessor's threads that a kernel can keep busy, for each of its launches."""
    named = launches(name)
    asked = []
    for kernel, facts in kernels.items():
        dynamic, threads = facts.pop("dynamic_shared"), facts["threads"]
        facts["occupancy"] = {}
        if dynamic and kernel not in named:
            raise ToolError(f"{kernel} takes dynamic shared memory: say how much, under launches of {name}.json")
        for launch in named.get(kernel, [Launch("any", threads, 0)]):
            asked.append((facts, launch))
    number, (shared, of_block, threads_of_sm) = architecture.removeprefix("sm_"), DEVICES[architecture]
    head = f"{number[:-1]} {number[-1]} {shared} {of_block} {threads_of_sm}"
    lines = [f"{head} {f['registers']} {f['static_shared']} {launch.threads} {launch.shared}" for f, launch in asked]
    for (facts, launch), blocks in zip(asked, _occupancy("\n".join(lines)), strict=True):
        facts["occupancy"][launch.label] = round(blocks * launch.threads / threads_of_sm, 3)


def _ptx_facts(ptx: str, mangled: str) -> dict[str, Any]:
    """The most threads of a block, and whether dynamic shared memory is used."""
    body = re.search(rf"\.entry {mangled}\(.*?(?=\.entry |\Z)", ptx, re.DOTALL)
    if body is None:
        raise ToolError(f"no PTX of {mangled}")
    bound = re.search(r"\.maxntid ([\d, ]+)", body[0])
    threads = 1
    for size in bound[1].split(",") if bound else ["1024"]:
        threads *= int(size)
    dynamic = re.findall(r"\.extern \.shared[^;]*?(\w+)\[\]", ptx)
    return {"threads": threads, "dynamic_shared": any(re.search(rf"\b{array}\b", body[0]) for array in dynamic)}


def _counts(code: str, mangled: str) -> dict[str, int]:
    body = re.search(rf"Function : {mangled}\n(.*?)(?=Function : |\Z)", code, re.DOTALL)
    if body is None:
        raise ToolError(f"no machine code of {mangled}")
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", body[1], re.MULTILINE)
    return {what: sum(bool(re.match(pattern, i)) for i in instructions) for what, pattern in COUNTED.items()}


def _readable(mangled: Iterable[str]) -> dict[str, str]:
    names = list(mangled)
    said = _run(["c++filt", *names]).stdout.splitlines()
    short = {}
    for name, full in zip(names, said, strict=True):
        full = full.replace("(anonymous namespace)::", "").replace("rmtkernels::", "").removeprefix("void ")
        short[name] = re.sub(r"\(.*\)$", "", full)
    return short


@lru_cache
def _evaluate(name: str, expressions: tuple[str, ...]) -> tuple[int, ...]:
    """C++ expressions over the slice's device headers, as the emulation compiles them."""
    if not expressions:
        return ()
    prints = "".join(f'std::printf("%zu\\n", size_t({expression}));' for expression in expressions)
    headers = [path.name for path in sorted((ROOT / "csrc/include/rmtkernels").glob(f"{name}*.cuh"))]
    includes = "".join(f'#include "rmtkernels/{header}"\n' for header in headers)
    source = f"#include <cstdio>\n{includes}using namespace rmtkernels;\nint main() {{{prints}}}"
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-w", "-DRMT_EMULATE", "-pthread", "-Itests/emulate", *INCLUDES]
        _run(["g++", *flags, "-x", "c++", "-", "-o", f"{folder}/sizes"], source)
        return tuple(map(int, _run([f"{folder}/sizes"]).stdout.split()))


@lru_cache
def _occupancy(lines: str) -> list[int]:
    """Blocks on a multiprocessor, for each line of input to occupancy.cpp; nvcc knows where its header is."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/occupancy"
        _run(["nvcc", "-O0", "-o", program, "tools/occupancy.cpp"])
        return list(map(int, _run([program], lines).stdout.split()))


def _run(command: list[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).splitlines()
        errors = [line for line in lines if "error" in line.lower()]
        raise ToolError("\n".join([f"{Path(command[0]).name} failed:", *(errors or lines)]))
    return done


@lru_cache
def _tool(name: str) -> str:
    """A disassembler: on PATH, or from NVIDIA's pip packages, or from the ones that triton brings."""
    found = shutil.which(name)
    for module, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(module)
        for place in (spec.submodule_search_locations or []) if spec else []:
            path = Path(place) / folder / name
            found = found or (str(path) if path.exists() else None)
    if found is None:
        raise ToolError(f"{name} is missing: pip install nvidia-cuda-{name} nvidia-cuda-nvdisasm")
    return found


def _dumped(budget: dict[str, Any]) -> str:
    """As JSON with a line for each kernel."""
    parts = []
    for part, entries in budget.items():
        lines = ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(facts)}" for kernel, facts in entries.items())
        parts.append(f" {json.dumps(part)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    """Exit status 1 if a kernel is over its budget."""
    parser = argparse.ArgumentParser(prog="python -m tools.machine_code", description=__doc__.split("\n\n")[0])
    parser.add_argument("slices", nargs="*", metavar="SLICE", help="default: all that have kernels")
    parser.add_argument("--architectures", nargs="+", default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument("--write", action="store_true", help="make what is found the budget")
    options = parser.parse_args()
    worse = []
    for name in options.slices or compiled_slices():
        budget = read_budget(name)
        for architecture in options.architectures:
            found = report(name, architecture)
            for kernel, facts in found.items():
                print(architecture, kernel, " ".join(f"{key}={value}" for key, value in facts.items()))
            if options.write:
                budget[architecture] = found
            else:
                worse += [f"{architecture} {line}" for line in over_budget(found, budget.get(architecture, {}))]
        if options.write:
            BUDGETS.mkdir(exist_ok=True)
            (BUDGETS / f"{name}.json").write_text(_dumped(budget))
    print("\n".join(worse))
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
