"""`python -m rmtkernels` and the import itself, where something is missing or broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rmtkernels.report import _covers


def python(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=True)


def test_report_names_every_operator_and_library(root):
    report = json.loads(python(root, "-m", "rmtkernels", "--json").stdout)
    assert set(report["libraries"]) == {"_C", "_C_cuda", "_host"}
    assert report["libraries"]["_C"] == "loaded"
    assert report["cpu"]["instruction set in use"] in report["cpu"]["available here"]
    assert all(backends["reference"] == "available" for backends in report["operators"].values())
    text = python(root, "-m", "rmtkernels").stdout
    for word in (*report["operators"], *report["libraries"], report["versions"]["torch"]):
        assert word in text


def test_report_lists_our_variables(root, monkeypatch):
    monkeypatch.setenv("RMTKERNELS_BACKEND", "reference")
    report = json.loads(python(root, "-m", "rmtkernels", "--json").stdout)
    assert report["environment"]["RMTKERNELS_BACKEND"] == "reference"


def test_report_survives_a_corrupt_library(package_copy):
    (package_copy / "rmtkernels" / "_C.abi3.so").write_bytes(b"no ELF file")
    report = json.loads(python(package_copy, "-m", "rmtkernels", "--json").stdout)
    assert report["folder"] == str(package_copy / "rmtkernels")
    assert report["libraries"]["_C"].startswith("failed: ")
    assert "_C.abi3.so" in report["libraries"]["_C"]
    assert report["libraries"]["_C"] in python(package_copy, "-m", "rmtkernels").stdout


def test_the_source_folder_without_binaries_says_what_to_do(package_copy):
    result = python(package_copy, "-c", "import rmtkernels")
    assert "pip install -e ." in result.stderr
    assert "not built" in python(package_copy, "-W", "ignore", "-m", "rmtkernels").stdout


@pytest.mark.parametrize(
    ("architecture", "covered", "not_covered"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("80", [(8, 0), (8, 6)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.0+PTX", [(8, 0), (8, 9), (9, 0), (12, 1)], [(7, 5)]),
        ("120+PTX", [(12, 0), (12, 1), (13, 0)], [(10, 0), (11, 0)]),
        ("9.0a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(9, 1), (10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("10.3f", [(10, 3)], [(10, 0), (12, 0)]),
        ("10.0f+PTX", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("nonsense", [], [(8, 0)]),
    ],
)
def test_devices_an_architecture_covers(architecture, covered, not_covered):
    assert [device for device in covered + not_covered if _covers([architecture], *device)] == covered


def test_one_of_several_architectures_is_enough():
    assert _covers(["9.0a", "8.0"], 8, 6)
    assert not _covers([], 8, 6)
