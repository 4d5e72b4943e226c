"""Pushes, resets, saves and loads in any order, against a list of rows per sequence.

Hypothesis chooses the order. RMTKERNELS_PROVE=1 tries many more and longer ones."""

import os
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load, save
from torch import Tensor

import rmtkernels
from rmtkernels import ShapeError
from rmtkernels.reference.spectrum import spectrum_descriptors_ref
from tests.helpers import same_bits

LONG = "RMTKERNELS_PROVE" in os.environ
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Windows(RuleBasedStateMachine):
    """`rows[b]` are the accepted rows of sequence b since its last reset, (L, D) each, oldest first."""

    saved = Bundle("saved")

    @initialize(
        layers=st.integers(1, 3),
        batch=st.integers(1, 3),
        window=st.integers(1, 9),
        dim=st.integers(1, 20),
        dtype=st.sampled_from(DTYPES),
    )
    def begin(self, layers: int, batch: int, window: int, dim: int, dtype: torch.dtype) -> None:
        self.sizes = {"layers": layers, "batch": batch, "window": window, "dim": dim, "dtype": dtype}
        self.state = rmtkernels.SlidingWindow(**self.sizes)  # type: ignore[arg-type]
        self.rows: list[list[Tensor]] = [[] for _ in range(batch)]
        self.rejected = [0] * batch

    def random_rows(self, seed: int, steps: int) -> list[Tensor]:
        """One (B, T, D) tensor per layer; about one row in eight holds a NaN or an infinity in one layer."""
        random = torch.Generator().manual_seed(seed)
        shape = (self.sizes["batch"], steps, self.sizes["dim"])
        layers = [torch.randn(shape, generator=random) for _ in range(self.sizes["layers"])]
        bad = torch.rand(shape[:2], generator=random) < 0.125
        where = seed % len(layers)
        layers[where][..., 0] = layers[where][..., 0].where(~bad, torch.nan if seed % 2 else torch.inf)
        return [layer.to(self.sizes["dtype"]) for layer in layers]

    @rule(seed=st.integers(0, 10**6), steps=st.integers(1, 4), masked=st.booleans())
    def push(self, seed: int, steps: int, masked: bool) -> None:
        rows = self.random_rows(seed, steps)
        mask = torch.rand(rows[0].shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.7 if masked else None
        self.state.update(rows, mask)
        for b in range(self.sizes["batch"]):
            for t in range(steps):
                offered = torch.stack([layer[b, t] for layer in rows])
                if mask is not None and not mask[b, t]:
                    continue
                if offered.isfinite().all():
                    self.rows[b].append(offered)
                else:
                    self.rejected[b] += 1

    @rule(which=st.lists(st.booleans(), min_size=3, max_size=3))
    def reset(self, which: list[bool]) -> None:
        chosen = torch.tensor(which[: self.sizes["batch"]])
        self.state.reset(chosen)
        for b in chosen.nonzero().flatten().tolist():
            self.rows[b], self.rejected[b] = [], 0

    @rule()
    def reset_all(self) -> None:
        self.state.reset()
        self.rows, self.rejected = [[] for _ in self.rows], [0] * len(self.rows)

    @rule(target=saved)
    def save(self) -> tuple[bytes, list[list[Tensor]], list[int]]:
        return save(self.state.state_dict()), [list(rows) for rows in self.rows], list(self.rejected)

    @rule(kept=saved, fresh=st.booleans())
    def load(self, kept: tuple[bytes, list[list[Tensor]], list[int]], fresh: bool) -> None:
        if fresh:
            self.state = rmtkernels.SlidingWindow(**self.sizes)  # type: ignore[arg-type]
        self.state.load_state_dict(load(kept[0]))
        self.rows, self.rejected = [list(rows) for rows in kept[1]], list(kept[2])

    @rule(name=st.sampled_from(["ring", "gram", "seen"]))
    def a_refused_load_or_push(self, name: str) -> None:
        before = self.state.state_dict()
        hostile: dict[str, Any] = {**before, name: before[name][..., :-1]}
        for refused in (
            lambda: self.state.load_state_dict(hostile),
            lambda: self.state.update(self.random_rows(1, 1)[:-1]),
        ):
            try:
                refused()
            except ShapeError:
                assert all(same_bits(value, before[key]) for key, value in self.state.state_dict().items())
            else:
                raise AssertionError("it was not refused")

    @precondition(lambda self: hasattr(self, "state"))
    @invariant()
    def counts_are_those_of_the_lists(self) -> None:
        assert self.state.rows.tolist() == [len(rows) for rows in self.rows]
        assert self.state.rejected.tolist() == self.rejected

    @precondition(lambda self: hasattr(self, "state"))
    @invariant()
    def windows_are_the_newest_rows(self) -> None:
        window, dim = self.sizes["window"], self.sizes["dim"]
        gram = torch.zeros(self.sizes["layers"], self.sizes["batch"], window, window, dtype=torch.float64)
        for b, rows in enumerate(self.rows):
            slots = {i % window: row for i, row in enumerate(rows)}
            used = len(slots)
            if used == 0:
                continue
            ring = torch.stack([slots[s] for s in range(used)], 1)  # (L, used, D)
            assert torch.equal(self.state.ring[:, b, :used], ring)
            gram[:, b, :used, :used] = ring.double() @ ring.double().mT
            torch.testing.assert_close(
                self.state.gram[:, b, :used, :used].double(), gram[:, b, :used, :used], rtol=0, atol=1e-6 * dim * 16
            )
        descriptors, eigenvalues = self.state.descriptors()
        seen = torch.tensor([len(rows) for rows in self.rows])
        _, wanted = spectrum_descriptors_ref(gram, seen, dim)
        torch.testing.assert_close(eigenvalues.double(), wanted.double(), rtol=1e-5, atol=1e-5)
        assert descriptors.isfinite().all()


Windows.TestCase.settings = settings(
    max_examples=400 if LONG else 25, stateful_step_count=40 if LONG else 15, deadline=None, derandomize=not LONG
)
TestWindows = Windows.TestCase
