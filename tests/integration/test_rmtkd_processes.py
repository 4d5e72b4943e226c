"""RMT-KD under torchrun (gloo): the result of one process, by two and by four, and what happens if one dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rmtkd
from tests.integration.several_processes import CONFIGS, model

PROGRAM = Path(__file__).with_name("several_processes.py")
LONG = pytest.mark.skipif(os.environ.get("RMTKERNELS_PROVE") != "1", reason="RMTKERNELS_PROVE=1 runs it")


def run(processes: int, mode: str, folder: Path, *dies: int) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(PROGRAM), mode, str(folder), *map(str, dies)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def history(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((folder / "stage-2" / "stage.json").read_text())["history"]
    return [{name: value for name, value in stage.items() if name != "seconds"} for stage in found]


def assert_same(folder: Path, other: Path) -> None:
    """The same stages and scores, and the same weights but for rounding."""
    assert history(folder) == history(other)
    mine, theirs = (rmtkd.load(each / "stage-2", model=model()).state_dict() for each in (folder, other))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("mode", "processes"),
    [("width", 2), *(pytest.param(mode, processes, marks=LONG) for mode in CONFIGS for processes in (2, 4))],
)
def test_the_result_of_one_process(mode: str, processes: int, tmp_path: Path) -> None:
    """And a process that dies in the second stage ends the run, which goes on from the first when called again."""
    alone = run(1, mode, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    died = run(processes, mode, tmp_path / "several", 2)
    assert died.returncode != 0
    assert "process 1 was told to die" in died.stderr
    assert sorted(path.name for path in (tmp_path / "several").iterdir()) == ["run.json", "stage-0", "stage-1"]
    written = (tmp_path / "several" / "stage-1" / "stage.json").stat().st_mtime_ns
    again = run(processes, mode, tmp_path / "several")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "several" / "stage-1" / "stage.json").stat().st_mtime_ns == written
    assert_same(tmp_path / "one", tmp_path / "several")
