"""Files of tensors with a description: safetensors with bounded JSON in the header, written whole or not at all."""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from eigentrack.errors import FileFormatError
from rmtkernels.ops.sliding_window import MAX_WINDOW

MAX_HEADER = 1 << 20  # bytes; the header of every layer of an 80-layer model takes a twentieth
CHOICES: dict[str, tuple[str | None, ...]] = {
    "spectra": ("per_layer", "joint"),
    "start": ("answer", "prompt"),
    "normalize": (None, "rms"),
    "noise": ("median", "trace"),
    "layer_scale": ("trace", "none"),
}


@dataclass(frozen=True)
class Settings:
    """What a monitor was set to, and what its values are called.

    Attributes:
        model: the model's class.
        names: of the F descriptors, as `EigenTrack.names`.
        taps: of the watched modules: "layer2", or their qualified names.
        layers: indices of the watched blocks, or 0, 1, ... for modules named by the user.
        window, spectra, start, normalize, center, noise, layer_scale, end_tokens: as given to EigenTrack.
    """

    model: str
    names: tuple[str, ...]
    taps: tuple[str, ...]
    layers: tuple[int, ...]
    window: int
    spectra: str
    start: str
    normalize: str | None
    center: bool
    noise: str
    layer_scale: str
    end_tokens: tuple[int, ...]


def write(path: str | Path, kind: str, version: int, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    """Writes beside `path` and renames: whoever reads it finds the old file or the new one, never half of one.

    Raises:
        FileFormatError: if the description is longer than a reader would take.
        OSError: if it cannot be written, or `path` names no file.
    """
    from safetensors.torch import save

    header = {"format": kind, "format_version": str(version)} | {name: json.dumps(fields[name]) for name in fields}
    content = _in_order(save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, header))
    if int.from_bytes(content[:8], "little") > MAX_HEADER:
        raise FileFormatError(f"the description of {path} is longer than {MAX_HEADER} bytes; watch fewer layers")
    write_whole(path, content)


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes beside `path` and renames.

    Raises:
        OSError: if it cannot be written, or `path` names no file.
    """
    path = Path(path)
    if not path.name:
        raise IsADirectoryError(f"cannot write to {str(path)!r}: give a path that ends with the name of a file")
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _in_order(content: bytes) -> bytes:
    """The same file with its description sorted: safetensors writes it in random order, and same input, same bits."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + content[end:]


def read(
    path: str | Path,
    kind: str,
    version: int,
    tensors: Mapping[str, torch.dtype],
    optional: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file and its described fields, by name.

    Raises:
        FileFormatError: if the file is not of this kind, is damaged, or was written by a newer version.
        OSError: if it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = _description(Path(path))
    if description.get("format") != kind:
        raise FileFormatError(f"{path} is no {kind} file: its format is {description.get('format', 'not named')!s:.60}")
    written = description.pop("format_version", "")
    if written != str(version):
        try:
            newer = int(written) > version
        except ValueError:  # no number, or one of thousands of digits
            newer = False
        if newer:
            raise FileFormatError(
                f"{path} has format version {written:.20}, this eigentrack reads {version}: update it"
            )
        raise FileFormatError(
            f"{path} has format version {written!r:.20}, this eigentrack reads {version}: record anew"
        )
    try:
        fields = {name: json.loads(text) for name, text in description.items() if name != "format"}
        found = load_file(path)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged ({error}): copy it again, or record anew") from error
    dtypes = {name: tensor.dtype for name, tensor in found.items()}
    if dtypes != {**tensors, **{name: optional[name] for name in optional if name in dtypes}}:
        raise FileFormatError(f"{path} holds {_list(dtypes)} where {_list(tensors)} belong: record anew")
    return found, fields


def settings_fields(settings: Settings) -> dict[str, Any]:
    return asdict(settings)


def settings_of(fields: object, path: str | Path) -> Settings:
    """Settings from the fields of a file.

    Raises:
        FileFormatError: if one is missing, unknown, of the wrong type, or what no monitor can be set to.
    """
    wanted = get_type_hints(Settings)
    if not isinstance(fields, dict) or set(fields) != set(wanted):
        raise FileFormatError(f"{path} does not describe a monitor's settings {', '.join(wanted)}: record anew")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    for name, kind in wanted.items():
        inner = {tuple[str, ...]: str, tuple[int, ...]: int}.get(kind)
        value = values[name]
        if inner is None:
            right = type(value) in (get_args(kind) or (kind,))  # str | None has two
        else:
            right = type(value) is tuple and all(type(v) is inner for v in value)
        if not right:
            raise FileFormatError(f"{path} has {value!r:.60} for {name}: record anew")
        if name in CHOICES and value not in CHOICES[name]:
            raise FileFormatError(f"{path} has {value!r:.60} for {name}, which no monitor is set to: record anew")
    settings = Settings(**values)  # type: ignore[arg-type]
    if not 1 <= settings.window <= MAX_WINDOW:
        raise FileFormatError(f"{path} has windows of {settings.window}, not 1 to {MAX_WINDOW}: record anew")
    if len(settings.layers) != len(settings.taps):
        raise FileFormatError(
            f"{path} contradicts itself: {len(settings.layers)} layers, and {len(settings.taps)} taps; record anew"
        )
    return settings


def _description(path: Path) -> dict[str, str]:
    """The free part of a safetensors header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FileFormatError(f"{path} is no safetensors file, or its beginning is damaged")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            header = None
    description = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(description, dict) or not all(isinstance(text, str) for text in description.values()):
        raise FileFormatError(f"{path} is no safetensors file, or its beginning is damaged")
    return description


def _list(dtypes: Mapping[str, torch.dtype]) -> str:
    return ", ".join(f"{name} ({str(dtype).removeprefix('torch.')})" for name, dtype in sorted(dtypes.items()))[:300]
