"""A monitor that runs for long, monitors that come and go, eight at a time: nothing is left behind, and nothing drifts.
A million tokens and ten thousand monitors with RMTKERNELS_PROVE=1; a million tokens through a window alone:
test_soak_window.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cases.state import ALLOWED_GROWTH
from tests.integration.test_threads import eight_threads

ROOT = Path(__file__).resolve().parents[2]
LONG = os.environ.get("RMTKERNELS_PROVE") == "1"
TOKENS, CYCLES = (1_000_000, 10_000) if LONG else (20_000, 400)


@pytest.fixture(scope="module")
def soaked() -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "tests.integration.soak", str(TOKENS), str(CYCLES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


# A megabyte, as in bench/cases/state.py: the interpreter's own caches come and go. Of a million tokens it is one byte
# each, of ten thousand monitors a hundred.


def test_a_session_keeps_its_last_request_only(soaked: dict[str, dict[str, int]]) -> None:
    assert soaked["session"]["requests"] <= ALLOWED_GROWTH


def test_a_request_grows_by_what_is_documented(soaked: dict[str, dict[str, int]]) -> None:
    """Its buffers double: they are one to two times what they hold."""
    found = soaked["session"]
    assert found["documented"] <= found["history"] + ALLOWED_GROWTH
    assert found["history"] <= 2 * found["documented"] + ALLOWED_GROWTH


def test_monitors_that_are_gone_leave_nothing(soaked: dict[str, dict[str, int]]) -> None:
    found = soaked["attachments"]
    assert found["grown"] <= ALLOWED_GROWTH and found["hooks"] == found["alive"] == 0


def test_a_leak_and_a_hook_that_is_left_over_are_seen(soaked: dict[str, dict[str, int]]) -> None:
    assert soaked["leaking"]["grown"] > ALLOWED_GROWTH
    assert soaked["with_a_hook_left_over"]["hooks"] == 40, "twenty to warm up, and twenty"


@pytest.mark.skipif(not LONG, reason="RMTKERNELS_PROVE=1 runs it")
@pytest.mark.parametrize("shared", [True, False], ids=["one model", "eight models"])
def test_eight_threads_for_long(shared: bool) -> None:
    eight_threads(shared, rounds=60)
