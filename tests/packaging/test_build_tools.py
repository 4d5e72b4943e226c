"""How the build finds torch and nvcc, without building."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def torch_location(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(root / "build_tools")
    return importlib.import_module("torch_location")


@pytest.fixture
def cuda_toolkit(root: Path, monkeypatch: pytest.MonkeyPatch, broken_toolkit: Path) -> ModuleType:
    monkeypatch.syspath_prepend(root / "build_tools")
    monkeypatch.setenv("CUDA_HOME", str(broken_toolkit))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return importlib.import_module("cuda_toolkit")


def fake_torch(site_packages: Path, version: str) -> Path:
    package = site_packages / "torch"
    (package / "include").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a build must not import torch')\n")
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    return package


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.0a0+git1234567", "3.0"])
def test_torch_path_names_the_torch_to_build_against(torch_location, tmp_path, monkeypatch, version):
    package = fake_torch(tmp_path, version)
    monkeypatch.setenv("RMTKERNELS_TORCH_PATH", str(tmp_path))
    found = torch_location.find_torch()
    assert (found.root, found.version) == (package, version)


def test_an_older_torch_is_refused(torch_location, tmp_path, monkeypatch):
    fake_torch(tmp_path, "2.9.1+cu128")
    monkeypatch.setenv("RMTKERNELS_TORCH_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"needs PyTorch 2\.10 or newer, .* is 2\.9\.1\+cu128: pip install"):
        torch_location.find_torch()


def test_a_torch_path_without_torch_is_refused(torch_location, tmp_path, monkeypatch):
    monkeypatch.setenv("RMTKERNELS_TORCH_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="holds no torch"):
        torch_location.find_torch()


def test_torch_is_found_but_not_imported(torch_location, tmp_path, monkeypatch):
    monkeypatch.delenv("RMTKERNELS_TORCH_PATH", raising=False)
    monkeypatch.syspath_prepend(fake_torch(tmp_path, "2.12.0").parent)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert torch_location.find_torch().version == "2.12.0"
    assert "torch" not in sys.modules


def test_default_architectures_are_those_nvcc_knows_with_ptx_for_the_newest(cuda_toolkit, tmp_path):
    toolkit = cuda_toolkit.find_toolkit(tmp_path)
    assert toolkit.version == "13.0.99"
    assert toolkit.architectures == ("8.0", "9.0+PTX")
    assert toolkit.gencode() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(
    ("asked", "architectures"),
    [
        ("9.0", ("9.0",)),
        ("8.0 9.0a", ("8.0", "9.0a")),
        ("7.0;8.0+PTX", ("8.0+PTX",)),
        ("80,sm_90a;compute_90", ("8.0", "9.0a", "9.0")),
        ("8.0;80;sm_80", ("8.0",)),
        ("8.0;9.0;8.0+PTX;8.0", ("8.0+PTX", "9.0")),
        ("Ampere;8.0", ("8.0",)),
        (" Hopper; ", ("9.0+PTX",)),
        ("Ampere Hopper", ("8.0", "9.0+PTX")),
    ],
)
def test_torch_cuda_arch_list_is_honoured(cuda_toolkit, tmp_path, monkeypatch, asked, architectures):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert cuda_toolkit.find_toolkit(tmp_path).architectures == architectures


def test_every_name_of_torch_is_spelled_out(cuda_toolkit):
    named = cuda_toolkit._split("Turing;Ampere;Ada;Hopper;Blackwell")
    assert named == ("7.5+PTX", "8.0", "8.6+PTX", "8.9+PTX", "9.0+PTX", "10.0", "12.0+PTX")


@pytest.mark.parametrize("unknown", ["7.0", "nonsense", "sm_120"])
def test_an_unknown_architecture_is_left_out_with_a_note(cuda_toolkit, tmp_path, monkeypatch, capsys, unknown):
    monkeypatch.delenv("RMTKERNELS_CUDA", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"{unknown};8.0")
    assert cuda_toolkit.find_toolkit(tmp_path).architectures == ("8.0",)
    note = unknown if unknown != "sm_120" else "12.0"
    assert capsys.readouterr().err.endswith(f"nvcc does not know them: {note}\n")


def test_an_unknown_architecture_stops_a_build_that_insists_on_cuda(cuda_toolkit, tmp_path, monkeypatch):
    native_command = importlib.import_module("native_command")
    monkeypatch.setenv("RMTKERNELS_CUDA", "on")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Blackwell")
    monkeypatch.setattr(native_command, "cuda_kernels", lambda: ["a kernel"])
    torch = SimpleNamespace(root=tmp_path / "torch")
    with pytest.raises(SystemExit) as caught:
        native_command._plan_cuda(torch)
    stopped = str(caught.value)
    assert stopped.startswith("rmtkernels: RMTKERNELS_CUDA=on, but ") and "\n" not in stopped
    assert stopped.endswith("nvcc does not know 10.0, 12.0+PTX of TORCH_CUDA_ARCH_LIST")


def test_our_own_list_stops_nobody(cuda_toolkit, tmp_path, monkeypatch):
    monkeypatch.setenv("RMTKERNELS_CUDA", "on")
    assert cuda_toolkit.find_toolkit(tmp_path).architectures == ("8.0", "9.0+PTX")


def test_no_known_architecture_is_a_failure(cuda_toolkit, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.0")
    with pytest.raises(cuda_toolkit.NoCudaError, match="knows none of the architectures") as caught:
        cuda_toolkit.find_toolkit(tmp_path)
    assert caught.value.status == "failed"


def test_nvcc_of_the_package_registry_is_found(cuda_toolkit, tmp_path, monkeypatch, broken_toolkit):
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(cuda_toolkit.shutil, "which", lambda name: None)
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "cu13").symlink_to(broken_toolkit)
    assert cuda_toolkit.find_toolkit(tmp_path).nvcc == tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
