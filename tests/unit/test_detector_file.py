"""What is saved comes back to the bit, whole or not at all; what is no detector is refused with the reason."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eigentrack
from eigentrack import Detector, FileFormatError, MismatchError, ModelIdentity, detector_file
from tests.helpers import normal, same_bits
from tests.unit.test_detector import CELLS, NAMES, F, awkward, fitted, monitor_settings

FILE = "detector.safetensors"
IDENTITY = ModelIdentity("llama", 576, 30, 49152, "0123", "4567")


@pytest.mark.parametrize("calibration", [None, "platt", "isotonic"])
@pytest.mark.parametrize("cell", CELLS)
def test_it_comes_back_to_the_bit(cell: str, calibration: str | None, tmp_path: Path) -> None:
    options = {"settings": monitor_settings(), "model": IDENTITY, "clip": 4.0}
    detector = fitted(cell, calibration, **options)  # type: ignore[arg-type]
    detector.save_pretrained(tmp_path / "new" / "folder")
    found = Detector.from_pretrained(tmp_path / "new" / "folder")
    for name in ("names", "window", "settings", "model", "cell", "hidden", "projection", "clip", "parameters"):
        assert getattr(found, name) == getattr(detector, name), name
    assert same_bits(found.score(awkward()), detector.score(awkward()))
    assert same_bits(found.step(awkward()[:, 0])[0], detector.step(awkward()[:, 0])[0])
    if calibration is not None:
        assert found.threshold == detector.threshold
    found.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == (tmp_path / "new" / "folder" / FILE).read_bytes()


def test_without_settings_and_model(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path)
    found = Detector.from_pretrained(str(tmp_path))
    assert (found.settings, found.model, found.window) == (None, None, None)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted().save_pretrained(tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("eigentrack.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        fitted("lstm").save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before and [one.name for one in tmp_path.iterdir()] == [FILE]


def test_shipped_detectors_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector_file, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    fitted().save_pretrained(tmp_path / "shipped" / "tiny-1")
    assert detector_file.shipped() == ["tiny-1"]
    assert Detector.from_pretrained("tiny-1").cell == "gru"
    fitted("lstm").save_pretrained("tiny-1")
    assert Detector.from_pretrained("tiny-1").cell == "lstm", "a folder that exists comes first"
    for name in ("tiny-2", "../shipped/tiny-1", "", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="tiny-1"):
            Detector.from_pretrained(name)


def test_what_the_package_ships_can_be_loaded() -> None:
    for name in detector_file.shipped():
        detector = Detector.from_pretrained(name)
        assert detector.threshold > 0 and detector.settings is not None and detector.model is not None
        size = sum(path.stat().st_size for path in (detector_file.SHIPPED / name).iterdir())
        assert size < 200_000


# Hostile files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    detector = fitted(calibration="isotonic", settings=monitor_settings(), model=IDENTITY)
    detector.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    """Lets `change` edit tensors and described fields of the file."""
    path = folder / FILE
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    fields = {name: json.loads(text) for name, text in header.items() if name not in ("format", "format_version")}
    tensors = load_file(path)
    change(tensors, fields)
    kept = {name: header[name] for name in ("format", "format_version")}
    save_file(tensors, path, kept | {name: json.dumps(value) for name, value in fields.items()})


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(FileFormatError, match=message) as caught:
        Detector.from_pretrained(folder)
    assert FILE in str(caught.value), "it says which file"


def test_every_truncation_is_refused(saved: Path) -> None:
    content = (saved / FILE).read_bytes()
    for length in [*range(64), *range(64, len(content), 97), len(content) - 1]:
        (saved / FILE).write_bytes(content[:length])
        refuses(saved, "safetensors")


def test_a_flipped_byte_is_refused_or_a_detector(saved: Path) -> None:
    content = (saved / FILE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(8), *range(8, end, 13)]:
        (saved / FILE).write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            detector = Detector.from_pretrained(saved)
        except FileFormatError:
            continue
        assert detector.score(awkward()).shape == (3, 40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"\x80\x04\x95pickle", "damaged"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "damaged"),
        (b"\x02" + bytes(7) + b"{}", "no eigentrack.detector"),
        (b"\x02" + bytes(7) + b"[]", "damaged"),
    ],
)
def test_foreign_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    refuses(tmp_path, message)


def test_other_files_of_ours(saved: Path) -> None:
    header = {"format": "eigentrack.reference", "format_version": "1"}
    save_file({"a": torch.zeros(1)}, saved / FILE, header)
    refuses(saved, "no eigentrack.detector file")
    save_file({"a": torch.zeros(1)}, saved / FILE, {"format": "eigentrack.detector", "format_version": "2"})
    refuses(saved, "update")
    save_file({"a": torch.zeros(1)}, saved / FILE, {"format": "eigentrack.detector", "format_version": "1"})
    refuses(saved, "belong")


def set_field(name: str, value: Any) -> Any:
    return lambda tensors, fields: fields.__setitem__(name, value)


def set_part(name: str, part: str, value: Any) -> Any:
    return lambda tensors, fields: fields[name].__setitem__(part, value)


def set_tensor(name: str, value: Tensor) -> Any:
    return lambda tensors, fields: tensors.__setitem__(name, value)


CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "no names": (set_field("names", []), "names"),
    "a name too few": (set_field("names", NAMES[:-1]), "projection.weight|mean"),
    "a name twice": (set_field("names", NAMES[:1] * F), "names"),
    "names that are none": (set_field("names", [1] * F), "names"),
    "a name that is unknown": (set_field("names", [*NAMES[:-1], "x"]), "settings"),
    "another window": (set_field("window", 9), "settings"),
    "an impossible window": (set_field("window", 0), "windows of 0"),
    "a window of text": (set_field("window", "8"), "windows of"),
    "half settings": (set_field("settings", {"window": 8}), "settings"),
    "a field more": (set_field("surprise", 1), "surprise"),
    "a field less": (lambda tensors, fields: fields.pop("clip"), "describes"),
    "half a model": (set_field("model", {"width": 1}), "model"),
    "a model of text": (set_part("model", "width", "wide"), "model"),
    "an unknown cell": (set_part("network", "cell", "transformer"), "network"),
    "another cell": (set_part("network", "cell", "lstm"), "recurrent"),
    "a cell that is a list": (set_part("network", "cell", ["gru"]), "network"),
    "another hidden size": (set_part("network", "hidden", 6), "says"),
    "a huge hidden size": (set_part("network", "hidden", 10**12), "network"),
    "a size that is true": (set_part("network", "projection", True), "network"),
    "more in the network": (set_part("network", "bias", False), "network"),
    "no network": (set_field("network", None), "network"),
    "clip of 0": (set_field("clip", 0.0), "clip"),
    "clip without end": (set_field("clip", math.inf), "clip"),
    "NaN in the weights": (set_tensor("head.weight", torch.full((1, 5), torch.nan)), "not finite"),
    "infinite means": (set_tensor("mean", torch.full((F,), torch.inf)), "not finite"),
    "negative deviations": (set_tensor("deviation", torch.full((F,), -1.0)), "negative"),
    "weights in float64": (set_tensor("mean", torch.zeros(F, dtype=torch.float64)), "belong"),
    "a tensor more": (set_tensor("more", torch.zeros(1)), "belong"),
    "knots that fall": (set_tensor("knots", torch.arange(9.0).flip(0)), "says|knots"),
    "one knot": (lambda tensors, fields: tensors.update(knots=torch.zeros(1), values=torch.zeros(1)), "knots"),
    "knots of two dimensions": (set_tensor("knots", torch.zeros(2, 2)), "knots"),
    "values above 1": (lambda tensors, fields: tensors.update(values=tensors["values"] + 1), "values"),
    "an unknown method": (set_part("calibration", "method", "guess"), "guess"),
    "no method": (set_part("calibration", "method", None), "None"),
    "half a calibration": (set_field("calibration", {"method": "platt"}), "calibration"),
    "knots without a curve": (set_part("calibration", "method", "platt"), "knots"),
    "an impossible threshold": (set_part("calibration", "threshold", 1.5), "impossible"),
    "a threshold that is none": (set_part("calibration", "threshold", math.nan), "numbers"),
    "a falling line": (set_part("calibration", "slope", -1.0), "impossible"),
    "a rate of text": (set_part("calibration", "false_alarms", "0.05"), "numbers"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_named(saved: Path, case: str) -> None:
    change, message = CONTRADICTIONS[case]
    rewrite(saved, lambda tensors, fields: None)
    Detector.from_pretrained(saved)
    rewrite(saved, change)
    refuses(saved, message)


# The model it was trained for


class Model(nn.Module):
    def __init__(self, seed: int = 0, **config: Any) -> None:
        super().__init__()
        values = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 50} | config
        self.config = type("Config", (), values)
        self.weight = nn.Parameter(normal(50, 8, seed=seed))
        self.cube = nn.Parameter(normal(3, 4, 5, seed=seed))
        self.scalar = nn.Parameter(torch.tensor(1.0))


class Words:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}


def test_a_model_is_recognised() -> None:
    identity = ModelIdentity.of(Model(), Words("a", "b"))
    assert identity == ModelIdentity.of(Model(), Words("a", "b"))
    assert (identity.architecture, identity.width, identity.depth, identity.vocabulary) == ("llama", 8, 2, 50)
    assert ModelIdentity.of(Model().to(torch.bfloat16)).weights == identity.weights
    assert ModelIdentity.of(Model(seed=1)).weights != identity.weights
    assert ModelIdentity.of(Model(), Words("b", "a")).tokenizer != identity.tokenizer
    assert ModelIdentity.of(nn.Linear(2, 2)).architecture == "Linear"
    assert ModelIdentity.of(Model().to("meta")).weights != identity.weights


@pytest.mark.parametrize("name", ["weight", "cube", "scalar"])
def test_training_a_parameter_changes_the_fingerprint(name: str) -> None:
    before = ModelIdentity.of(Model()).weights
    changed = Model()
    with torch.no_grad():
        getattr(changed, name).mul_(1.05)
    assert ModelIdentity.of(changed).weights != before


@pytest.mark.parametrize(
    "changes", [{"model_type": "gpt2"}, {"hidden_size": 9}, {"num_hidden_layers": 3}, {"vocab_size": 51}]
)
def test_another_model_is_refused(changes: dict[str, Any]) -> None:
    detector = Detector(NAMES, model=ModelIdentity.of(Model(), Words("a")))
    with pytest.raises(MismatchError, match=str(next(iter(changes.values())))):
        detector.check_model(Model(**changes))


def test_another_tokenizer_is_refused_where_it_is_known() -> None:
    detector = Detector(NAMES, model=ModelIdentity.of(Model(), Words("a", "b")))
    detector.check_model(Model())
    detector.check_model(Model(), Words("a", "b"))
    with pytest.raises(MismatchError, match="tokenizer"):
        detector.check_model(Model(), Words("b", "a"))


@pytest.mark.filterwarnings("error")
def test_other_weights_warn() -> None:
    detector = Detector(NAMES, model=ModelIdentity.of(Model()))
    detector.check_model(Model())
    with pytest.raises(RuntimeWarning, match="other weights"):
        detector.check_model(Model(seed=1))
    Detector(NAMES).check_model(Model(seed=1))


def test_what_the_package_exports() -> None:
    assert {"Detector", "ModelIdentity", "NotFittedError", "TrainingHistory"} <= set(eigentrack.__all__)
