"""Files and disks that misbehave, for everything that is saved and loaded: a typed error, the old file to the bit,
nothing left beside it, and no gigabyte read to find out. tests/unit/test_detector_file.py, test_rmtkd_files.py and
tests/integration/test_recording.py have what is particular to a kind."""

import json
import os
import resource
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import eigentrack
import rmtkd
from eigentrack import Detector, Recording, Reference
from rmtkd.checkpoints import Checkpoints
from rmtkernels.errors import RmtkernelsError
from tests.helpers import normal
from tests.unit.test_detector import NAMES, fitted, monitor_settings
from tests.unit.test_rmtkd_files import Small, bert, small

GIGABYTE = 1 << 30


def recording(seed: int) -> Recording:
    batch, steps, window = 2, 40, 8
    return Recording(
        tokens=torch.arange(batch * steps).view(batch, steps),
        watched=torch.ones(batch, steps, dtype=torch.bool),
        descriptors=normal(batch, steps, len(NAMES), seed=seed),
        eigenvalues=normal(batch, steps, 2, window, seed=seed + 1),
        risk=None,
        settings=monitor_settings(),
        versions={"rmtkernels": "0", "torch": "0"},
    )


@dataclass(frozen=True)
class Kind:
    """Something that is saved: `save(path, seed)`, `load(path)`, and the file of its path that is damaged in tests."""

    save: Callable[[Path, int], object]
    load: Callable[[Path], object]
    file: str = ""  # inside the path, if that is a folder


