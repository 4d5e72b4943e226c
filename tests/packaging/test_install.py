"""pip in its usual forms, with and without torch and CUDA."""

import json
import re
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

LOAD = """
import json, pathlib, rmtkernels, rmtkernels._native, eigentrack
folder = pathlib.Path(rmtkernels.__file__).parent
info = json.loads((folder / "_build_info.json").read_text())
print(json.dumps({"folder": str(folder), "info": info, "status": rmtkernels._native.STATUS}))
"""
BUILD_SDIST = """
import sys
sys.path.insert(0, "build_tools")
import rmtkernels_build_backend
rmtkernels_build_backend.build_sdist(sys.argv[1])
"""
SENTENCE = 'rmtkernels needs PyTorch installed first: pip install "torch>=2.10"'


def installed(environment, cwd: Path) -> dict:
    """What a program that imports the installed package sees."""
    return json.loads(environment.run("-W", "error", "-c", LOAD, cwd=cwd))


@pytest.mark.network
@pytest.mark.slow
def test_isolated_install_uses_the_torch_that_is_there(environment, tree, tmp_path):
    result = environment.pip("install", "--verbose", str(tree), RMTKERNELS_CUDA="off")
    assert result.returncode == 0, result.stdout
    fetched = re.findall(r"^\s*(?:Collecting|Downloading|Using cached|Processing) (\S+)", result.stdout, re.MULTILINE)
    assert [name for name in fetched if re.match(r"(.*/)?(torch|nvidia|triton)\b", name)] == []
    assert "Requirement already satisfied: torch" in result.stdout
    seen = installed(environment, tmp_path)
    assert Path(seen["folder"]).is_relative_to(environment.site_packages)
    assert seen["status"]["_C"] == "loaded"
    assert seen["info"]["torch"] == metadata.version("torch")


@pytest.mark.network
def test_isolated_install_without_torch_says_what_to_type(empty_environment, tree):
    result = empty_environment.pip("install", "--no-deps", str(tree))
    assert result.returncode != 0
    assert SENTENCE in result.stdout
    assert "RMTKERNELS_TORCH_PATH" in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize("editable_form", [[], ["--editable"]])
def test_install_without_torch_or_isolation_says_what_to_type(empty_environment, tree, editable_form):
    empty_environment.borrow("torch")
    result = empty_environment.pip("install", "--no-deps", "--no-build-isolation", *editable_form, str(tree))
    assert result.returncode != 0
    assert SENTENCE in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RMTKERNELS_CUDA": "banana"}, "RMTKERNELS_CUDA=banana is not known: use auto, on or off"),
        (
            {"RMTKERNELS_CUDA": "on", "CUDA_HOME": "/nowhere"},
            "RMTKERNELS_CUDA=on, but there is no bin/nvcc in CUDA_HOME=/nowhere",
        ),
        ({"CXX": "no-such-compiler"}, "needs a C++17 compiler and finds no no-such-compiler"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS=many is no positive number"),
    ],
)
def test_what_cannot_be_built_stops_with_a_sentence(environment, tree, variables, sentence):
    result = environment.pip("install", "--no-deps", "--no-build-isolation", str(tree), **variables)
    assert result.returncode != 0
    assert sentence in result.stdout
    assert "Traceback" not in result.stdout


def test_a_failing_nvcc_leaves_a_cpu_package_that_says_so(environment, tree, tmp_path, broken_toolkit):
    result = environment.pip(
        "install", "--verbose", "--no-deps", "--no-build-isolation", str(tree), CUDA_HOME=str(broken_toolkit)
    )
    assert result.returncode == 0, result.stdout
    assert "| rmtkernels was built WITHOUT CUDA." in result.stdout
    seen = installed(environment, tmp_path)
    assert seen["status"]["_C"] == "loaded"
    assert seen["status"]["_C_cuda"] == "not built"
    assert seen["info"]["cuda"]["status"] == "failed"
    assert "the compiler is out of order" in seen["info"]["cuda"]["reason"]
    assert "the compiler is out of order" in environment.run("-m", "rmtkernels", cwd=tmp_path)


def test_a_failing_nvcc_stops_where_cuda_was_asked_for(environment, tree, broken_toolkit):
    variables = {"CUDA_HOME": str(broken_toolkit), "RMTKERNELS_CUDA": "on"}
    result = environment.pip("install", "--no-deps", "--no-build-isolation", str(tree), **variables)
    assert result.returncode != 0
    assert "RMTKERNELS_CUDA=on, but nvcc error : the compiler is out of order" in result.stdout
    assert "Traceback" not in result.stdout


def test_editable_install_runs_from_the_source_folder(editable, tree, tmp_path):
    for cwd in (tree, tmp_path):
        seen = installed(editable, cwd)
        assert Path(seen["folder"]) == tree / "rmtkernels"
        assert seen["status"]["_C"] == "loaded"
    assert not (tree / "rmtkernels" / "_stale.abi3.so").exists()


def test_a_second_build_compiles_nothing(editable, tree):
    result = editable.pip("install", "--verbose", "--no-deps", "--no-build-isolation", "--editable", str(tree))
    assert result.returncode == 0, result.stdout
    assert "ninja: no work to do." in result.stdout
    assert not re.search(r"^\s*\[\d+/\d+\]", result.stdout, re.MULTILINE)


def test_wheel_holds_the_package_and_nothing_else(environment, tree, tmp_path):
    result = environment.pip(
        "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tree), RMTKERNELS_CUDA="off"
    )
    assert result.returncode == 0, result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    # _host is bound to one Python, so the wheel must not claim abi3
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"rmtkernels-0\.1\.0-{tag}-{tag}-linux_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"rmtkernels/py.typed", "eigentrack/py.typed", "rmtkd/py.typed", "rmtkernels/_C.abi3.so"} <= names
    assert {f"eigentrack/page/page.{kind}" for kind in ("html", "css", "js")} <= names
    assert "rmtkernels/_build_info.json" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {path.relative_to(tree).as_posix() for path in (tree / "rmtkernels").rglob("*.py")}
    sources |= {path.relative_to(tree / "python").as_posix() for path in (tree / "python").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    expected = re.compile(
        r"(rmtkernels|eigentrack|rmtkd)/.*(\.py|\.typed|\.so|_build_info\.json)|rmtkernels-0\.1\.0\.dist-info/.*"
        r"|eigentrack/detectors/smollm2-135m/(README\.md|detector\.safetensors)"
        r"|eigentrack/page/page\.(html|css|js)"
    )
    assert [name for name in names if not expected.fullmatch(name)] == []
    assert wheel.stat().st_size < 20e6


def test_sdist_can_be_built_from(environment, tree, tmp_path):
    environment.run("-c", BUILD_SDIST, str(tmp_path), cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    result = environment.pip("install", "--no-deps", "--no-build-isolation", str(archive), RMTKERNELS_CUDA="off")
    assert result.returncode == 0, result.stdout
    assert installed(environment, tmp_path)["status"]["_C"] == "loaded"
