"""A detector on the monitor: a risk per token while the model generates, equal to that of the finished text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import eigentrack
from eigentrack import (
    Detector,
    EigenTrack,
    EigenTrackError,
    FileFormatError,
    MismatchError,
    ModelIdentity,
    NotFittedError,
    Step,
    TapError,
)
from tests.helpers import normal, same_bits
from tests.integration.conftest import tiny_gpt2, tiny_llama
from tests.integration.test_assisted import REPEATING, helpers
from tests.integration.test_monitor import WINDOW, generate, prompt
from tests.integration.test_recording import rewritten
from tests.unit.test_detector_file import Words

CELLS = ("rnn", "gru", "lstm")


def detector_for(
    model: Any, cell: str = "gru", names: list[str] | None = None, false_alarms: float = 0.1, **options: Any
) -> Detector:
    """Fitted on noise around what the model's own answers look like, so that its risks are all over the place."""
    options = {"window": WINDOW, "layers": [1, 3], **options}
    with EigenTrack(model, **options) as track:
        generate(model, prompt(4), 30)
    chosen = track.names if names is None else names
    columns = [track.names.index(name) for name in chosen]
    seen = track.descriptors[..., columns].nan_to_num(0)
    spread = seen.flatten(0, 1).std(0) + 1e-3
    sequences = [seen[i % 4] + spread * (normal(seen.shape[1], len(chosen), seed=i) + 0.2 * (i % 2)) for i in range(80)]
    labels = [i % 2 for i in range(80)]
    detector = Detector(chosen, settings=track.settings, model=ModelIdentity.of(model), cell=cell, hidden=6)
    detector.fit(sequences, labels, items=range(80), epochs=8, learning_rate=0.02, progress=False)
    if false_alarms:
        detector.calibrate(sequences, labels, false_alarms=false_alarms)
    return detector


@pytest.fixture(scope="module")
def detector() -> Detector:
    return detector_for(tiny_llama())


def assert_risk_is_the_batch_s(track: EigenTrack, detector: Detector) -> None:
    wanted = detector.score(track)
    assert torch.equal(track.risk.isnan(), ~track.watched)
    torch.testing.assert_close(track.risk, wanted, rtol=0, atol=1e-5, equal_nan=True)
    assert wanted.nan_to_num(0).std() > 1e-3, "the risks differ"


