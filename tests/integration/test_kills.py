"""Work that is killed with no warning, at random moments and in the middle of files, and started again: it leaves what
undisturbed work leaves, and no file that a reader would open is ever half written. 50 random moments with
RMTKERNELS_PROVE=1; test_rmtkd_resume.py has moments of a run that were chosen."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONG = os.environ.get("RMTKERNELS_PROVE") == "1"
# Jobs of kills.py, with so many random moments, and every so many operations on files: "run" makes eighty.
TIMES = {"run": (13, 7), "distil": (13, 1), "fit": (12, 1), "cache": (12, 2)} if LONG else {"run": (1, 47)}
# What a killed process may leave beside its place for good: nobody can tell it from what another is writing there.
# A run owns its folder, and leaves nothing.
LEFT = {
    "run": r"(?!)",
    "distil": r"\.model\.[0-9a-f]{8}\.partial/.*",
    "fit": r"\.detector\.safetensors\.[0-9a-f]{8}\.partial",
    "cache": r"\.items\.json\.[0-9a-f]{8}\.partial|\.tmp\w{6}",  # safetensors too writes aside
}


def killed(place: Path, *jobs: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.integration.kills", place, *jobs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_what_was_killed_and_started_again_leaves_the_same(tmp_path: Path) -> None:
    results = killed(tmp_path, *(f"{job}:{times}:{stride}" for job, (times, stride) in TIMES.items()))
    for job, (times, _) in TIMES.items():
        assert isinstance(results[job], dict), (job, results[job])
        whole = results[job].pop("nobody")
        assert whole and sum(moment.endswith(" s") for moment in results[job]) == times
        assert any(moment.startswith("file ") for moment in results[job]), job
        for moment, found in results[job].items():
            kept = {name: digest for name, digest in found.items() if not re.fullmatch(LEFT[job], name)}
            assert kept == whole, (job, moment)


@pytest.mark.skipif(not LONG, reason="RMTKERNELS_PROVE=1 runs it")
def test_a_file_that_is_not_written_aside_and_work_that_counts_its_beginnings_are_seen(tmp_path: Path) -> None:
    results = killed(tmp_path, "torn:0:1", "counting:8:0")
    assert "JSONDecodeError" in results["torn"]
    whole = results["counting"].pop("nobody")
    # A moment may come before the work has begun.
    assert len(results["counting"]) == 8 and any(found != whole for found in results["counting"].values())
