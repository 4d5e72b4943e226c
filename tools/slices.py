"""The slices of the house, the files that each depends on, and a hash of them.

A slice is a name with a float64 oracle in rmtkernels/reference. A file belongs to it by its own name, as
csrc/cuda/spectrum.cu or tests/unit/test_spectrum_noise.py do; what those include or import follows. Files that all
operators share (dispatch, errors, the tests' helpers) are left out: every `make test` tests them in full.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".h", ".cuh", ".cpp", ".cu", ".json")
NUMERICS = ("ops", "reference", "triton", "laws")
KERNEL_TESTS = ("unit", "compile", "emulate", "sanitize", "triton")
# Where these change, every kernel is compiled differently, or judged differently.
BUILD = ("build_tools/native_modules.py", "build_tools/cuda_toolkit.py", "tools/machine_code.py", "tools/occupancy.cpp")
# They gather what the bindings of all slices share, and bindings are tested in full by every `make test`: what these
# include is not followed.
GATHERING = ("csrc/cpu/kernels.h", "csrc/tensor_check.h")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
OPERATOR = re.compile(r'^define\(\s*"(\w+)\(', re.MULTILINE)


def slices(root: Path = ROOT) -> list[str]:
    return sorted(path.stem for path in (root / "rmtkernels/reference").glob("[!_]*.py"))


def operators(name: str, root: Path = ROOT) -> list[str]:
    """Schemas that the slice defines, in their order."""
    files = [root / f"rmtkernels/ops/{name}.py", *sorted((root / "rmtkernels/ops").glob(f"{name}_*.py"))]
    return [operator for file in files if file.exists() for operator in OPERATOR.findall(file.read_text())]


def kernel_files(name: str, backend: str, root: Path = ROOT) -> set[Path]:
    """What the kernels of a slice are made of: backend "cpu", "cuda" or "triton". Empty where there is none."""
    if backend == "triton":
        return _with_imports(_named(root, name, ["rmtkernels/triton"]), root)
    files = _named(root, name, [f"csrc/{backend}"])
    if not files:
        return set()
    shared = [root / f"csrc/{backend}/module.cpp", *(root / path for path in BUILD[:2])]
    return _with_includes([*files, *_named(root, name, ["csrc/include/rmtkernels"]), *shared], root)


def programs_of(name: str, root: Path = ROOT) -> set[Path]:
    """Test programs of a slice: those with its name, and of the shared ones those that name it or name no slice."""
    words = {slice_name: _words(slice_name, root) for slice_name in slices(root)}
    found = set()
    for file in _files(root, [f"tests/{folder}" for folder in KERNEL_TESTS]):
        owners = [other for other in words if _belongs(file, other)]
        if not owners and file.parent.name != "unit" and file.suffix in (".py", ".cpp", ".cu"):
            text = file.read_text()
            owners = [other for other, pattern in words.items() if pattern.search(text)] or list(words)
        if name in owners:
            found.add(file)
    return found


def files_of(name: str, root: Path = ROOT) -> set[Path]:
    """Everything that the proofs of a slice depend on."""
    code = _named(root, name, ["csrc", *(f"rmtkernels/{folder}" for folder in NUMERICS)])
    build = [root / path for path in BUILD]
    return _with_imports(_with_includes([*code, *programs_of(name, root), *build], root), root)


def hash_of(files: Iterable[Path], root: Path = ROOT) -> str:
    """Of names and contents, the same on every machine."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def keywords(name: str, root: Path = ROOT) -> str:
    """pytest's -k for the tests of a slice, among shared ones too."""
    return " or ".join(dict.fromkeys([name, *operators(name, root)]))


def _words(name: str, root: Path) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join([name, *operators(name, root)])})\b")


def _belongs(file: Path, name: str) -> bool:
    stem = file.name.partition(".")[0].removeprefix("test_").removeprefix("check_")
    return stem == name or stem.startswith(f"{name}_")


def _files(root: Path, folders: Iterable[str]) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                yield path


def _named(root: Path, name: str, folders: Iterable[str]) -> list[Path]:
    return [file for file in _files(root, folders) if _belongs(file, name)]


def _with_includes(files: Iterable[Path], root: Path) -> set[Path]:
    found, pending = set(), list(files)
    while pending:
        file = pending.pop()
        if file in found:
            continue
        found.add(file)
        if file.suffix not in (".h", ".cuh", ".cpp", ".cu") or file.relative_to(root).as_posix() in GATHERING:
            continue
        for header in INCLUDE.findall(file.read_text()):
            places = (file.parent, root / "csrc", root / "csrc/include", root / "tests/emulate")
            pending += [path.resolve() for place in places if (path := place / header).is_file()][:1]
    return found


def _with_imports(files: Iterable[Path], root: Path) -> set[Path]:
    """Follows modules of NUMERICS, not the packages that gather them."""
    found, pending = set(), list(files)
    while pending:
        file = pending.pop()
        if file in found:
            continue
        found.add(file)
        if file.suffix != ".py" or "rmtkernels" not in file.relative_to(root).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level or not (node.module or "").startswith("rmtkernels."):
                continue
            module = (node.module or "").split(".")
            names = [[*module, alias.name] for alias in node.names]
            for parts in (module, *names):
                path = root.joinpath(*parts).with_suffix(".py")
                if parts[1] in NUMERICS and path.is_file():
                    pending.append(path)
    return found
