"""The example scripts, as a newcomer starts them. test_guide.py looks closer at lower_temperature."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.snippets import ROOT
from tests.integration.test_guide import load_example

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
SECONDS = 120  # of processor time, on one thread


def test_noise_and_signal_counts_alike_by_lanczos_and_lapack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load_example("noise_and_signal")
    sentences = [
        f"{subject} {verb} {thing}."
        for subject in example.SUBJECTS
        for verb, thing in zip(example.VERBS, example.OBJECTS, strict=True)
    ]
    (tmp_path / "notes.txt").write_text("\n\n".join(sentences) + "\n")
    example.main(["--text", str(tmp_path / "notes.txt")])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{len(sentences)} sentences, ")
    rows = re.findall(r"^ +(\d+) +([\d.e-]+) +([\d.e-]+) +(\d+), (\d+)$", printed, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(6)), "no row says that something has not converged"
    for _, variance, edge, lanczos, lapack in rows:
        assert 0 < float(variance) < float(edge) and 0 < int(lanczos) == int(lapack) < 384


@pytest.mark.slow
@pytest.mark.skipif("RMTKERNELS_PROVE" not in os.environ, reason="RMTKERNELS_PROVE=1 runs it")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_within_two_minutes(name: str, tmp_path: Path) -> None:
    assert len(EXAMPLES) == 3
    kept = {key: value for key, value in os.environ.items() if key != "RMTKERNELS_DATA"}
    before = os.times()
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        cwd=tmp_path,
        env={**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    after = os.times()
    assert done.returncode == 0, done.stderr[-2000:]
    taken = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{name}: {taken:.0f} s of processor time, {time.monotonic() - begun:.0f} s in all")
    assert taken < SECONDS and len(done.stdout.splitlines()) >= 5
