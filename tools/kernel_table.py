"""README's table of what has been proved of each kernel, from proofs.json and the GPUs' results, and from nothing else:
`python -m tools.kernel_table [--write README.md]`."""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools import slices
from tools.prove import read_record
from tools.slices import ROOT, hash_of, kernel_files

BACKENDS = {"cpu": "CPU", "cuda": "CUDA", "triton": "Triton"}
BEGIN, END = "<!-- begin: what has been proved (python -m tools.kernel_table --write README.md) -->", "<!-- end -->"


def has_kernel(operator: str, backend: str, root: Path = ROOT) -> bool:
    """Whether the sources register a kernel: in C++ by impl("name", …), in Triton as a key of FORMS."""
    if backend == "triton":
        file = root / "rmtkernels/triton/__init__.py"
        return file.exists() and f'"{operator}": ' in file.read_text()
    return any(f'impl("{operator}"' in file.read_text() for file in (root / f"csrc/{backend}").glob("*.cpp"))


def gpu_results(root: Path = ROOT) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((root / "bench/results").glob("gpu-*.json"))]


def on_gpu(name: str, operator: str, backend: str, result: dict[str, Any], root: Path = ROOT) -> str:
    """What of rung 9 a GPU's result holds for an operator, "" if nothing: tests that passed and none that failed,
    all sanitizers silent over its call, and a right and timed bench."""
    stages, done = result["stages"], []
    counts = stages["tests"].get("counts", {}).get(name, {}).get(backend, {"passed": 0, "failed": 0})
    if counts["passed"] and not counts["failed"]:
        done.append(f"{counts['passed']} tests")
    tools = stages["sanitizers"].get("tools", {}).values()
    if tools and all(tool["status"] == "passed" and _called(operator, backend, tool["called"]) for tool in tools):
        done.append("sanitizers")
    times = [case["seconds"] for work, case in stages["bench"].get("cases", {}).items() if work.startswith(f"{name}.")]
    if any(("ours" if backend == "cuda" else f"ours, {backend}") in seconds for seconds in times):
        done.append("bench")
    if not done:
        return ""
    stale = result["kernels"].get(name, {}).get(backend) != hash_of(kernel_files(name, backend, root), root)
    version = "; an earlier version" if stale else ""
    return f"9 ({', '.join(done)}; {result['device']}, {result['date']}{version})"


def _called(operator: str, backend: str, forms: Iterable[str]) -> bool:
    """Whether the operator's form for the backend is among those called: Triton's is an operator of its own."""
    if backend == "triton":
        return any(form.startswith(operator.rstrip("_")) and "triton" in form for form in forms)
    return operator in forms


def cell(name: str, operator: str, backend: str, root: Path = ROOT) -> str:
    if not has_kernel(operator, backend, root):
        return "none yet"
    proved = read_record(root).get(name, {"rungs": {}, "date": ""})
    rungs = ", ".join(proved["rungs"].get(backend, {}))
    text = f"{rungs} ({proved['date']})" if rungs else "not proved yet"
    if backend == "cpu":
        return text
    ran = [words for result in gpu_results(root) if (words := on_gpu(name, operator, backend, result, root))]
    return "; ".join([text, *(ran or ["no `make gpu-check` yet"])])


def table(root: Path = ROOT) -> str:
    lines = ["| operator | " + " | ".join(BACKENDS.values()) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    for name in slices.slices(root):
        for operator in slices.operators(name, root):
            cells = [cell(name, operator, backend, root) for backend in BACKENDS]
            if set(cells) != {"none yet"}:
                lines.append(f"| `{operator}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(page: str, root: Path = ROOT) -> str:
    """The page with the table made anew; KeyError if it has no place for it."""
    pattern = rf"{re.escape(BEGIN)}\n.*?{END}"
    if not re.search(pattern, page, re.DOTALL):
        raise KeyError("the page has no place for the table")
    return re.sub(pattern, lambda _: f"{BEGIN}\n{table(root)}\n{END}", page, count=1, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_table", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.write is None:
        print(table())
    else:
        options.write.write_text(filled(options.write.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
