"""Where the torch to build against lies. It is read, never imported: importing takes seconds and may fail."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

OLDEST = "2.10"
MISSING = (
    f'rmtkernels needs PyTorch installed first: pip install "torch>={OLDEST}" (if it is installed and the build runs '
    "in an environment of its own, as uv and python -m build do: pass --no-build-isolation, or set "
    "RMTKERNELS_TORCH_PATH to the site-packages folder that holds torch)"
)
_ASK = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"


@dataclass(frozen=True)
class TorchInstall:
    """A torch package on disk."""

    root: Path
    version: str

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


def find_torch() -> TorchInstall:
    """The caller's torch, or an exit with one sentence that says what to type."""
    root = _from_variable() or _from_this_process() or _from_calling_environment()
    if root is None:
        sys.exit(MISSING)
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", (root / "version.py").read_text(), re.MULTILINE)
    if match is None:
        sys.exit(f"rmtkernels cannot read the version of the PyTorch in {root}: reinstall it")
    if Version(match.group(1)).release < Version(OLDEST).release:
        sys.exit(
            f'rmtkernels needs PyTorch {OLDEST} or newer, {root} is {match.group(1)}: pip install "torch>={OLDEST}"'
        )
    return TorchInstall(root, match.group(1))


def _from_variable() -> Path | None:
    value = os.environ.get("RMTKERNELS_TORCH_PATH")
    if not value:
        return None
    root = _package(Path(value) / "torch" / "__init__.py")
    if root is None:
        sys.exit(f"RMTKERNELS_TORCH_PATH={value} holds no torch: name the site-packages folder that does")
    return root


def _from_this_process() -> Path | None:
    """Finds it when the build is not isolated."""
    spec = importlib.util.find_spec("torch")
    return _package(Path(spec.origin)) if spec and spec.origin else None


def _from_calling_environment() -> Path | None:
    """Finds it in pip's isolated build: the same interpreter, with site-packages hidden by these two variables."""
    hidden_by = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden_by}
    answer = subprocess.run(
        [sys.executable, "-c", _ASK], env=environment, cwd=sys.prefix, capture_output=True, text=True, check=False
    )
    origin = answer.stdout.strip()
    return _package(Path(origin)) if origin else None


def _package(init_file: Path) -> Path | None:
    """The folder of a whole torch; a namespace left behind by an uninstall has no headers."""
    root = init_file.resolve().parent
    return root if (root / "version.py").is_file() and (root / "include").is_dir() else None
