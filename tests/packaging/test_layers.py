"""Who may know whom: python/ -> rmtkernels/ -> csrc/, never back, and kernels that know nothing of torch."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2)/|Python\.h|pybind11/")


def imported_modules(file: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def included(file: Path, root: Path, seen: set[Path]) -> Iterator[str]:
    """Names of all headers that a file draws in, through our own headers too."""
    for name in INCLUDE.findall(file.read_text(encoding="utf-8")):
        yield name
        for folder in (file.parent, root / "csrc", root / "csrc" / "include"):
            header = folder / name
            if header.is_file() and header not in seen:
                seen.add(header)
                yield from included(header, root, seen)


def test_operators_do_not_know_models(root):
    files = sorted((root / "rmtkernels").rglob("*.py"))
    assert len(files) > 5
    for file in files:
        tops = {name.partition(".")[0] for name in imported_modules(file)}
        assert not tops & {"eigentrack", "rmtkd", "transformers", "accelerate"}, file
        if "triton" not in file.relative_to(root / "rmtkernels").parts:
            assert "triton" not in tops, file


def test_operators_import_torch_numpy_and_scipy_alone(root):
    known = {"torch", "numpy", "scipy", "triton", "rmtkernels"}
    for file in sorted((root / "rmtkernels").rglob("*.py")):
        foreign = {name.partition(".")[0] for name in imported_modules(file)} - known
        assert not foreign - sys.stdlib_module_names, file


@pytest.mark.parametrize(
    "pattern", ["csrc/include/**/*.h", "csrc/include/**/*.cuh", "csrc/cuda/*.cu", "csrc/cpu/*_kernels.cpp"]
)
def test_kernels_do_not_know_torch(root, pattern):
    files = sorted(root.glob(pattern))
    assert files, pattern
    for file in files:
        assert [name for name in included(file, root, set()) if TORCH_HEADER.match(name)] == [], file
