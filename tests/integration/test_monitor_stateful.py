"""EigenTrack attached, detached, fed, reset, saved and loaded in any order, against a list of hidden states in float64.

Hypothesis chooses the order. RMTKERNELS_PROVE=1 tries many more and longer ones."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import eigentrack
from eigentrack import EigenTrack, EigenTrackError
from rmtkernels.reference import spectrum_descriptors_ref
from tests.helpers import same_bits
from tests.integration.conftest import WIDTH, tiny_llama
from tests.integration.test_monitor import generate, hooks_of

LONG = os.environ.get("RMTKERNELS_PROVE") == "1"
ENDS = (0, 2)  # what tiny_llama pads and ends with
READINGS = ("descriptors", "eigenvalues", "tokens", "watched")


class Seen(NamedTuple):
    """A step that should have been watched: (L, B, D) hidden states, (B,) who took part, (B,) tokens."""

    rows: Tensor
    took_part: Tensor
    tokens: Tensor


class Monitors(RuleBasedStateMachine):
    """`steps` is what the monitor should have seen of the last request since its last reset."""

    recordings = Bundle("recordings")

    @initialize(
        layers=st.sampled_from([[0], [1], [0, 1]]),
        batch=st.integers(1, 3),
        window=st.integers(1, 5),
        spectra=st.sampled_from(["per_layer", "joint"]),
        start=st.sampled_from(["answer", "prompt"]),
    )
    def begin(self, layers: list[int], batch: int, window: int, spectra: str, start: str) -> None:
        self.model, self.batch, self.layers = tiny_llama(depth=2), batch, layers
        self.outputs: list[Tensor] = []  # of the watched layers, by hooks of the test's own
        for layer in layers:
            self.model.model.layers[layer].register_forward_hook(lambda *given: self.outputs.append(given[2].detach()))
        self.track = EigenTrack(self.model, layers=layers, window=window, spectra=spectra, start=start)
        self.attached, self.followed = False, False  # `followed`: whether the monitor saw the last pass on the cache
        self.steps: list[Seen] = []
        self.expected: list[tuple[Tensor, ...]] = []  # of `steps`, as far as they have been looked at
        self.alive = torch.ones(batch, dtype=torch.bool)
        self.cache: Any = None
        self.attach()
        self.prompt(2, seed=0, padded=False)

    @property
    def every(self) -> Tensor:
        return torch.ones(self.batch, dtype=torch.bool)

    def tokens(self, count: int, seed: int, *, ends: bool) -> Tensor:
        """(B, T), about one in six an end if there may be any."""
        random = torch.Generator().manual_seed(seed)
        found = torch.randint(3, 64, (self.batch, count), generator=random)
        ended = torch.rand(self.batch, count, generator=random) < 1 / 6
        return torch.where(ended, ENDS[seed % 2], found) if ends else found

    def passed(self, ids: Tensor, **options: Any) -> Tensor:
        """(L, B, T, D) hidden states of a pass."""
        self.outputs.clear()
        with torch.no_grad():
            self.cache = self.model(ids, use_cache=True, **options).past_key_values
        return torch.stack(self.outputs)

    def begins(self) -> None:
        self.steps, self.expected, self.alive = [], [], self.every

    def saw(self, rows: Tensor, took_part: Tensor, ids: Tensor) -> None:
        """(L, B, T, D) hidden states, (B, T) or (B,) who took part, (B, T) tokens."""
        for t in range(ids.shape[1]):
            who = took_part if took_part.dim() == 1 else took_part[:, t]
            self.steps.append(Seen(rows[:, :, t], who.clone(), ids[:, t]))

    @property
    def prompt_too(self) -> bool:
        return self.track.start == "prompt"

    # What a user does

    def attach(self) -> None:
        self.track.__enter__()
        self.attached, self.followed = True, False

    @rule(failed=st.booleans(), unseen=st.integers(0, 2), seed=st.integers(0, 10**6))
    def detach_and_attach(self, failed: bool, unseen: int, seed: int) -> None:
        """With passes in between that continue the text, and are none of the monitor's."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "EigenTrack saw no forward pass", RuntimeWarning)
            error = KeyboardInterrupt() if failed else None
            self.track.__exit__(type(error) if error else None, error, None)
        self.attached = self.followed = False
        for _ in range(unseen):
            self.passed(self.tokens(1, seed, ends=True), past_key_values=self.cache)
        self.hooks_are_there_while_it_is_attached()
        self.readings_are_those_of_the_list()
        self.attach()

    @rule()
    def attach_twice(self) -> None:
        with pytest.raises(EigenTrackError, match="attached already"):
            self.track.__enter__()

    @rule()
    def reset(self) -> None:
        self.track.reset()
        self.steps, self.expected = [], []

    @rule(length=st.integers(1, 4), seed=st.integers(0, 10**6), padded=st.booleans())
    def prompt(self, length: int, seed: int, padded: bool) -> None:
        ids, mask = self.tokens(length, seed, ends=False), torch.ones(self.batch, length, dtype=torch.int64)
        if padded:
            mask[0, : length - 1] = ids[0, : length - 1] = 0
        rows = self.passed(ids, attention_mask=mask)
        self.begins()
        self.followed = True
        if self.prompt_too:
            self.saw(rows, mask.bool(), ids)

    @rule(count=st.sampled_from([1, 1, 1, 2, 3]), seed=st.integers(0, 10**6))
    def feed(self, count: int, seed: int) -> None:
        """Tokens behind the cache: one of the answer, or several of another turn."""
        ids = self.tokens(count, seed, ends=True)
        rows = self.passed(ids, past_key_values=self.cache)
        if self.followed and count == 1:
            self.alive = self.alive & (ids[:, :1] != torch.tensor(ENDS)).all(1)
            self.saw(rows, self.alive, ids)
            return
        if not self.followed or not self.prompt_too:
            self.begins()
        self.followed, self.alive = True, self.every
        if self.prompt_too:
            self.saw(rows, self.every, ids)

    @rule(length=st.integers(1, 4), new=st.integers(1, 5), seed=st.integers(0, 10**6))
    def generate(self, length: int, new: int, seed: int) -> None:
        ids = self.tokens(length, seed, ends=False)
        self.outputs.clear()
        output = generate(self.model, ids, new, do_sample=False, return_dict_in_generate=True)
        rows = torch.cat([torch.stack(one) for one in self.by_pass()], 2)
        self.cache, self.followed = output.past_key_values, True
        self.begins()
        first = 0 if self.prompt_too else length
        self.saw(rows[:, :, first:], self.every, output.sequences[:, first:-1])

    def by_pass(self) -> list[list[Tensor]]:
        size = len(self.layers)
        return [self.outputs[i : i + size] for i in range(0, len(self.outputs), size)]

    @precondition(lambda self: self.steps)
    @rule(target=recordings)
    def save_and_load(self) -> tuple[Any, dict[str, Tensor]]:
        with tempfile.TemporaryDirectory() as folder:
            self.track.save(Path(folder) / "run")
            loaded = eigentrack.load(Path(folder) / "run")
        assert loaded.settings == self.track.settings
        return loaded, {name: getattr(self.track, name) for name in READINGS}

    @rule(kept=recordings)
    def a_recording_stays_what_it_was(self, kept: tuple[Any, dict[str, Tensor]]) -> None:
        assert all(same_bits(getattr(kept[0], name), value) for name, value in kept[1].items())

    # What then must be so

    @precondition(lambda self: hasattr(self, "track"))
    @invariant()
    def hooks_are_there_while_it_is_attached(self) -> None:
        own = len(self.layers)
        assert hooks_of(self.model) == own + (own + 2 if self.attached else 0)

    @precondition(lambda self: hasattr(self, "track"))
    @invariant()
    def readings_are_those_of_the_list(self) -> None:
        assert self.track.steps == len(self.steps)
        if not self.steps:
            with pytest.raises(EigenTrackError):
                _ = self.track.descriptors
            return
        self.expected += [self.oracle(t) for t in range(len(self.expected), len(self.steps))]
        assert torch.equal(self.track.tokens, torch.stack([step.tokens for step in self.steps], 1))
        watched = torch.stack([step.took_part for step in self.steps], 1)
        assert torch.equal(self.track.watched, watched)
        assert torch.equal(self.track.lengths, watched.sum(1))
        wanted = [torch.stack(values, 1) for values in zip(*self.expected, strict=True)]
        eigenvalues, descriptors, moved_eigenvalues, moved_descriptors = wanted
        found, got = self.track.eigenvalues, self.track.descriptors.unflatten(2, descriptors.shape[2:])
        assert torch.equal(found.isnan(), eigenvalues.isnan()) and torch.equal(got.isnan(), descriptors.isnan())
        allowed = 1e-5 * eigenvalues[..., :1] + 8 * moved_eigenvalues
        assert ((found - eigenvalues).abs() <= allowed)[watched].all()
        allowed = 1e-3 * (1 + descriptors.abs()) + 8 * moved_descriptors
        assert ((got - descriptors).abs() <= allowed)[watched][..., :-1].all()  # the last is a count, and jumps

    def oracle(self, t: int) -> tuple[Tensor, ...]:
        """(B, S, N) eigenvalues and (B, S, F) descriptors of step t, from the newest rows of each sequence; and by how
        much they move if the Gram matrix does in its seventh digit: rows that are all but equal, as greedy tokens make
        them, leave no more."""
        window, joint = self.track.window, "trace" if self.track.spectra == "joint" else None
        gram = torch.zeros(len(self.layers), self.batch, window, window, dtype=torch.float64)
        seen = torch.zeros(self.batch, dtype=torch.int64)
        for b in range(self.batch):
            rows = [step.rows[:, b].double() for step in self.steps[: t + 1] if step.took_part[b]]
            seen[b] = len(rows)
            slots = {i % window: row for i, row in enumerate(rows)}
            if slots:
                ring = torch.stack([slots[slot] for slot in range(len(slots))], 1)
                gram[:, b, : len(slots), : len(slots)] = ring @ ring.mT
        size = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        noise = torch.randn(gram.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        near = gram + 1e-7 * (noise + noise.mT) * size[..., :, None] * size[..., None, :]
        (descriptors, eigenvalues), (others, other_eigenvalues) = (
            spectrum_descriptors_ref(one, seen, WIDTH, joint=joint, normalize="rms") for one in (gram, near)
        )
        moved = (eigenvalues - other_eigenvalues).abs(), (descriptors - others).abs()
        found = [value.transpose(0, 1).clone() for value in (eigenvalues, descriptors, *moved)]
        for value in found:
            value[~self.steps[t].took_part] = torch.nan
        return tuple(found)


Monitors.TestCase.settings = settings(
    max_examples=800 if LONG else 40, stateful_step_count=40 if LONG else 20, deadline=None, derandomize=not LONG
)
TestMonitors = Monitors.TestCase