@pytest.mark.parametrize("spectra", ["per_layer", "joint"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_stream_is_the_batch(llama: Any, cell: str, spectra: str) -> None:
    detector = detector_for(llama, cell, spectra=spectra)
    steps: list[Step] = []
    with EigenTrack(llama, detector=detector, on_token=steps.append) as track:
        generate(llama, prompt(3), 25, do_sample=False)
        assert_risk_is_the_batch_s(track, detector)
    assert track.risk.shape == (3, 24)
    for t, step in enumerate(steps):
        assert step.risk is not None and same_bits(step.risk, track.risk[:, t])
    alone = detector.score(track.descriptors[:1])  # not generated alone: the model itself rounds otherwise then
    torch.testing.assert_close(alone[0], track.risk[0], rtol=0, atol=1e-5)


def test_the_monitor_is_set_as_the_detector_was(llama: Any) -> None:
    options = {"window": 5, "layers": [0, 4], "normalize": None, "center": False, "noise": "trace", "start": "prompt"}
    detector = detector_for(llama, tap="mlp", **options)
    track = EigenTrack(llama, detector=detector)
    assert track.settings == detector.settings and track.layers == [0, 4] and track.names[0].startswith("layer0.mlp.")
    assert EigenTrack(llama, window=5, center=False, detector=detector).settings == detector.settings
    plain = vars(EigenTrack(llama).settings)
    wanted = {"window": 32, "spectra": "per_layer", "start": "answer", "normalize": "rms", "center": True}
    assert plain.items() >= (wanted | {"noise": "median", "layer_scale": "trace", "layers": (2, 5)}).items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": WINDOW + 1}, "window"),
        ({"spectra": "joint"}, "spectra"),
        ({"start": "prompt"}, "start"),
        ({"normalize": None}, "normalize"),
        ({"center": False}, "center"),
        ({"noise": "trace"}, "noise"),
        ({"layers": [1, 4]}, "layer3"),
        ({"tap": "mlp"}, "layer1"),
    ],
)
def test_contradictions(llama: Any, detector: Detector, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        EigenTrack(llama, **options, detector=detector)


def test_more_layers_than_the_detector_needs(llama: Any, detector: Detector) -> None:
    with EigenTrack(llama, layers="all", detector=detector) as track:
        generate(llama, prompt(2), 20)
        assert_risk_is_the_batch_s(track, detector)
    with EigenTrack(llama, detector=detector) as fewer:
        generate(llama, prompt(2), 20)
    torch.testing.assert_close(fewer.risk, track.risk, rtol=0, atol=1e-5)


def test_a_few_descriptors_in_any_order(llama: Any) -> None:
    detector = detector_for(llama, names=["layer3.share_1", "layer1.log_trace", "layer3.entropy"])
    with EigenTrack(llama, detector=detector) as track:
        generate(llama, prompt(2), 20)
        assert_risk_is_the_batch_s(track, detector)


def test_modules_are_found_by_their_names(llama: Any) -> None:
    named = [llama.model.layers[1].self_attn.o_proj, llama.model.layers[4].mlp]
    detector = detector_for(llama, layers="every:3", modules=named)
    track = EigenTrack(llama, detector=detector)
    assert track.settings == detector.settings
    with track:
        generate(llama, prompt(), 12)
        assert_risk_is_the_batch_s(track, detector)
    assert EigenTrack(llama, modules=named, detector=detector).settings == detector.settings
    detector.settings = track.settings.__class__(**(vars(track.settings) | {"taps": ("model.nowhere", "model.norm")}))
    detector.model = None
    with pytest.raises(TapError, match=r"model\.nowhere"):
        EigenTrack(llama, detector=detector)


def test_a_detector_without_settings(llama: Any, detector: Detector, tmp_path: Path) -> None:
    bare = Detector(["layer2.entropy", "layer5.entropy"], window=WINDOW)
    bare.fit([normal(9, 2, seed=i) + i % 2 for i in range(40)], [0, 1] * 20, items=range(40), epochs=1, progress=False)
    with EigenTrack(llama, detector=bare) as track:
        generate(llama, prompt(), 9)
    assert track.window == WINDOW and track.layers == [2, 5] and track.risk.shape == (1, 8)


def test_another_model_is_refused_and_other_weights_warn(detector: Detector) -> None:
    with pytest.raises(MismatchError, match="architecture llama and gpt2"):
        EigenTrack(tiny_gpt2(), detector=detector)
    with pytest.raises(MismatchError, match="depth 6 and 7"):
        EigenTrack(tiny_llama(depth=7), detector=detector)
    tuned = tiny_llama()
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.1)
    named = detector_for(tiny_llama())
    named.model = ModelIdentity.of(tiny_llama(), Words("a", "b"))
    EigenTrack(tiny_llama(), detector=named, tokenizer=Words("a", "b"))
    with pytest.raises(MismatchError, match="tokenizer"):
        EigenTrack(tiny_llama(), detector=named, tokenizer=Words("b", "a"))
    with pytest.warns(RuntimeWarning, match="other weights") as caught:
        EigenTrack(tuned, detector=detector)
    assert caught[0].filename == __file__


def test_before_fit_and_without_a_detector(llama: Any) -> None:
    with pytest.raises(NotFittedError, match="fit"):
        EigenTrack(llama, detector=Detector(["layer5.entropy"]))
    steps: list[Step] = []
    with EigenTrack(llama, on_token=steps.append) as track:
        generate(llama, prompt(), 4)
    assert all(step.risk is None for step in steps)
    with pytest.raises(EigenTrackError, match="without a detector"):
        _ = track.risk
    with pytest.raises(EigenTrackError, match="without a detector"):
        track.stop_above(0.5)


# How the text goes


