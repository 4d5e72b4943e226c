"""tools/gpu_check.py without a GPU: it runs to its end, and what it counts is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_cases import KINDS
from rmtkernels import dispatch
from tools import gpu_check, kernel_table
from tools.slices import hash_of, kernel_files


def test_a_dry_run_reaches_its_end(root: Path, tmp_path: Path) -> None:
    """Tests are collected, every operator is called, every kind of bench runs; nothing claims to have run on a GPU."""
    output = tmp_path / "dry.json"
    command = [sys.executable, "-m", "tools.gpu_check", "--dry", "--output", str(output)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["dry"] and result["device"] == "none"
    stages = result["stages"]
    assert {stage["status"] for stage in stages.values()} == {"not run"}
    assert stages["tests"]["collected"] > 50
    assert {file.split("/")[1] for file in stages["tests"]["files"]} >= {"gpu", "unit"}
    assert set(stages["sanitizers"]["calls on the CPU"]["called"]) == set(dispatch.OPERATORS)
    assert len(stages["bench"]["ran on the CPU"]) == len(KINDS)
    assert str(root) not in output.read_text()


def test_a_stage_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(device: str) -> gpu_check.Stage:
        gpu_check.run([sys.executable, "-c", "raise SystemExit('the reason')"])
        return {"status": "passed"}

    monkeypatch.setattr(gpu_check, "STAGES", {"first": failing, "second": lambda device: {"status": "passed"}})
    stages = gpu_check.check("cpu", tmp_path / "result.json")["stages"]
    assert stages["first"]["status"] == "failed" and "the reason" in stages["first"]["why"]
    assert stages["second"]["status"] == "passed"
    assert json.loads((tmp_path / "result.json").read_text())["stages"].keys() == stages.keys()


def test_a_stage_that_does_not_end_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SECONDS", 0.2)
    with pytest.raises(gpu_check.StageError, match="took more than"):
        gpu_check.run([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_tool_that_misses_its_planted_bug_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for compute-sanitizer finds all bugs but initcheck's."""
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text('#!/bin/sh\n[ "$4" = initcheck ] || exit 9\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu_check, "planted_bugs", lambda folder, architecture: "program")
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu_check.missed_bugs() == ["initcheck"]


def test_results_are_counted_by_slice_and_backend(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase file="tests/gpu/test_spectrum.py" name="test_a"/>'
        '<testcase file="tests/gpu/test_spectrum.py" name="test_b"><failure message="wrong"/></testcase>'
        '<testcase file="tests/gpu/test_triton.py" name="test_c[window_push_]"/>'
        '<testcase file="tests/gpu/test_triton.py" name="test_d"><skipped message="why"/></testcase>'
        "</testsuite></testsuites>"
    )
    counted = gpu_check.count_tests(report)
    assert counted["counts"] == {
        "spectrum": {"cuda": {"passed": 1, "failed": 1, "skipped": 0}},
        "sliding_window": {"triton": {"passed": 1, "failed": 0, "skipped": 0}},
        "shared": {"triton": {"passed": 0, "failed": 0, "skipped": 1}},
    }
    assert counted["failed"] == ["tests/gpu/test_spectrum.py::test_b"]


@pytest.fixture
def result() -> dict:
    """What a GPU on which all went well says of spectrum."""
    silent = {"status": "passed", "called": {"spectrum_eigvalsh": 3}}
    return {
        "device": "a GPU",
        "date": "2026-01-31",
        "kernels": {"spectrum": {"cuda": hash_of(kernel_files("spectrum", "cuda"))}},
        "stages": {
            "tests": {"counts": {"spectrum": {"cuda": {"passed": 7, "failed": 0, "skipped": 0}}}},
            "sanitizers": {"tools": {tool: dict(silent) for tool in gpu_check.SANITIZERS}},
            "bench": {"cases": {"spectrum.descriptors": {"seconds": {"ours": 1.0}}}},
        },
    }


def claim(result: dict) -> str:
    return kernel_table.on_gpu("spectrum", "spectrum_eigvalsh", "cuda", result)


def test_the_table_claims_what_the_result_holds_and_no_more(result: dict) -> None:
    assert claim(result) == "9 (7 tests, sanitizers, bench; a GPU, 2026-01-31)"
    assert kernel_table.on_gpu("spectrum", "spectrum_eigvalsh", "triton", result) == ""
    result["stages"]["sanitizers"]["tools"]["racecheck"]["status"] = "failed"
    assert claim(result) == "9 (7 tests, bench; a GPU, 2026-01-31)"
    result["stages"]["bench"]["cases"] = {}
    assert claim(result) == "9 (7 tests; a GPU, 2026-01-31)"
    result["kernels"]["spectrum"]["cuda"] = "of other sources"
    assert claim(result) == "9 (7 tests; a GPU, 2026-01-31; an earlier version)"
    result["stages"]["tests"]["counts"]["spectrum"]["cuda"]["failed"] = 1
    assert claim(result) == ""