KINDS = {
    "recording": Kind(lambda path, seed: recording(seed).save(path), eigentrack.load),
    "reference": Kind(
        lambda path, seed: Reference.fit([recording(seed), recording(seed + 9)]).save(path), Reference.load
    ),
    "detector": Kind(
        lambda path, seed: fitted(("gru", "lstm")[seed]).save_pretrained(path),
        Detector.from_pretrained,
        "detector.safetensors",
    ),
    "model": Kind(
        lambda path, seed: rmtkd.save(small(), path, config=rmtkd.Config(seed=seed)),
        lambda path: rmtkd.load(path, model=Small()),
        "weights.safetensors",
    ),
    "stock model": Kind(
        lambda path, seed: rmtkd.save(bert(num_labels=2 + seed), path),
        lambda path: rmtkd.load(path),
        "model.safetensors",
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def path(kind: Kind, tmp_path: Path) -> Path:
    """What was saved, alone in its folder."""
    folder = tmp_path / "alone"
    folder.mkdir()
    kind.save(folder / "saved", 0)
    kind.load(folder / "saved")
    return folder / "saved"


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond it fails in the kernel, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Disks


@pytest.mark.parametrize("size", [0, 700])
def test_a_full_disk_keeps_the_old_file_and_leaves_none_beside_it(kind: Kind, path: Path, size: int) -> None:
    before = content(path.parent)
    with largest_file(size), pytest.raises(OSError, match=r"too large"):
        kind.save(path, 1)
    assert content(path.parent) == before
    kind.save(path, 1)
    assert content(path.parent) != before, "it was the disk"


def test_ctrl_c_while_saving_keeps_the_old_file(kind: Kind, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(path.parent)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kind.save(path, 1)
    assert content(path.parent) == before


def test_a_folder_that_cannot_be_written_is_an_oserror(kind: Kind) -> None:
    with pytest.raises(OSError, match="no-such-folder"):
        kind.save(Path("/proc/no-such-folder/saved"), 0)


# Files of a gigabyte, which are holes here


def fill_with_a_hole(file: Path, begins: bytes) -> None:
    file.write_bytes(begins)
    os.truncate(file, GIGABYTE)


@pytest.mark.parametrize(
    "begins",
    [
        struct.pack("<Q", GIGABYTE - 8) + b'{"',
        struct.pack("<Q", (1 << 20) + 1) + b'{"',
        struct.pack("<Q", 1 << 63),
        b"",
    ],
    ids=["header of a gigabyte", "header above the bound", "header beyond the file", "zeros"],
)
def test_a_gigabyte_is_refused_without_reading_it(kind: Kind, path: Path, begins: bytes) -> None:
    fill_with_a_hole(path / kind.file if kind.file else path, begins)
    refused_in_little_memory(lambda: kind.load(path))


def test_a_description_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    rmtkd.save(small(), tmp_path / "model")
    fill_with_a_hole(tmp_path / "model" / "rmtkd.json", b'{"format": "')
    refused_in_little_memory(lambda: rmtkd.load(tmp_path / "model", model=Small()))


def test_a_run_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    Checkpoints(tmp_path, Small(), rmtkd.Config())
    (run,) = tmp_path.glob("*.json")
    fill_with_a_hole(run, b'{"format": "')
    refused_in_little_memory(lambda: Checkpoints(tmp_path, Small(), rmtkd.Config()))


def refused_in_little_memory(load: Callable[[], object]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((eigentrack.FileFormatError, rmtkd.FileFormatError)):
            load()
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


# Headers that somebody wrote by hand


def with_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Lets `change` edit the JSON of a safetensors file, or give other text for it."""
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:end])
    changed = change(header)
    text = changed if isinstance(changed, str) else json.dumps(header)
    file.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + whole[end:])


def first_tensor(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in header.items() if name != "__metadata__")


def renamed(name: str) -> Callable[[dict[str, Any]], object]:
    def change(header: dict[str, Any]) -> None:
        old = next(key for key in header if key != "__metadata__")
        header[name] = header.pop(old)

    return change


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "nested a hundred thousand deep": lambda header: "[" * 100_000,
    "no JSON": lambda header: "{",
    "a list": lambda header: "[]",
    "metadata a list": lambda header: header.update(__metadata__=[]),
    "metadata nested": lambda header: header.update(__metadata__={"format": {"format": 1}}),
    "offsets beyond the file": lambda header: first_tensor(header).update(data_offsets=[0, 1 << 40]),
    "offsets backwards": lambda header: first_tensor(header).update(data_offsets=[8, 0]),
    "negative offsets": lambda header: first_tensor(header).update(data_offsets=[-8, 0]),
    "a shape of 2^62": lambda header: first_tensor(header).update(shape=[1 << 62, 4]),
    "a negative shape": lambda header: first_tensor(header).update(shape=[-1, -1]),
    "a shape that is none": lambda header: first_tensor(header).update(shape="x"),
    "a dtype that is none": lambda header: first_tensor(header).update(dtype="PICKLE"),
    "a name that climbs": renamed("../../../../etc/passwd"),
    "a name with a NUL": renamed("a\0b"),
    "an empty name": renamed(""),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_made_by_hand_is_refused(kind: Kind, path: Path, name: str) -> None:
    with_header(path / kind.file if kind.file else path, HEADERS[name])
    before = content(path.parent)
    with pytest.raises((eigentrack.FileFormatError, rmtkd.FileFormatError)):
        kind.load(path)
    assert content(path.parent) == before


@pytest.mark.parametrize("name", ["..", "../weights", "first.weight", "/etc", "first.__class__", "a\0b"])
def test_a_projected_layer_of_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    rmtkd.save(small(), tmp_path / "model")
    description = tmp_path / "model" / "rmtkd.json"
    found = json.loads(description.read_text())
    found["projected"][0]["name"] = name
    description.write_text(json.dumps(found))
    given = Small()
    before = {key: value.clone() for key, value in given.state_dict().items()}
    with pytest.raises(rmtkd.FileFormatError):
        rmtkd.load(tmp_path / "model", model=given)
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())


def test_every_refusal_is_one_of_ours() -> None:
    assert issubclass(eigentrack.FileFormatError, RmtkernelsError) and issubclass(
        rmtkd.FileFormatError, RmtkernelsError
    )
