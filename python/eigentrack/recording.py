"""A watched generation, kept: in memory, or in one safetensors file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import rmtkernels
from eigentrack.errors import FileFormatError
from eigentrack.files import Settings, read, settings_fields, settings_of, write

KIND, VERSION = "eigentrack.recording", 1
DTYPES = {
    "descriptors": torch.float32,
    "eigenvalues": torch.float32,
    "tokens": torch.int64,
    "watched": torch.bool,
}
OPTIONAL = {"risk": torch.float32}


@dataclass(frozen=True, eq=False)
class Recording:
    """One request as an EigenTrack saw it; read as the monitor is.

    Attributes:
        descriptors: (B, T, F) float32; NaN where a sequence was not watched.
        eigenvalues: (B, T, S, N) float32, largest first; NaN likewise.
        tokens: (B, T) int64; -1 where the model was fed embeddings.
        watched: (B, T) bool, in which steps a sequence took part.
        settings: the monitor's.
        versions: of rmtkernels and torch, when it was recorded.
        risk: (B, T) float32, the detector's, if the monitor had one; NaN where a sequence was not watched.
    """

    descriptors: Tensor
    eigenvalues: Tensor
    tokens: Tensor
    watched: Tensor
    settings: Settings
    versions: Mapping[str, str]
    risk: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """Names of the F descriptors."""
        return list(self.settings.names)

    @property
    def layers(self) -> list[int]:
        """Indices of the watched blocks."""
        return list(self.settings.layers)

    @property
    def window(self) -> int:
        """N, the number of activations per window."""
        return self.settings.window

    @property
    def steps(self) -> int:
        """T."""
        return self.tokens.shape[1]

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: how many steps of each sequence were watched."""
        return self.watched.sum(1)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all; `eigentrack.load` gives back the same bits.

        Raises:
            FileFormatError: if the names of modules take more than a megabyte.
            OSError: if it cannot be written, or `path` names no file.
        """
        tensors = {name: value for name in (*DTYPES, *OPTIONAL) if (value := getattr(self, name)) is not None}
        fields = {"settings": settings_fields(self.settings), "versions": dict(self.versions)}
        write(path, KIND, VERSION, tensors, fields)


def current_versions() -> dict[str, str]:
    """Of what computes the values."""
    return {"rmtkernels": rmtkernels.__version__, "torch": str(torch.__version__)}


def load(path: str | Path) -> Recording:
    """The recording in a file that `save` wrote. Tensors are on the CPU; nothing in the file is executed.

    Raises:
        FileFormatError: if the file is not a recording, is damaged, contradicts itself, or is of a newer version.
        OSError: if it cannot be read.
    """
    tensors, fields = read(path, KIND, VERSION, DTYPES, OPTIONAL)
    settings = settings_of(fields.get("settings"), path)
    versions = fields.get("versions")
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise FileFormatError(f"{path} does not say what versions recorded it: record anew")
    recording = Recording(**tensors, settings=settings, versions=versions)
    _check_shapes(recording, path)
    return recording


def _check_shapes(recording: Recording, path: str | Path) -> None:
    settings, tokens = recording.settings, recording.tokens
    if tokens.dim() != 2:
        raise FileFormatError(f"{path} contradicts itself: tokens are not (B, T) but {tuple(tokens.shape)}")
    spectra = 1 if settings.spectra == "joint" else len(settings.taps)
    wanted = {
        "descriptors": (*tokens.shape, len(settings.names)),
        "eigenvalues": (*tokens.shape, spectra, settings.window),
        "watched": tuple(tokens.shape),
        "risk": tuple(tokens.shape),
    }
    for name, shape in wanted.items():
        value = getattr(recording, name)
        found = None if value is None else tuple(value.shape)
        if found not in (None, shape):
            raise FileFormatError(
                f"{path} contradicts itself: {name} are {found}, and its settings and tokens say {shape}; record anew"
            )
    for name in ("descriptors", "eigenvalues", "risk"):
        value = getattr(recording, name)
        if value is not None and not value[~recording.watched].isnan().all():
            raise FileFormatError(f"{path} contradicts itself: {name} in steps that were not watched; record anew")
