"""The picture of the house shows the sources' imports and includes, no more and no fewer."""

import ast
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.pictures.house import CALLS, ERRORS, IMPORTS, ROOMS, arrow_id, draw, room_id

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
PACKAGES = ("rmtkernels", "eigentrack", "rmtkd")
EMULATOR = "cuda_on_cpu.h"  # of tests/emulate, in the place of CUDA's own headers
# They gather what others offer, and are no room of their own.
FACADES = ("rmtkernels/__init__.py",)


def rooms(root: Path) -> dict[Path, str]:
    """Which room a source file is in; a file in two rooms counts for neither."""
    found: dict[Path, str] = {}
    for name, room in ROOMS.items():
        for pattern in room.files:
            for file in root.glob(pattern):
                if file.is_file() and file.suffix in (".py", ".h", ".cuh", ".cu", ".cpp"):
                    assert found.setdefault(file, name) == name, f"{file} is in two rooms"
    return {file: name for file, name in found.items() if file.relative_to(root).as_posix() not in FACADES}


def file_of(module: str, root: Path) -> Path | None:
    parts = module.split(".")
    base = (root if parts[0] == "rmtkernels" else root / "python").joinpath(*parts)
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def imported_files(file: Path, root: Path) -> Iterator[Path]:
    """Files of ours that a Python file imports; a name taken from a facade counts as taken from where it is defined."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [(node.module or "", alias.name) for alias in node.names]
        for module, name in names:
            if module.split(".")[0] in PACKAGES:
                yield from _resolved(module, name, root)


def _resolved(module: str, name: str, root: Path) -> Iterator[Path]:
    submodule = file_of(f"{module}.{name}", root) if name else None
    file = submodule or file_of(module, root)
    assert file is not None, (module, name)
    if file.relative_to(root).as_posix() not in FACADES:
        yield file
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            yield from _resolved(node.module or "", name, root)


def included_files(file: Path, root: Path) -> Iterator[Path]:
    for header in INCLUDE.findall(file.read_text(encoding="utf-8")):
        places = (file.parent, root / "csrc", root / "csrc" / "include")
        found = [place / header for place in places if (place / header).is_file()]
        if found or header != EMULATOR:
            yield found[0]


def arrows(root: Path) -> set[tuple[str, str]]:
    where = rooms(root)
    found = set()
    for file, room in where.items():
        read = imported_files if file.suffix == ".py" else included_files
        for other in read(file, root):
            if other == root / ERRORS or where.get(other) == room:
                continue
            # A facade of a package gathers its own rooms: rmtkernels alone has any.
            assert other in where, f"{file} knows {other}, which is in no room"
            found.add((room, where[other]))
    return found


def test_the_arrows_are_the_imports_and_includes(root: Path) -> None:
    assert arrows(root) == IMPORTS


def test_every_source_file_has_a_room(root: Path) -> None:
    where = rooms(root)
    patterns = ("rmtkernels/**/*.py", "python/**/*.py", "csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.cu", "csrc/**/*.cpp")
    sources = {file for pattern in patterns for file in root.glob(pattern)}
    assert len(sources) > 100
    homeless = {file.relative_to(root).as_posix() for file in sources - where.keys()}
    assert homeless == {ERRORS, *FACADES}


@pytest.mark.parametrize(("start", "end"), sorted(CALLS))
def test_a_dashed_arrow_is_an_operator_that_the_other_room_registers(root: Path, start: str, end: str) -> None:
    defined = {
        name
        for pattern in ROOMS[start].files
        for file in root.glob(pattern)
        for name in re.findall(r'^define\(\s*"(\w+)\(', file.read_text(), re.MULTILINE)
    }
    registered = {
        name
        for pattern in ROOMS[end].files
        for file in root.glob(pattern)
        for name in re.findall(r'\.impl\("(\w+)"', file.read_text())
    }
    assert registered and registered <= defined


@pytest.mark.parametrize("fresh", [False, True], ids=["committed", "drawn"])
def test_the_picture_shows_the_table(root: Path, tmp_path: Path, fresh: bool) -> None:
    if fresh:
        draw(tmp_path)
    picture = (tmp_path if fresh else root / "docs/figures") / "house.svg"
    ids = {element.get("id", "") for element in ElementTree.parse(picture).iter()}
    assert {name for name in ids if name.startswith("arrow ")} == {arrow_id(*pair) for pair in IMPORTS | CALLS}
    assert {name for name in ids if name.startswith("room ")} == {room_id(name) for name in ROOMS}


def test_the_page_names_every_room(root: Path) -> None:
    page = (root / "docs/architecture.md").read_text()
    assert re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) == list(ROOMS)
