"""A watched sequence takes what its window takes, however long it gets; a million tokens with RMTKERNELS_PROVE=1."""

import os

from bench.cases import state
from bench.cases.sliding_window import LAYERS, WIDTH, WINDOW, Ours

TOKENS = state.TOKENS if os.environ.get("RMTKERNELS_PROVE") == "1" else 10_000


def test_a_stream_leaves_nothing_behind() -> None:
    ours = Ours("trace")
    before = state.state_bytes(ours)
    assert before <= 1.01 * LAYERS * (WINDOW * WIDTH + WINDOW**2) * 4
    assert state.growth(ours, TOKENS) <= state.ALLOWED_GROWTH
    assert state.state_bytes(ours) == before


def test_a_leak_is_seen() -> None:
    """A row of one layer for each token, as if it were kept."""
    kept: list[bytearray] = []

    class Leaking(Ours):
        def __call__(self):
            kept.append(bytearray(4 * WIDTH))
            return super().__call__()

    assert state.growth(Leaking("trace"), 10_000) > state.ALLOWED_GROWTH
