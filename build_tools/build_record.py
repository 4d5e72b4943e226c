"""What a build has made, for the person in front of it and, as rmtkernels/_build_info.json, for the running package."""

from __future__ import annotations

import json
import platform
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE_NAME = "_build_info.json"


@dataclass
class CudaRecord:
    """`status` is on, off or failed; a reason goes with the last two."""

    status: str
    reason: str = ""
    nvcc: str = ""
    architectures: tuple[str, ...] = ()


@dataclass
class BuildRecord:
    """The whole story of one build."""

    version: str
    compiler: str
    torch: str
    instruction_sets: list[str]
    cuda: CudaRecord
    modules: list[str]
    python: str = field(default_factory=platform.python_version)
    machine: str = field(default_factory=platform.machine)

    def tell(self) -> None:
        """One line that says what was built, and a box if CUDA was wanted and failed."""
        cuda = f"CUDA {self.cuda.status} ({self.cuda.reason})"
        if self.cuda.status == "on":
            cuda = f"CUDA {self.cuda.nvcc} for {' '.join(self.cuda.architectures)}"
        print(
            f"rmtkernels {self.version}: built {', '.join(self.modules)} with {self.compiler} for torch {self.torch}; "
            f"CPU {' '.join(self.instruction_sets)}; {cuda}"
        )
        if self.cuda.status == "failed":
            _shout(
                f"rmtkernels was built WITHOUT CUDA. {self.cuda.reason}. The CPU operators work. RMTKERNELS_CUDA=off "
                "builds so without this message, RMTKERNELS_CUDA=on stops instead."
            )

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def _shout(text: str) -> None:
    """A box on stderr, for what must not scroll by unread."""
    lines = textwrap.wrap(text, 100)
    width = max(map(len, lines))
    edge = "+" + "-" * (width + 2) + "+"
    print(edge, *(f"| {line.ljust(width)} |" for line in lines), edge, sep="\n", file=sys.stderr, flush=True)