def test_ended_sequences_have_no_risk(llama: Any, detector: Detector) -> None:
    llama.generation_config.eos_token_id = list(range(10, 14))
    with EigenTrack(llama, detector=detector) as track:
        output = llama.generate(prompt(6), attention_mask=torch.ones(6, 5), max_new_tokens=30, do_sample=True)
    assert len(set(track.lengths.tolist())) > 1, f"all answers ended together: {output}"
    assert_risk_is_the_batch_s(track, detector)


def test_padded_prompts(llama: Any) -> None:
    detector = detector_for(llama, start="prompt")
    padded = torch.cat([torch.cat([torch.tensor([[0, 0]]), prompt(1, 3)], 1), prompt(1, 5, seed=4)])
    with EigenTrack(llama, detector=detector) as track:
        generate(llama, padded, 15, do_sample=False)
        assert_risk_is_the_batch_s(track, detector)
    assert track.risk[0, :2].isnan().all() and not track.risk[1].isnan().any()
    without = detector.score(track.descriptors[:1, 2:])
    torch.testing.assert_close(without[0], track.risk[0, 2:], rtol=0, atol=1e-5)


def test_each_request_begins_anew(llama: Any, detector: Detector) -> None:
    risks = []
    with EigenTrack(llama, detector=detector) as track:
        for batch in (1, 3, 1):
            generate(llama, prompt(3)[:batch], 12)
            risks.append(track.risk)
    assert same_bits(risks[0], risks[2]) and risks[1].shape == (3, 11)


def test_reset_in_mid_answer(llama: Any, detector: Detector) -> None:
    def forget(step: Step) -> None:
        if track.steps == 8 and not cut:
            cut.append(step.index)
            track.reset()

    cut: list[int] = []
    with EigenTrack(llama, detector=detector, on_token=forget) as track:
        generate(llama, prompt(2), 20)
        assert_risk_is_the_batch_s(track, detector)
    assert cut == [7] and track.steps == 11


def test_a_kept_cache_goes_on(llama: Any) -> None:
    detector = detector_for(llama, start="prompt")
    cache = DynamicCache()
    with EigenTrack(llama, detector=detector) as track, torch.no_grad():
        ids = prompt(1, 6)
        for part in (ids[:, :4], ids[:, 4:], prompt(1, 3, seed=2)):
            llama(part, past_key_values=cache)
        assert_risk_is_the_batch_s(track, detector)
    assert track.steps == 9


@pytest.mark.parametrize("which", [0, 1], ids=["prompt lookup", "assistant"])
def test_rejected_candidates_leave_no_trace(llama: Any, detector: Detector, which: int) -> None:
    given = {"attention_mask": torch.ones_like(REPEATING), "max_new_tokens": 40, "do_sample": False}
    with EigenTrack(llama, detector=detector) as plain:
        llama.generate(REPEATING, **given, eos_token_id=None)
    with EigenTrack(llama, detector=detector) as track:
        llama.generate(REPEATING, **given, eos_token_id=None, **helpers(llama)[which])
        assert_risk_is_the_batch_s(track, detector)
    torch.testing.assert_close(track.risk, plain.risk, rtol=0, atol=1e-3)


def test_inside_inference_mode_autocast_and_out_of_them(llama: Any, detector: Detector) -> None:
    cache = DynamicCache()
    with EigenTrack(llama, detector=detector) as track:
        with torch.no_grad():
            llama(prompt(), past_key_values=cache)
        for token in range(3, 9):
            ids = torch.tensor([[token]])
            if token % 3 == 0:
                with torch.inference_mode():
                    llama(ids, past_key_values=cache)
            elif token % 3 == 1:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=True), torch.no_grad():
                    track._take([normal(1, 1, 32, seed=token)] * 2, 0)
            else:
                llama(ids, past_key_values=cache)  # gradients are on
        assert_risk_is_the_batch_s(track, detector)
    assert track.steps == 6 and not track.risk.requires_grad


def test_a_long_answer_outgrows_the_buffers(llama: Any, detector: Detector) -> None:
    llama.config.eos_token_id = llama.generation_config.eos_token_id = None
    with EigenTrack(llama, detector=detector) as track:
        generate(llama, prompt(), 300)
        assert_risk_is_the_batch_s(track, detector)
    assert track.steps == 299


