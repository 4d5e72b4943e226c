"""A copy of the source tree to build in, and bare environments to install it into."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a build reads. build/native goes along: its paths are relative and times are kept, so objects are not made twice.
SOURCES = ("build_tools", "csrc", "python", "rmtkernels", "build/native")
FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "_*.so", "_build_info.json")


class Environment:
    """A virtual environment without pip of its own: ours installs into it."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.site_packages = next(folder.glob("lib/python*/site-packages"))

    def borrow(self, *left_out: str) -> None:
        """Links every package of the running environment but ours and these."""
        for entry in _running_site_packages().iterdir():
            if not entry.name.startswith(("rmtkernels", "__editable__", "pip", *left_out)):
                (self.site_packages / entry.name).symlink_to(entry)

    def pip(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs pip on this environment; both streams are in stdout. Borrowed packages have their programs on PATH."""
        variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        return subprocess.run(
            command, env=clean_variables(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, cwd: Path) -> str:
        command = [str(self.python), *arguments]
        return subprocess.run(
            command, cwd=cwd, env=clean_variables(), check=True, stdout=subprocess.PIPE, text=True
        ).stdout


def clean_variables(**variables: str) -> dict[str, str]:
    """The environment without what would steer a build or an import, and with `variables`."""
    steering = ("RMTKERNELS_", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH", "MAKEFLAGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    return {**kept, **variables}


def copy_tree(destination: Path) -> Path:
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, destination / name, ignore=LEFT_OUT)
    for name in FILES:
        shutil.copy2(ROOT / name, destination / name)
    return destination


def _running_site_packages() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, to build in. Tests share its object files."""
    return copy_tree(tmp_path_factory.mktemp("source"))


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A folder that holds rmtkernels/ as it lies in the repository, without anything compiled."""
    shutil.copytree(ROOT / "rmtkernels", tmp_path / "rmtkernels", ignore=LEFT_OUT)
    return tmp_path


@pytest.fixture
def empty_environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture
def environment(empty_environment: Environment) -> Environment:
    """Everything but ours is installed there."""
    empty_environment.borrow()
    return empty_environment


@pytest.fixture(scope="session")
def editable(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The tree after `pip install --editable --no-build-isolation`, with CUDA as the machine has it."""
    environment = Environment(tmp_path_factory.mktemp("editable"))
    environment.borrow()
    (tree / "rmtkernels" / "_stale.abi3.so").touch()
    result = environment.pip("install", "--no-deps", "--no-build-isolation", "--editable", str(tree))
    assert result.returncode == 0, result.stdout
    return environment


@pytest.fixture
def broken_toolkit(tmp_path: Path) -> Path:
    """A CUDA_HOME whose nvcc answers questions and cannot compile."""
    home = tmp_path / "broken-cuda"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart_static.a").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --version) echo 'Cuda compilation tools, release 13.0, V13.0.99';;\n"
        "  --list-gpu-arch) echo compute_80; echo compute_90;;\n"
        "  *) echo 'nvcc error : the compiler is out of order' >&2; exit 1;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return home
