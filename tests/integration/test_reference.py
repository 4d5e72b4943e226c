"""The reference score: its formula, what it refuses, and what it tells apart on a real model."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eigentrack import EigenTrack, FileFormatError, MismatchError, Recording, Reference, Settings, Step
from eigentrack.reference import CLIP, POOLED
from tests.helpers import generator, same_bits
from tests.integration.test_monitor import WINDOW, generate, prompt
from tests.integration.texts import ORDINARY, STRANGE

SETTINGS = Settings(
    model="Model",
    names=("a", "b", "c"),
    taps=("layer0",),
    layers=(0,),
    window=4,
    spectra="joint",
    start="answer",
    normalize=None,
    center=True,
    noise="median",
    layer_scale="trace",
    end_tokens=(),
)


def recorded(values: Tensor, watched: Tensor | None = None, **changes: Any) -> Recording:
    """A recording of (B, T, F) descriptors."""
    batch, steps, _ = values.shape
    watched = torch.ones(batch, steps, dtype=torch.bool) if watched is None else watched
    settings = dataclasses.replace(SETTINGS, **changes)
    eigenvalues = torch.zeros(batch, steps, 1, settings.window)
    return Recording(
        values.masked_fill(~watched[..., None], math.nan),
        eigenvalues,
        torch.zeros(batch, steps, dtype=torch.int64),
        watched,
        settings,
        {},
    )


def normal(batch: int, steps: int, seed: int) -> Tensor:
    """Three descriptors whose place and spread depend on how full the window of 4 is."""
    level = torch.arange(1, steps + 1).clamp(max=4)[:, None]
    noise = torch.randn(batch, steps, 3, generator=generator(seed))
    return 10 * level + noise * level * torch.tensor([0.1, 1.0, 100.0])


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.fit(recorded(normal(50, 12, seed)) for seed in range(4))


def test_the_formula_at_each_level_of_the_window(reference: Reference) -> None:
    values = torch.cat([normal(50, 12, seed) for seed in range(4)]).double()
    for level in range(4):
        steps = slice(level, level + 1) if level < 3 else slice(3, None)
        pool = values[:, steps].flatten(0, 1).numpy()
        assert int(reference.counts[level]) == len(pool)
        median = np.median(pool, 0)
        low, high = np.quantile(pool, (0.05, 0.95), axis=0)
        scale = 1.4826 * np.median(abs(pool - median), 0) + 0.1 * (high - low) / 3.29 + 0.001
        np.testing.assert_allclose(reference.median[level], median, rtol=1e-6)
        np.testing.assert_allclose(reference.scale[level], scale, rtol=1e-6)
        # A tenth more than the deviation that was put in; the MAD of 200 values is good to 8 %.
        np.testing.assert_allclose(scale, 1.1 * (level + 1) * np.array([0.1, 1, 100]), rtol=0.25)
    x = reference.median[[0, 1, 2, 3, 3]] + reference.scale[[0, 1, 2, 3, 3]] * torch.tensor([3.0, -1.0, 100.0])
    want = math.sqrt((9 + 1 + CLIP**2) / 3)
    torch.testing.assert_close(reference.score(x[None]), torch.full((1, 5), want), rtol=1e-5, atol=0)


def test_ordinary_values_score_about_one_and_strange_ones_more(reference: Reference) -> None:
    ordinary = reference.score(normal(50, 12, 9))
    assert 0.7 < float(ordinary.median()) < 1.1
    shifted = reference.score(normal(50, 12, 9) + torch.tensor([1.0, 0, 0]))
    assert (shifted[:, :4] > ordinary[:, :4]).double().mean() > 0.9
    assert float(reference.score(normal(50, 12, 9) * 1e9).max()) == CLIP


def test_the_same_value_is_strange_in_a_window_of_another_fullness(reference: Reference) -> None:
    value = torch.tensor([10.0, 10.0, 10.0])  # ordinary for one row
    scores = reference.score(value.expand(1, 4, 3))[0]
    assert float(scores[0]) < 0.7 and float(scores[1:].min()) > 1.9


def test_only_some_descriptors() -> None:
    names = {"names": ("layer2.a", "layer5.a", "layer5.b"), "spectra": "per_layer"}
    recordings = [recorded(normal(50, 12, seed), **names) for seed in range(4)]
    whole = Reference.fit(recordings)
    for only, columns in ((["a"], [0, 1]), (["layer5.b"], [2]), (["layer2.a", "b"], [0, 2]), ([], [0, 1, 2])):
        reference = Reference.fit(recordings, only=only)
        assert reference.used.nonzero()[:, 0].tolist() == columns
        x = normal(5, 12, 9)
        level = torch.arange(12).clamp(max=3)
        z = ((x - whole.median[level]) / whole.scale[level]).clamp(-CLIP, CLIP)[..., columns]
        torch.testing.assert_close(reference.score(x), z.square().mean(-1).sqrt())
    for only in (["c"], "a", ["layer2"]):
        with pytest.raises(MismatchError, match=r"there are a, b, layer2\.a"):
            Reference.fit(recordings, only=only)


def test_constants_and_counts_do_not_drown_the_rest() -> None:
    def values(seed: int) -> Tensor:
        noise = torch.randn(40, 8, 1, generator=generator(seed))
        count = (torch.rand(40, 8, 1, generator=generator(seed + 100)) < 0.2).float()  # its MAD is 0
        return torch.cat([noise, count, torch.ones(40, 8, 1)], 2)

    reference = Reference.fit([recorded(values(0)), recorded(values(1))])
    assert torch.equal(reference.median[:, 1:], torch.tensor([0.0, 1.0]).expand(4, 2))
    strange = values(2)
    strange[..., 2] += 1e-7  # the rounding of a constant
    torch.testing.assert_close(reference.score(strange), reference.score(values(2)), rtol=0, atol=1e-4)
    strange[..., 2] = 2
    assert float((reference.score(strange) / reference.score(values(2))).min()) > 1.2
    assert reference.score(values(2)).isfinite().all()


def test_levels_with_few_values_borrow_from_their_neighbours() -> None:
    reference = Reference.fit([recorded(normal(3, 40, 0)), recorded(normal(3, 40, 1))])
    # Levels 1 to 3 have 6 values each, level 4 has 37 * 6: what lies as far away as the last that is needed counts too.
    assert reference.counts.tolist() == [3 * 6 + 37 * 6, 3 * 6 + 37 * 6, 2 * 6 + 37 * 6, 37 * 6]
    wide = Reference.fit([recorded(normal(60, 3, 0))])
    assert wide.counts.tolist() == [60, 60, 60, 0], "no window was full"


def test_a_window_fuller_than_any_of_the_reference_is_not_judged(tmp_path: Path) -> None:
    reference = Reference.fit([recorded(normal(60, 3, 0))])
    assert reference.score(normal(5, 6, 1)).isnan().tolist() == [[False, False, False, True, True, True]] * 5
    assert math.isfinite(reference.threshold(0))
    reference.save(tmp_path / "x")
    assert same_bits(Reference.load(tmp_path / "x").median, reference.median)


def test_steps_without_a_part_are_nan_and_do_not_fill_the_window(reference: Reference) -> None:
    watched = torch.tensor([[True, False, False, True, True, False]])
    values = normal(1, 6, 3)
    values[:, [0, 3, 4]] = normal(1, 3, 4)  # as for windows of 1, 2 and 3
    scores = reference.score(recorded(values, watched))
    assert scores.isnan().tolist() == [[False, True, True, False, False, True]]
    dense = reference.score(values[:, [0, 3, 4]])
    torch.testing.assert_close(scores[watched], dense[0], rtol=0, atol=0)
    assert same_bits(reference.score(recorded(values, watched).descriptors), scores), "descriptors alone say the same"


def test_what_was_not_watched_or_is_not_finite_is_left_out_of_a_reference(reference: Reference) -> None:
    recordings = []
    for seed in range(4):
        padding, spoilt = normal(50, 12, 77), normal(1, 12, 78)
        spoilt[..., 1] = math.inf
        values = torch.cat([torch.cat([padding, normal(50, 12, seed)], 1), torch.cat([spoilt, spoilt], 1)])
        watched = torch.arange(24).expand(51, 24) >= 12
        recordings.append(recorded(values, watched))
    again = Reference.fit(recordings)
    assert same_bits(again.median, reference.median) and same_bits(again.scale, reference.scale)


def test_a_threshold_is_what_a_share_of_other_ordinary_text_exceeds(reference: Reference) -> None:
    fresh = reference.score(normal(500, 12, 31))
    for share in (0.5, 0.1, 0.01):
        assert float((fresh > reference.threshold(share)).double().mean()) == pytest.approx(share, rel=0.3)
    assert reference.threshold(1) <= reference.threshold(0.5) <= reference.threshold(0)
    small = Reference.fit([recorded(normal(8, 12, 0))])
    assert float((small.score(normal(500, 12, 31)) > small.threshold(0.1)).double().mean()) < 0.25
    with pytest.raises(MismatchError, match="from 0 to 1"):
        reference.threshold(5)


@pytest.mark.parametrize(
    "recordings",
    [[], [recorded(normal(1, 100, 0))], [recorded(normal(6, 9, 0))], [recorded(normal(9, 9, 0) * math.nan)]],
)
def test_too_little_text(recordings: list[Recording]) -> None:
    with pytest.raises(MismatchError, match="needs"):
        Reference.fit(recordings)
    assert POOLED == 50


@pytest.mark.parametrize(
    "change",
    [
        {"names": ("a", "b", "x")},
        {"window": 5},
        {"center": False},
        {"start": "prompt"},
        {"normalize": "rms"},
        {"noise": "trace"},
        {"layer_scale": "none"},
        {"model": "Other"},
    ],
)
def test_other_settings_are_refused(reference: Reference, change: dict[str, Any]) -> None:
    other = recorded(normal(50, 12, 0), **change)
    [name] = change
    with pytest.raises(MismatchError, match="descriptors" if name == "names" else name):
        reference.score(other)
    with pytest.raises(MismatchError):
        Reference.fit([recorded(normal(50, 12, 0)), other])


@pytest.mark.parametrize("change", [{"taps": ("layer7",)}, {"layers": (7,)}])
def test_a_joint_spectrum_of_other_layers_is_refused(reference: Reference, change: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match=next(iter(change))):
        reference.score(recorded(normal(1, 12, 0), **change))


def test_a_step_of_other_settings_is_refused(llama: Any, watched_reference: Reference) -> None:
    for _ in range(2):
        track = EigenTrack(llama, window=WINDOW, center=False, on_token=watched_reference.score_step)
        with pytest.raises(MismatchError, match="center"), track:
            generate(llama, prompt(), 4)
    track = EigenTrack(llama, window=WINDOW + 1)
    criteria = [track.stop_when(lambda step: watched_reference.score_step(step) > 2)]
    with pytest.raises(MismatchError, match="window"), track:
        generate(llama, prompt(), 4, stopping_criteria=criteria)


def test_settings_that_do_not_matter(reference: Reference) -> None:
    reference.score(recorded(normal(1, 12, 0), end_tokens=(7,)))
    plain = {"spectra": "per_layer", "layer_scale": "trace"}
    per_layer = Reference.fit([recorded(normal(50, 12, 0), **plain)])
    per_layer.score(recorded(normal(1, 12, 0), **{**plain, "layer_scale": "none"}))


@pytest.mark.parametrize("shape", [(12, 3), (1, 12, 4), (1, 1, 12, 3)])
def test_other_shapes_are_refused(reference: Reference, shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match="B, T, 3"):
        reference.score(torch.zeros(shape))
    step = Step(0, torch.zeros(1), torch.zeros(1, 4), torch.ones(1, dtype=torch.bool), torch.ones(1))
    with pytest.raises(MismatchError, match="3 descriptors, the step 4"):
        reference.score_step(step)


# While a model generates, and in files


@pytest.fixture
def watched_reference(llama: Any) -> Reference:
    recordings = []
    with EigenTrack(llama, window=WINDOW) as track:
        for seed in range(3):
            generate(llama, prompt(4, seed=seed), 24)
            recordings.append(track.recording())
    return Reference.fit(recordings)


def test_live_scores_are_those_of_the_recording(llama: Any, watched_reference: Reference) -> None:
    live: list[Tensor] = []
    with EigenTrack(llama, window=WINDOW) as track:
        track.on_token = lambda step: live.append(watched_reference.score_step(step))
        generate(llama, torch.cat([torch.zeros(1, 5, dtype=torch.int64), prompt()], 1), 24)
    scores = watched_reference.score(track)
    assert same_bits(torch.stack(live, 1), scores) and scores.shape == (1, 23)
    assert same_bits(watched_reference.score(track.recording()), scores)


def test_stopping_by_score(llama: Any, watched_reference: Reference) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        generate(llama, prompt(), 24)
        scores = watched_reference.score(track)[0]
        limit = float(scores[3:].max()) - 1e-6
        first = int((scores > limit).nonzero()[0])
        output = generate(
            llama,
            prompt(),
            24,
            stopping_criteria=[track.stop_when(lambda step: watched_reference.score_step(step) > limit)],
        )
    assert output.shape[1] == 5 + first + 2


def test_a_file_gives_back_every_bit(reference: Reference, tmp_path: Path) -> None:
    reference.save(tmp_path / "x")
    loaded = Reference.load(tmp_path / "x")
    for name in ("median", "scale", "counts", "quantiles", "used"):
        assert same_bits(getattr(loaded, name), getattr(reference, name))
    assert loaded.settings == reference.settings
    assert same_bits(loaded.score(normal(2, 12, 5)), reference.score(normal(2, 12, 5)))


def test_files_that_are_not_references(reference: Reference, tmp_path: Path) -> None:
    file = tmp_path / "x"
    recorded(normal(1, 12, 0)).save(file)
    with pytest.raises(FileFormatError, match=r"no eigentrack\.reference file: its format is eigentrack\.recording"):
        Reference.load(file)
    reference.save(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(FileFormatError, match="damaged"):
        Reference.load(file)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("median", lambda x: x[1:]),
        ("scale", lambda x: x[:, 1:]),
        ("scale", lambda x: x * 0),
        ("scale", lambda x: x * math.nan),
        ("median", lambda x: x * math.nan),
        ("scale", lambda x: x * math.inf),
        ("counts", lambda x: x[1:]),
        ("counts", lambda x: x * torch.tensor([1, 1, 1, -1])),
        ("quantiles", lambda x: x * math.nan),
        ("quantiles", lambda x: x * math.inf),
        ("quantiles", lambda x: x.flip(0)),
        ("quantiles", lambda x: x[1:]),
        ("used", lambda x: x[1:]),
        ("used", lambda x: ~x),
    ],
)
def test_files_that_contradict_themselves(reference: Reference, tmp_path: Path, name: str, change: Any) -> None:
    from safetensors import safe_open

    reference.save(tmp_path / "x")
    tensors = load_file(tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as opened:
        metadata = opened.metadata()
    save_file({**tensors, name: change(tensors[name]).contiguous()}, tmp_path / "y", metadata)
    with pytest.raises(FileFormatError, match="contradicts itself"):
        Reference.load(tmp_path / "y")


# A real model


def read(track: EigenTrack, tokenizer: Any, text: str) -> Recording:
    """48 tokens teacher-forced, without the first, whose massive activation would rule the windows that hold it."""
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :48]
    with torch.no_grad():
        first = track.model(ids[:, :1], use_cache=True)
        track.reset()
        track.model(ids[:, 1:], past_key_values=first.past_key_values)
    return track.recording()


def test_strange_text_stands_out_on_the_real_model(real: tuple[Any, Any]) -> None:
    """Kinds of text far apart, written for this; bench/experiments/reference_ood.py has real data, lower figures."""
    model, tokenizer = real
    with EigenTrack(model, start="prompt") as track:
        reference = Reference.fit([read(track, tokenizer, text) for text in ORDINARY[::2]])
        ordinary = torch.cat([reference.score(read(track, tokenizer, text)).mean(1) for text in ORDINARY[1::2]])
        strange = torch.cat([reference.score(read(track, tokenizer, text)).mean(1) for text in STRANGE])
    auroc = float((strange[:, None] > ordinary).double().mean())
    assert auroc >= 0.85, f"{auroc:.3f}: ordinary {ordinary.tolist()}, strange {strange.tolist()}"
    assert 0.6 < float(ordinary.median()) < 1.6, "ordinary text that was not in the reference is about 1"
