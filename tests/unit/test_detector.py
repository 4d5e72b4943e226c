"""The detector's arithmetic against float64 formulas, step by step against all at once, and what it refuses."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eigentrack import Detector, MismatchError, NotFittedError, Settings
from tests.helpers import generator, normal, same_bits

CELLS = ("rnn", "gru", "lstm")
NAMES = [f"layer{layer}.{name}" for layer in (2, 5) for name in ("entropy", "share_1", "log_trace", "constant")]
F = len(NAMES)


def planted(count: int, seed: int = 0, shift: float = 1.0, longest: int = 12) -> tuple[list[Tensor], list[int]]:
    """Sequences of 1 ... `longest` tokens in odd scales; class 1 is shifted in two descriptors."""
    random = generator(seed)
    scale, offset = torch.tensor([1e-3, 1.0, 30.0, 0.0] * 2), torch.tensor([5.0, 0.0, -900.0, 3.0] * 2)
    sequences, labels = [], []
    for i in range(count):
        length = int(torch.randint(1, longest + 1, (1,), generator=random))
        z = torch.randn(length, F, generator=random)
        z[:, [0, 6]] += shift * (i % 2)
        sequences.append(z * scale + offset)
        labels.append(i % 2)
    return sequences, labels


def fitted(cell: str = "gru", calibration: str | None = None, **options: Any) -> Detector:
    sequences, labels = planted(120)
    detector = Detector(NAMES, cell=cell, hidden=5, projection=3, **options)
    detector.fit(sequences, labels, items=range(120), epochs=6, learning_rate=0.02, progress=False)
    if calibration is not None:
        detector.calibrate(*planted(120, seed=9), method=calibration, false_alarms=0.1)
    return detector


def oracle(detector: Detector, sequence: Tensor, folder: Path) -> Tensor:
    """(T,) risks by the formulas, in float64, from what `save_pretrained` wrote."""
    detector.save_pretrained(folder)
    w = {name: value.double() for name, value in load_file(folder / "detector.safetensors").items()}
    inverse = torch.where(w["deviation"] > 0, 1 / w["deviation"], 0)
    h = c = torch.zeros(detector.hidden, dtype=torch.float64)
    risks = []
    for x in sequence.double():
        if x.isnan().all():
            risks.append(torch.tensor(torch.nan, dtype=torch.float64))
            continue
        z = ((x - w["mean"]) * inverse).clamp(-detector.clip, detector.clip)
        u = w["projection.weight"] @ torch.where(z.isnan(), 0, z) + w["projection.bias"]
        i = w["recurrent.weight_ih_l0"] @ u + w["recurrent.bias_ih_l0"]
        s = w["recurrent.weight_hh_l0"] @ h + w["recurrent.bias_hh_l0"]
        if detector.cell == "rnn":
            h = torch.tanh(i + s)
        elif detector.cell == "gru":
            (ri, zi, ni), (rs, zs, ns) = i.chunk(3), s.chunk(3)
            r, update = torch.sigmoid(ri + rs), torch.sigmoid(zi + zs)
            h = (1 - update) * torch.tanh(ni + r * ns) + update * h
        else:
            a, f, g, o = (i + s).chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(a) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        logit = (w["head.weight"] @ h + w["head.bias"])[0]
        how = detector.calibration
        if how.method == "isotonic":
            risks.append(interpolated(float(logit), w["knots"].tolist(), w["values"].tolist()))
        else:
            risks.append(1 / (1 + torch.exp(-how.slope * logit - how.intercept)))
    return torch.stack(risks)


def interpolated(x: float, knots: list[float], values: list[float]) -> Tensor:
    if x <= knots[0] or x >= knots[-1]:
        return torch.tensor(values[0] if x <= knots[0] else values[-1], dtype=torch.float64)
    i = max(j for j, knot in enumerate(knots) if knot <= x)
    share = (x - knots[i]) / (knots[i + 1] - knots[i])
    return torch.tensor(values[i] + share * (values[i + 1] - values[i]), dtype=torch.float64)


def stepwise(detector: Detector, batch: Tensor) -> Tensor:
    """(B, T, F) -> (B, T), one token at a time."""
    state, risks = None, []
    for t in range(batch.shape[1]):
        risk, state = detector.step(batch[:, t], state)
        risks.append(risk)
    return torch.stack(risks, 1)


def awkward(length: int = 40) -> Tensor:
    """Three sequences: whole, late and interrupted, ended early; values that are missing, infinite and far away."""
    sequences, _ = planted(400, seed=3)
    batch = torch.cat(sequences)[: 3 * length].view(3, length, F).clone()
    batch[1, :4] = batch[1, 9] = torch.nan
    batch[2, 17:] = torch.nan
    batch[0, 3, 1], batch[0, 5, 2], batch[0, 6, 0], batch[0, 7, 3] = torch.nan, torch.inf, -1e30, 1e30
    return batch


@pytest.mark.parametrize("calibration", [None, "platt", "isotonic"])
@pytest.mark.parametrize("cell", CELLS)
def test_batch_and_steps_are_the_formulas(cell: str, calibration: str | None, tmp_path: Path) -> None:
    detector, batch = fitted(cell, calibration), awkward()
    wanted = torch.stack([oracle(detector, sequence, tmp_path) for sequence in batch])
    assert wanted.isnan().sum() == 5 + 23 and wanted.nan_to_num(0).std() > 0.05, "the oracle says something"
    torch.testing.assert_close(detector.score(batch).double(), wanted, rtol=0, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(stepwise(detector, batch).double(), wanted, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("cell", CELLS)
def test_steps_are_the_batch_over_a_long_stream(cell: str) -> None:
    detector = fitted(cell)
    batch = torch.cat(planted(200, seed=5)[0])[:1000].view(2, 500, F)
    torch.testing.assert_close(stepwise(detector, batch), detector.score(batch), rtol=0, atol=1e-5)


def test_a_step_leaves_its_state_alone_and_can_be_taken_again() -> None:
    detector, batch = fitted("lstm"), awkward()
    _, state = detector.step(batch[:, 0])
    kept = state.clone()
    first = detector.step(batch[:, 1], state)
    again = detector.step(batch[:, 1], state)
    assert same_bits(state, kept) and same_bits(first[0], again[0]) and same_bits(first[1], again[1])
    absent = torch.full((3, F), torch.nan)
    risk, after = detector.step(absent, state)
    assert risk.isnan().all() and same_bits(after, state)


def test_a_list_and_a_padded_batch_say_the_same() -> None:
    detector, batch = fitted(), awkward()
    sequences = [batch[0], batch[1, 4:], batch[2, :17]]
    for risk, whole in zip(detector.score(sequences), detector.score(batch), strict=True):
        torch.testing.assert_close(risk, whole[~whole.isnan() | (torch.arange(40) == 9) & (len(risk) == 36)],
                                   rtol=0, atol=1e-6, equal_nan=True)  # fmt: skip


def test_the_shortest_sequences() -> None:
    detector = fitted()
    one, none = planted(1)[0][0][:1], torch.empty(0, F)
    risks = detector.score([one, none, one])
    assert [tuple(risk.shape) for risk in risks] == [(1,), (0,), (1,)]
    torch.testing.assert_close(risks[0], detector.step(one)[0], rtol=0, atol=1e-6)
    assert detector.score([]) == [] and detector.score([none])[0].shape == (0,)
    assert detector.score(torch.empty(2, 0, F)).shape == (2, 0) and detector.score(torch.empty(0, 3, F)).shape == (0, 3)


def test_a_sequence_does_not_depend_on_the_others() -> None:
    detector, batch = fitted(), awkward()
    other = batch.clone()
    other[1:] = 1e20
    assert same_bits(detector.score(batch)[0], detector.score(other)[0])
    torch.testing.assert_close(stepwise(detector, batch)[2:], stepwise(detector, batch[2:]), rtol=0, atol=1e-6,
                               equal_nan=True)  # fmt: skip


def test_other_dtypes_gradients_and_autocast_change_nothing() -> None:
    detector, batch = fitted(), awkward()[:1, :6]
    wanted = detector.score(batch)
    assert same_bits(detector.score(batch.double()), wanted)
    wants_gradient = batch.clone().requires_grad_()
    risk, state = detector.step(wants_gradient[:, 0])
    assert not risk.requires_grad and not state.requires_grad and not detector.score(wants_gradient).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(stepwise(detector, batch), stepwise(detector, batch))
        torch.testing.assert_close(stepwise(detector, batch), wanted, rtol=0, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(detector.score(batch), wanted, rtol=0, atol=1e-6, equal_nan=True)
    with torch.inference_mode():
        inside, state = detector.step(batch[:, 0])
    torch.testing.assert_close(inside, wanted[:, 0], rtol=0, atol=1e-6)
    detector.step(batch[:, 1], state)


def test_it_is_small() -> None:
    sizes = [Detector([str(i) for i in range(240)], cell=cell).parameters for cell in CELLS]
    assert sizes == [241 * 16 + gates * (16 * 32 + 32) + 17 for gates in (1, 3, 4)] and max(sizes) < 6200


def test_looking_at_a_detector_draws_no_random_numbers(tmp_path: Path) -> None:
    detector = fitted()
    before = torch.get_rng_state()
    detector.save_pretrained(tmp_path)
    assert Detector.from_pretrained(tmp_path).parameters == detector.parameters
    fitted()
    assert same_bits(torch.get_rng_state(), before)


def test_standardisation_leaves_outliers_and_constants_out(tmp_path: Path) -> None:
    sequences, labels = planted(120)
    for sequence in sequences:
        sequence[0, 2] = -87e3  # as the log_trace of windows of one row
    detector = Detector(NAMES, hidden=4, projection=2)
    detector.fit(sequences, labels, items=range(120), epochs=1, progress=False)
    detector.save_pretrained(tmp_path)
    found = load_file(tmp_path / "detector.safetensors")
    torch.testing.assert_close(found["mean"][2], torch.tensor(-900.0), rtol=0, atol=5)
    torch.testing.assert_close(found["deviation"][2], torch.tensor(30.0), rtol=0.1, atol=0)
    assert found["deviation"][[3, 7]].tolist() == [0, 0]
    changed = sequences[0].clone()
    changed[:, 3] = 1e6
    assert same_bits(detector.score([changed])[0], detector.score([sequences[0]])[0]), "a constant says nothing"


def test_a_value_that_nobody_has_seen_is_clipped() -> None:
    detector = fitted(clip=2.0)
    near, far = planted(1)[0][0][:1], planted(1)[0][0][:1]
    near[0, 1], far[0, 1] = 50.0, 1e9
    assert same_bits(detector.score([near])[0], detector.score([far])[0])


@pytest.mark.parametrize("ask", ["score", "step", "calibrate", "save_pretrained", "threshold", "stepper"])
def test_nothing_works_before_fit(ask: str, tmp_path: Path) -> None:
    detector, (sequences, labels) = Detector(NAMES), planted(4)
    calls = {
        "score": lambda: detector.score(sequences),
        "step": lambda: detector.step(sequences[0][:1]),
        "calibrate": lambda: detector.calibrate(sequences, labels),
        "save_pretrained": lambda: detector.save_pretrained(tmp_path / "new"),
        "threshold": lambda: detector.threshold,
        "stepper": lambda: detector.stepper(torch.device("cpu")),
    }
    with pytest.raises(NotFittedError):
        calls[ask]()
    assert not detector.fitted and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "names"),
        ("entropy", {}, "names"),
        (["a", "a"], {}, "differ"),
        ([1, 2], {}, "names"),
        (["a"], {"window": 0}, "window"),
        (["a"], {"window": 129}, "window"),
        (["a"], {"window": 2.0}, "window"),
        (["a"], {"cell": "transformer"}, "cell"),
        (["a"], {"hidden": 0}, "hidden"),
        (["a"], {"projection": 10_000}, "projection"),
        (["a"], {"clip": 0.0}, "clip"),
        (["a"], {"clip": float("nan")}, "clip"),
    ],
)
def test_impossible_detectors(names: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        Detector(names, **options)


def monitor_settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "model": "LlamaForCausalLM",
        "names": tuple(NAMES),
        "taps": ("layer2", "layer5"),
        "layers": (2, 5),
        "window": 8,
        "spectra": "per_layer",
        "start": "answer",
        "normalize": "rms",
        "center": True,
        "noise": "median",
        "layer_scale": "trace",
        "end_tokens": (2,),
    }
    return Settings(**(values | changes))


def test_settings_give_the_window_and_may_not_contradict_it() -> None:
    assert Detector(NAMES, settings=monitor_settings()).window == 8
    with pytest.raises(MismatchError, match="window 9"):
        Detector(NAMES, window=9, settings=monitor_settings())
    with pytest.raises(MismatchError, match="'other'"):
        Detector([*NAMES, "other"], settings=monitor_settings())


@pytest.mark.parametrize(
    "changes", [{"window": 9}, {"normalize": None}, {"center": False}, {"noise": "trace"}, {"start": "prompt"}]
)
def test_a_monitor_that_is_set_otherwise_is_refused(changes: dict[str, Any]) -> None:
    detector = Detector(NAMES, settings=monitor_settings())
    with pytest.raises(MismatchError, match=next(iter(changes))):
        detector.columns(monitor_settings(**changes))


def test_descriptors_are_found_by_name() -> None:
    wide = tuple(f"layer{layer}.{name}" for layer in (5, 0, 2) for name in ("log_trace", "entropy"))
    settings = monitor_settings(names=wide, taps=("layer0", "layer2", "layer5"), layers=(0, 2, 5))
    detector = Detector(["layer2.entropy", "layer5.log_trace"], window=8)
    assert detector.columns(settings) == [5, 0]
    detector.fit([normal(4, 2, seed=i) + i % 2 for i in range(40)], [i % 2 for i in range(40)], items=range(40),
                 epochs=2, progress=False)  # fmt: skip
    stepper = detector.stepper(torch.device("cpu"), settings)
    x = normal(3, 6)
    x[:, 1] = torch.nan  # not the detector's
    risk, _ = stepper(x, stepper.start(3), torch.zeros(3, 1, dtype=torch.bool))
    torch.testing.assert_close(risk[:, 0], detector.step(x[:, [5, 0]])[0], rtol=0, atol=1e-6)
    with pytest.raises(MismatchError, match="layer9"):
        Detector(["layer9.entropy"]).columns(settings)


def test_shapes_that_do_not_fit() -> None:
    detector = fitted()
    for wrong in (torch.zeros(2, F + 1), torch.zeros(F), torch.zeros(2, 3, F)):
        with pytest.raises(MismatchError, match=str(F)):
            detector.step(wrong)
    with pytest.raises(MismatchError, match="state"):
        detector.step(torch.zeros(2, F), torch.zeros(3, 5))
    for several in ([torch.zeros(2, F - 1)], [torch.zeros(F)], [None], torch.zeros(2, F)):
        with pytest.raises(MismatchError):
            detector.score(several)  # type: ignore[arg-type]


def bits_of(detector: Detector, folder: Path) -> str:
    detector.save_pretrained(folder)
    return hashlib.sha256((folder / "detector.safetensors").read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_bits(tmp_path: Path, set_threads: Any) -> None:
    first = bits_of(fitted(), tmp_path)
    torch.rand(7)
    set_threads(2)
    assert bits_of(fitted(), tmp_path) == first
    sequences, labels = planted(120)
    detector = Detector(NAMES, hidden=5, projection=3)
    detector.fit(sequences, labels, items=range(120), epochs=6, learning_rate=0.02, progress=False, seed=1)
    assert bits_of(detector, tmp_path) != first
