"""Recordings: what was watched, kept in a file to the bit; files that are not so are refused with words."""

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eigentrack
import rmtkernels
from eigentrack import EigenTrack, EigenTrackError, FileFormatError, Recording
from tests.helpers import same_bits
from tests.integration.test_monitor import WINDOW, generate, prompt

TENSORS = ("descriptors", "eigenvalues", "tokens", "watched")


@pytest.fixture
def track(llama: Any) -> EigenTrack:
    """A batch of which the first sequence ends early: some steps of it are NaN."""
    free = generate(llama, prompt(2, seed=5), 12, do_sample=False)
    end = int(free[0, 5 + 4])
    with EigenTrack(llama, window=WINDOW, end_tokens=[end, 0]) as track:
        generate(llama, prompt(2, seed=5), 12, eos_token_id=end, do_sample=False)
    assert track.descriptors.isnan().any()
    return track


@pytest.fixture
def file(track: EigenTrack, tmp_path: Path) -> Path:
    track.save(tmp_path / "answer.safetensors")
    return tmp_path / "answer.safetensors"


def assert_same(one: Any, other: Any) -> None:
    for name in TENSORS:
        assert same_bits(getattr(one, name), getattr(other, name)), name
    assert one.settings == other.settings


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    change(tensors, metadata)
    file.unlink()  # the tensors may be mapped from it
    save_file(tensors, file, metadata)


def test_a_file_gives_back_every_bit(track: EigenTrack, file: Path) -> None:
    loaded = eigentrack.load(file)
    assert_same(loaded, track)
    assert_same(loaded, track.recording())
    assert (loaded.names, loaded.window, loaded.layers) == (track.names, track.window, track.layers)
    assert loaded.steps == track.steps and torch.equal(loaded.lengths, track.lengths)
    assert loaded.versions == {"rmtkernels": rmtkernels.__version__, "torch": torch.__version__}
    again = file.with_name("again")
    loaded.save(again)
    assert_same(eigentrack.load(again), track)
    assert eigentrack.load(again).versions == loaded.versions


def test_odd_bits_survive(track: EigenTrack, tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, -0x00400000, -0x80000000, 0x00000001, 0x7F800000], dtype=torch.int32)
    recording = track.recording()
    recording.descriptors.view(-1)[: len(bits)] = bits.view(torch.float32)  # two kinds of NaN, -0, denormal, infinity
    recording.save(tmp_path / "odd")
    assert_same(eigentrack.load(tmp_path / "odd"), recording)


