"""A watched sequence takes what its window takes, however long it gets; a million tokens with RMTKERNELS_PROVE=1.

In processes of their own: what other tests have left in the heap would be filled first, and hide a leak.
"""

import os
import subprocess
import sys
from pathlib import Path

from bench.cases import state
from bench.cases.sliding_window import LAYERS, WIDTH, WINDOW

ROOT = Path(__file__).resolve().parents[2]
TOKENS = state.TOKENS if os.environ.get("RMTKERNELS_PROVE") == "1" else 10_000
SOUND = """
from bench.cases import state
from bench.cases.sliding_window import WIDTH, Ours

class Watched(Ours):
    pass
"""
LEAKING = """
kept = []

class Watched(Ours):
    def __call__(self):
        kept.append(bytearray(4 * WIDTH))  # a row of one layer for each token
        return super().__call__()
"""
MEASURED = """
ours = Watched("trace")
print(state.state_bytes(ours), state.growth(ours, {tokens}), state.state_bytes(ours))
"""


def measured(program: str, tokens: int) -> list[int]:
    """Bytes of the state, by how much resident memory grew, and bytes of the state afterwards."""
    command = [sys.executable, "-c", program + MEASURED.format(tokens=tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return [int(number) for number in done.stdout.split()]


def test_a_stream_leaves_nothing_behind() -> None:
    before, grown, after = measured(SOUND, TOKENS)
    assert before == after <= 1.01 * LAYERS * (WINDOW * WIDTH + WINDOW**2) * 4
    assert grown <= state.ALLOWED_GROWTH


def test_a_leak_is_seen() -> None:
    assert measured(SOUND + LEAKING, 10_000)[1] > state.ALLOWED_GROWTH
