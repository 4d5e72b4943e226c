"""The unit tests on sanitizer builds of the CPU library: `python -m tools.sanitized_suite memory|thread [PYTEST ...]`.

Builds a copy of the tree in build/sanitized/NAME with GCC's sanitizers, and runs pytest there: all of tests/unit that
calls native CPU code, or what is asked for. "memory" is AddressSanitizer and UBSan, "thread" ThreadSanitizer. Exits
with 1 if a test fails or a sanitizer has said anything, and prints that.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools import slices
from tools.slices import ROOT

COPIED = ("bench", "build_tools", "csrc", "python", "rmtkernels", "tests", "tools")
STARTS_PROCESSES = re.compile(r"^import (subprocess|torch\.multiprocessing)", re.MULTILINE)
FILES = ("setup.py", "pyproject.toml", "README.md")
# ThreadSanitizer sees no fork and no join: they are libgomp's, which is not compiled with it.
FORK_JOIN = "tools/fork_join.cpp"
LOG = "log_path={log}"


@dataclass(frozen=True)
class Sanitizer:
    """GCC's name of it, its library, what it is told, and threads for the operators."""

    checks: str
    library: str
    options: dict[str, str]
    threads: int = 1
    preloaded: list[str] = field(default_factory=list)  # beside the library


SANITIZERS = {
    "memory": Sanitizer(
        "address,undefined",
        "libasan.so",
        # No leaks are looked for: an interpreter ends without freeing much.
        {"ASAN_OPTIONS": f"{LOG}:detect_leaks=0"},
    ),
    "thread": Sanitizer(
        "thread",
        "libtsan.so",
        {"TSAN_OPTIONS": f"{LOG}:suppressions=tools/sanitized_suite.supp"},
        threads=4,
        preloaded=[FORK_JOIN],
    ),
}


def copy(folder: Path, root: Path = ROOT) -> None:
    """The tree as it is now; what was built in the folder before is built again where a source has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
    for name in FILES:
        shutil.copy2(root / name, folder / name)


def build(folder: Path, sanitizer: Sanitizer) -> None:
    """The CPU library, by setup.py, and what is preloaded with it.

    Raises:
        subprocess.CalledProcessError: with what the compiler said as its output.
    """
    flags = f"-g1 -fno-omit-frame-pointer -fsanitize={sanitizer.checks}"
    environment = os.environ | {"CXX": f"g++ {flags}", "RMTKERNELS_CUDA": "off"}
    commands = [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]
    for source in sanitizer.preloaded:
        library = str(Path(source).with_suffix(".so"))
        commands.append(["g++", "-std=c++17", "-shared", "-fPIC", "-O1", source, "-o", library, "-ldl"])
    for command in commands:
        subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )


def run(folder: Path, sanitizer: Sanitizer, arguments: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status, and what the sanitizer said."""
    logs = folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    # The C++ library with them: the sanitizer looks for its exceptions before anything else has loaded it.
    libraries = [_library(sanitizer.library), _library("libstdc++.so.6")]
    libraries += [str(folder / Path(source).with_suffix(".so")) for source in sanitizer.preloaded]
    environment = os.environ | {
        name: text.format(log=logs / name.partition("_")[0]) for name, text in sanitizer.options.items()
    }
    environment.pop("RMTKERNELS_PROVE", None)  # the long forms of these tests would take hours
    environment |= {
        "LD_PRELOAD": ":".join(libraries),
        "OMP_NUM_THREADS": str(sanitizer.threads),
        "OPENBLAS_NUM_THREADS": "1",  # NumPy's, of which the sanitizer knows no fork and no join
        "PYTHONPATH": f"{folder}:{folder / 'python'}",
    }
    # UBSan writes to standard error whatever it is told: pytest must leave it alone.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, stderr=subprocess.PIPE, check=False)
    said = [path.read_text(errors="replace") for path in sorted(logs.iterdir())]
    said += [line for line in done.stderr.decode(errors="replace").splitlines() if "runtime error:" in line]
    return done.returncode, "\n".join(said)


def native_tests(root: Path = ROOT) -> list[str]:
    """Tests of slices, and those of what they share, but for those that want CUDA.

    Those that start processes come first: after all others, under ThreadSanitizer, Linux refuses the fork (ENOMEM).
    """
    names = [*slices.slices(root), "states", "streaming_covariance", "host", "bad_input_states", "dispatch"]
    found = {file for name in names for file in (root / "tests/unit").glob(f"test_{name}*.py")}
    tests = sorted(str(file.relative_to(root)) for file in found if "cuda" not in file.name)
    return sorted(tests, key=lambda test: not STARTS_PROCESSES.search((root / test).read_text(encoding="utf-8")))


def _library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sanitized_suite", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=SANITIZERS)
    parser.add_argument("tests", nargs="*", help="for pytest, instead of all")
    options = parser.parse_args()
    folder, sanitizer = ROOT / "build/sanitized" / options.name, SANITIZERS[options.name]
    copy(folder)
    build(folder, sanitizer)
    status, said = run(folder, sanitizer, options.tests or native_tests())
    print(said)
    return int(status != 0 or bool(said))


if __name__ == "__main__":
    sys.exit(main())