@pytest.mark.parametrize("options", [{"spectra": "joint", "layer_scale": "none"}, {"start": "prompt", "center": False}])
def test_settings_are_those_of_the_monitor(llama: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    with EigenTrack(llama, window=WINDOW, **options) as track:
        generate(llama, prompt())
    track.save(tmp_path / "x")
    settings = eigentrack.load(tmp_path / "x").settings
    assert settings == track.settings
    assert {name: getattr(settings, name) for name in options} == options
    assert (settings.model, settings.taps, settings.end_tokens) == ("LlamaForCausalLM", ("layer2", "layer5"), (0, 2))


@pytest.mark.parametrize("name", ["window", "spectra", "start", "normalize", "center", "noise", "layer_scale"])
def test_settings_cannot_be_changed(track: EigenTrack, name: str) -> None:
    assert getattr(track, name) == getattr(track.settings, name)
    with pytest.raises(AttributeError):
        setattr(track, name, getattr(track, name))


@pytest.mark.parametrize("window", [True, 0, 129, 8.0])
def test_windows_that_are_none(llama: Any, window: Any) -> None:
    with pytest.raises(EigenTrackError, match="window must be"):
        EigenTrack(llama, window=window)


def test_a_recording_is_a_frozen_copy(track: EigenTrack) -> None:
    recording = track.recording()
    before = recording.descriptors.clone()
    track.reset()
    assert same_bits(recording.descriptors, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recording.tokens = recording.tokens  # type: ignore[misc]


def test_nothing_watched_is_nothing_to_save(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(EigenTrackError, match="nothing has been watched"):
        EigenTrack(llama).save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_header_can_be_read_by_others(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["format_version"]) == ("eigentrack.recording", "1")
    settings = json.loads(metadata["settings"])
    assert settings["window"] == WINDOW and settings["names"][0] == f"layer2.{rmtkernels.DESCRIPTORS[0]}"


def test_a_write_that_fails_leaves_the_old_file(track: EigenTrack, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        track.save(file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_a_file_that_is_replaced_does_not_change_what_was_loaded(track: EigenTrack, file: Path) -> None:
    loaded = eigentrack.load(file)
    track.recording().save(file)
    assert_same(loaded, track)


# Files that are not what they should be


@pytest.mark.parametrize("size", [0, 7, 8, 100, 0.5, -1])
def test_truncated_files(file: Path, size: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
    with pytest.raises(FileFormatError, match="damaged"):
        eigentrack.load(file)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 a zip file, as torch.save writes them" * 9,
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 20) + b"[1, 2, 3]           " + b"x" * 40,
        struct.pack("<Q", 20) + b'{"__metadata__": 33}' + b"x" * 40,
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FileFormatError, match="no safetensors file"):
        eigentrack.load(tmp_path / "x")


def test_a_header_beyond_bounds_is_not_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x", {"format": "eigentrack.recording", "pad": "x" * (1 << 20)})
    with pytest.raises(FileFormatError, match="no safetensors file"):
        eigentrack.load(tmp_path / "x")


def test_a_header_that_no_reader_would_take_is_not_written(track: EigenTrack, tmp_path: Path) -> None:
    recording = track.recording()
    long = dataclasses.replace(recording.settings, model="x" * (1 << 20))
    with pytest.raises(FileFormatError, match="longer than"):
        dataclasses.replace(recording, settings=long).save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_files_of_others(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "x", {"format": "pt"})
    with pytest.raises(FileFormatError, match=r"no eigentrack\.recording file: its format is pt"):
        eigentrack.load(tmp_path / "x")
    save_file({"weight": torch.zeros(3)}, tmp_path / "y")
    with pytest.raises(FileFormatError, match="not named"):
        eigentrack.load(tmp_path / "y")
    with pytest.raises(FileNotFoundError):
        eigentrack.load(tmp_path / "z")


@pytest.mark.parametrize(
    ("version", "advice"),
    [("2", "update"), ("0", "record anew"), ("x", "record anew"), ("9" * 5000, "record anew")],
    ids=["newer", "older", "no number", "digits"],
)
def test_other_versions(file: Path, version: str, advice: str) -> None:
    rewritten(file, lambda tensors, metadata: metadata.update(format_version=version))
    with pytest.raises(FileFormatError, match=advice):
        eigentrack.load(file)


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "descriptors": lambda x: x[..., 1:],
    "eigenvalues": lambda x: x[:, :, :, :-1],
    "tokens": lambda x: x[:, 1:],
    "watched": lambda x: x[:1],
}


@pytest.mark.parametrize("name", TENSORS)
def test_shapes_that_contradict_the_description(file: Path, name: str) -> None:
    rewritten(file, lambda tensors, metadata: tensors.update({name: SHAPES[name](tensors[name]).contiguous()}))
    with pytest.raises(FileFormatError, match="contradicts itself"):
        eigentrack.load(file)


@pytest.mark.parametrize("name", TENSORS)
def test_other_tensors_than_a_recording_s(file: Path, name: str) -> None:
    content = file.read_bytes()
    rewritten(file, lambda tensors, metadata: tensors.pop(name))
    with pytest.raises(FileFormatError, match="belong"):
        eigentrack.load(file)
    file.write_bytes(content)
    rewritten(file, lambda tensors, metadata: tensors.update({name: tensors[name].to(torch.float16)}))
    with pytest.raises(FileFormatError, match="float16"):
        eigentrack.load(file)


@pytest.mark.parametrize(
    "change",
    [{"window": "8"}, {"window": True}, {"names": "entropy"}, {"names": [1]}, {"layers": None}, {"extra": 1}, "gone"],
)
def test_settings_of_the_wrong_kind(file: Path, change: Any) -> None:
    def spoil(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        settings = json.loads(metadata["settings"])
        settings = {"window": 8} if change == "gone" else {**settings, **change}
        metadata["settings"] = json.dumps(settings)

    rewritten(file, spoil)
    with pytest.raises(FileFormatError, match="record anew"):
        eigentrack.load(file)


@pytest.mark.parametrize(
    "change",
    [
        {"spectra": "both"},
        {"start": ""},
        {"normalize": "l2"},
        {"noise": "mean"},
        {"layer_scale": "x"},
        {"window": 0},
        {"window": 129},
        {"layers": [2]},
    ],
)
def test_settings_that_no_monitor_has(file: Path, change: dict[str, Any]) -> None:
    def spoil(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata["settings"] = json.dumps({**json.loads(metadata["settings"]), **change})
        if "window" in change:
            tensors["eigenvalues"] = torch.full((2, 11, 2, change["window"]), torch.nan)

    rewritten(file, spoil)
    with pytest.raises(FileFormatError, match=r"no monitor|windows of|layers, and"):
        eigentrack.load(file)


@pytest.mark.parametrize("name", ["descriptors", "eigenvalues"])
def test_values_where_nothing_was_watched(file: Path, name: str) -> None:
    rewritten(file, lambda tensors, metadata: tensors.update({name: tensors[name].nan_to_num(1)}))
    with pytest.raises(FileFormatError, match="not watched"):
        eigentrack.load(file)


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_file_s_name(track: EigenTrack, path: str) -> None:
    with pytest.raises(IsADirectoryError, match="the name of a file"):
        track.save(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3"])
def test_settings_that_are_no_json(file: Path, text: str) -> None:
    rewritten(file, lambda tensors, metadata: metadata.update(settings=text))
    with pytest.raises(FileFormatError):
        eigentrack.load(file)


def test_recordings_of_other_descriptors_than_today_s_can_be_read(track: EigenTrack, tmp_path: Path) -> None:
    recording = track.recording()
    fewer = dataclasses.replace(
        recording,
        descriptors=recording.descriptors[..., :3].contiguous(),
        settings=dataclasses.replace(recording.settings, names=("a", "b", "c")),
    )
    fewer.save(tmp_path / "x")
    assert isinstance(loaded := eigentrack.load(tmp_path / "x"), Recording)
    assert loaded.names == ["a", "b", "c"]
