"""The house: its rooms and who may know whom. docs/architecture.md shows the picture; tests/packaging/test_house.py
holds it against the imports and includes of the sources."""

from dataclasses import dataclass
from pathlib import Path

from tools.pictures.drawing import BLUE, FOLDER, GREEN, ORANGE, canvas


@dataclass(frozen=True)
class Room:
    files: tuple[str, ...]  # patterns from the root of the repository
    x: float
    y: float
    width: float
    text: str  # what it is for
    colour: str


HEIGHT = 5.5
ROOMS = {
    "eigentrack": Room(("python/eigentrack/**/*.py",), 6, 4, 26, "watches a model while it generates", BLUE),
    "rmtkd": Room(("python/rmtkd/**/*.py",), 60, 4, 26, "makes a network smaller", BLUE),
    "states": Room(
        ("rmtkernels/states.py", "rmtkernels/streaming_covariance.py"),
        33,
        16,
        28,
        "buffers and bookkeeping",
        GREEN,
    ),
    "ops": Room(("rmtkernels/ops/*.py",), 27, 27, 38, "contracts, checks, schemas, fake kernels", GREEN),
    "triton": Room(("rmtkernels/triton/*.py",), 2, 38, 21, "Triton kernels", GREEN),
    "dispatch": Room(
        ("rmtkernels/dispatch.py", "rmtkernels/_*.py", "rmtkernels/report.py", "rmtkernels/__main__.py"),
        30.5,
        38,
        18.5,
        "which backend runs",
        GREEN,
    ),
    "reference": Room(("rmtkernels/reference/*.py",), 54, 38, 17, "float64 oracles", GREEN),
    "laws": Room(("rmtkernels/laws/*.py",), 76, 38, 19, "laws of random matrices", GREEN),
    "csrc/cuda": Room(("csrc/cuda/*",), 2, 51, 27, "checks, launches: _C_cuda", ORANGE),
    "csrc/cpu": Room(("csrc/cpu/*",), 38, 51, 28, "checks, threads, SIMD: _C", ORANGE),
    "csrc/host": Room(("csrc/host/*",), 70, 51, 27, "numerics on NumPy arrays: _host", ORANGE),
    "csrc/tensor_check.h": Room(("csrc/tensor_check.h",), 2, 62, 27, "what a valid call is", ORANGE),
    "csrc/include": Room(
        ("csrc/include/rmtkernels/*",),
        37,
        62,
        58,
        "numerics (.h), device kernels (.cuh); no torch",
        ORANGE,
    ),
}
ERRORS = "rmtkernels/errors.py"  # every room may import it: no arrows
# Who imports or includes whom.
IMPORTS = {
    ("eigentrack", "states"),
    ("eigentrack", "ops"),
    ("rmtkd", "states"),
    ("rmtkd", "ops"),
    ("rmtkd", "laws"),
    ("states", "ops"),
    ("ops", "triton"),
    ("triton", "ops"),
    ("ops", "dispatch"),
    ("triton", "dispatch"),
    ("dispatch", "triton"),
    ("ops", "reference"),
    ("ops", "laws"),
    ("reference", "laws"),
    ("csrc/cuda", "csrc/tensor_check.h"),
    ("csrc/cpu", "csrc/tensor_check.h"),
    ("csrc/cuda", "csrc/include"),
    ("csrc/cpu", "csrc/include"),
    ("csrc/host", "csrc/include"),
    ("csrc/tensor_check.h", "csrc/include"),
}
# Whose operators whom PyTorch's dispatcher calls: nobody imports anybody.
CALLS = {("ops", "csrc/cuda"), ("ops", "csrc/cpu")}


def arrow_id(start: str, end: str) -> str:
    return f"arrow {start} > {end}"


def room_id(name: str) -> str:
    return f"room {name}"


def draw(folder: Path = FOLDER) -> None:
    with canvas("house", 98, 72, folder) as c:
        for y, text in ((2, "python/"), (14, "rmtkernels/"), (49, "csrc/")):
            c.text(1, y, text, align="left", size=10)
        for name, room in ROOMS.items():
            c.box(room.x, room.y, room.width, HEIGHT, f"{name}\n{room.text}", room.colour, gid=room_id(name))
        for start, end in sorted(IMPORTS):
            c.arrow(*_ends(start, end, (end, start) in IMPORTS), gid=arrow_id(start, end))
        for start, end in sorted(CALLS):
            c.arrow(*_ends(start, end, False), dashed=True, gid=arrow_id(start, end))
        c.text(
            2, 70, "solid: imports or includes    dashed: called by PyTorch's dispatcher    "
            "every room of rmtkernels/ and python/ may import errors.py", align="left"
        )  # fmt: skip


def _ends(start: str, end: str, mutual: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """From border to border, towards each other; of two opposite arrows each keeps to its side."""
    a, b = ROOMS[start], ROOMS[end]
    aside = 0.9 if mutual else 0.0
    if a.y == b.y:
        y = a.y + HEIGHT / 2 + (aside if a.x < b.x else -aside)
        return ((a.x + a.width, y), (b.x, y)) if a.x < b.x else ((a.x, y), (b.x + b.width, y))
    shared = max(a.x, b.x) + 1.5, min(a.x + a.width, b.x + b.width) - 1.5
    if shared[0] < shared[1]:
        x = sum(shared) / 2
        start_x = end_x = x
    else:
        start_x = min(max(_middle(b), a.x + 2), a.x + a.width - 2)
        end_x = min(max(_middle(a), b.x + 2), b.x + b.width - 2)
    aside = aside if a.y < b.y else -aside
    if a.y < b.y:
        return (start_x + aside, a.y + HEIGHT), (end_x + aside, b.y)
    return (start_x + aside, a.y), (end_x + aside, b.y + HEIGHT)


def _middle(room: Room) -> float:
    return room.x + room.width / 2
