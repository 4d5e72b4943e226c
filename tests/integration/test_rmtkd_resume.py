"""A run that is killed, wherever that is, and called again ends as one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("killed_runs.py")
# Of six steps each: warming up is 1 to 6, and the first stage begins with 7.
POINTS = {
    "width": ["rename run.json", "weights stage-0", "step 20", "rename stage-1"],
    "factor": ["rename stage-0", "step 8", "weights stage-1", "renamed stage-1", "rename stage-2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", sorted(POINTS))
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(mode: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, mode, tmp_path, *POINTS[mode]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    whole = results.pop("")
    digest, history, reason, found = whole
    assert len(digest) == 64 and [stage["number"] for stage in history] == [0, 1, 2]
    assert history[2]["parameters"] < history[1]["parameters"] < history[0]["parameters"]
    assert reason == "all 2 stages are done" and found == ["run.json", "stage-0", "stage-1", "stage-2"]
    assert list(results) == POINTS[mode]
    for point, result in results.items():
        assert result == whole, point