def test_compiled(llama: Any, detector: Detector) -> None:
    with EigenTrack(llama, detector=detector) as plain:
        generate(llama, prompt(2), 6, do_sample=False, suppress_tokens=None)
    torch.compiler.reset()
    with EigenTrack(llama, detector=detector) as track, torch.no_grad():
        compiled = torch.compile(llama, backend="eager")
        cache, ids = DynamicCache(), prompt(2)
        for t in range(6):
            ids = compiled(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            assert track.watching == (t > 0)
        assert_risk_is_the_batch_s(track, detector)
    torch.testing.assert_close(track.risk, plain.risk, rtol=0, atol=1e-4)


# Acting on it


def test_stop_above_ends_the_sequence_that_exceeds_it(llama: Any, detector: Detector) -> None:
    with EigenTrack(llama, detector=detector) as track:
        whole = generate(llama, prompt(3), 30)
    limit = float(track.risk.max(1).values.median())  # one of three exceeds it
    with EigenTrack(llama, detector=detector) as stopped:
        output = generate(llama, prompt(3), 30, stopping_criteria=[stopped.stop_above(limit)])
    exceeds = track.risk > limit
    assert exceeds.any(1).tolist().count(True) == 1
    for row in range(3):
        steps = int(exceeds[row].int().argmax()) + 1 if exceeds[row].any() else track.steps
        assert int(stopped.lengths[row]) == min(steps, stopped.steps)
        assert torch.equal(output[row, : 5 + steps], whole[row, : 5 + steps])


def test_stop_above_takes_the_detector_s_threshold(llama: Any) -> None:
    detector = detector_for(llama, false_alarms=0.9)
    with EigenTrack(llama, detector=detector) as track:
        criterion = track.stop_above()
        generate(llama, prompt(3), 30, stopping_criteria=[criterion])
    exceeds = track.risk > detector.threshold
    assert exceeds.any()
    for row in range(3):
        first = int(exceeds[row].int().argmax()) if exceeds[row].any() else track.steps - 1
        assert int(track.lengths[row]) == first + 1
    track = EigenTrack(llama, detector=detector_for(llama, false_alarms=0))
    with pytest.raises(NotFittedError, match="threshold"):
        track.stop_above()
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(EigenTrackError, match="from 0 to 1"):
            track.stop_above(wrong)


# Keeping it


def test_recordings_keep_the_risk(llama: Any, detector: Detector, tmp_path: Path) -> None:
    llama.generation_config.eos_token_id = list(range(10, 14))
    with EigenTrack(llama, detector=detector) as track:
        llama.generate(prompt(6), attention_mask=torch.ones(6, 5), max_new_tokens=20, do_sample=True)
    track.save(tmp_path / "a")
    loaded = eigentrack.load(tmp_path / "a")
    assert loaded.risk is not None and same_bits(loaded.risk, track.risk)
    torch.testing.assert_close(detector.score(loaded), track.risk, rtol=0, atol=1e-5, equal_nan=True)
    with EigenTrack(llama, window=WINDOW) as plain:
        generate(llama, prompt(), 5)
    plain.save(tmp_path / "b")
    assert eigentrack.load(tmp_path / "b").risk is None
    with pytest.raises(MismatchError, match="layer1"):
        detector.score(plain)


@pytest.mark.parametrize("wrong", ["shape", "dtype", "unwatched"])
def test_recordings_with_impossible_risks(llama: Any, detector: Detector, tmp_path: Path, wrong: str) -> None:
    llama.generation_config.eos_token_id = list(range(10, 30))
    with EigenTrack(llama, detector=detector) as track:
        llama.generate(prompt(6), attention_mask=torch.ones(6, 5), max_new_tokens=20, do_sample=True)
    assert not track.watched.all()
    track.save(tmp_path / "a")

    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        risk = tensors["risk"]
        changed = {"shape": risk[:, 1:].clone(), "dtype": risk.double(), "unwatched": torch.zeros_like(risk)}
        tensors["risk"] = changed[wrong]

    rewritten(tmp_path / "a", change)
    with pytest.raises(FileFormatError, match="risk"):
        eigentrack.load(tmp_path / "a")
