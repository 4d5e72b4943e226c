"""The Triton kernels in the checked interpreter, in a process of their own: TRITON_INTERPRET=1 must be set before
Triton is imported, and then nothing can be compiled. RMTKERNELS_PROVE=1 plants all bugs, else one for each finding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
CHECKS = sorted((ROOT / "tests" / "triton" / "interpreted").glob("check_*.py"))


@pytest.mark.parametrize("checks", CHECKS, ids=lambda file: file.stem)
def test_interpreted_kernels(checks: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RMTKERNELS_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(checks)],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0 and "passed" in summary and "skipped" not in summary, done.stdout + done.stderr
