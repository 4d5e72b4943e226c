"""A detector on disk: one safetensors file in a folder, with everything else as JSON in its header."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigentrack.calibration import METHODS, Calibration
from eigentrack.errors import FileFormatError
from eigentrack.files import Settings, read, settings_fields, settings_of, write
from eigentrack.identity import ModelIdentity
from eigentrack.network import CELLS, Network
from eigentrack.standardisation import Standardisation
from rmtkernels.ops.sliding_window import MAX_WINDOW

KIND, VERSION = "eigentrack.detector", 1
FILE = "detector.safetensors"
SHIPPED = Path(__file__).parent / "detectors"
MAX_UNITS = 1024
_OWN = ("mean", "deviation", "knots", "values")
_FIELDS = ("names", "window", "settings", "model", "network", "clip", "calibration")


@dataclass(frozen=True)
class Parts:
    """What a fitted detector consists of."""

    names: tuple[str, ...]
    window: int | None
    settings: Settings | None
    model: ModelIdentity | None
    network: Network
    standardisation: Standardisation
    calibration: Calibration


def shipped() -> list[str]:
    """Names of the detectors that the package brings."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{FILE}"))


def save(folder: str | Path, parts: Parts) -> None:
    """Writes the file, whole or not at all.

    Raises:
        FileFormatError: if the description is longer than a reader would take.
        OSError: if it cannot be written.
    """
    folder = Path(folder)
    network, calibration = parts.network, parts.calibration
    tensors = {
        **network.state_dict(),
        "mean": parts.standardisation.mean,
        "deviation": parts.standardisation.deviation,
        "knots": calibration.knots,
        "values": calibration.values,
    }
    numbers = ("slope", "intercept", "threshold", "false_alarms")
    described = {
        "names": list(parts.names),
        "window": parts.window,
        "settings": None if parts.settings is None else settings_fields(parts.settings),
        "model": None if parts.model is None else asdict(parts.model),
        "network": {
            "cell": network.cell,
            "hidden": network.recurrent.hidden_size,
            "projection": network.recurrent.input_size,
        },
        "clip": parts.standardisation.clip,
        "calibration": None
        if calibration.method is None
        else {"method": calibration.method} | {name: getattr(calibration, name) for name in numbers},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / FILE, KIND, VERSION, tensors, described)


def load(name: str | Path) -> Parts:
    """What is in a folder, or in the package under this name.

    Raises:
        FileFormatError: if the file is not a detector, is damaged, contradicts itself, or is of a newer version.
        OSError: if it cannot be read, or there is none.
    """
    path = _find(name)
    network_names = {f"{part}.{kind}" for part in ("projection", "head") for kind in ("weight", "bias")}
    network_names |= {f"recurrent.{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")}
    tensors, described = read(path, KIND, VERSION, dict.fromkeys([*network_names, *_OWN], torch.float32))
    if set(described) != set(_FIELDS):
        raise _wrong(path, f"it describes {', '.join(sorted(described))}, not {', '.join(_FIELDS)}")
    names = _names(described["names"], path)
    settings = None if described["settings"] is None else settings_of(described["settings"], path)
    window = described["window"]
    if window is not None and (type(window) is not int or not 1 <= window <= MAX_WINDOW):
        raise _wrong(path, f"windows of {window!r:.40}")
    if settings is not None and (window != settings.window or not set(names) <= set(settings.names)):
        raise _wrong(path, "its settings have another window, or do not name its descriptors")
    network = _network(described["network"], len(names), {name: tensors[name] for name in network_names}, path)
    return Parts(
        names,
        window,
        settings,
        _model(described["model"], path),
        network,
        _standardisation(tensors, described["clip"], len(names), path),
        _calibration(tensors, described["calibration"], path),
    )


def _find(name: str | Path) -> Path:
    for folder in (Path(name), SHIPPED / Path(name).name if str(name) == Path(name).name else Path(name)):
        if (folder / FILE).is_file():
            return folder / FILE
    known = ", ".join(shipped()) or "none"
    raise FileNotFoundError(f"no {FILE} in {str(name)!r}, and no detector of that name in the package ({known})")


def _network(described: Any, features: int, tensors: dict[str, Tensor], path: Path) -> Network:
    wanted = {"cell", "hidden", "projection"}
    if not isinstance(described, dict) or set(described) != wanted or described["cell"] not in list(CELLS):
        raise _wrong(path, f"its network is {described!r:.80}")
    if not all(type(described[name]) is int and 1 <= described[name] <= MAX_UNITS for name in ("hidden", "projection")):
        raise _wrong(path, f"its network is {described!r:.80}")
    with torch.device("meta"):  # draws no random numbers
        network = Network(features, **described)
    for name, tensor in network.state_dict().items():
        _check(path, name, tensors[name], tuple(tensor.shape))
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False).eval()


def _standardisation(tensors: dict[str, Tensor], clip: Any, features: int, path: Path) -> Standardisation:
    for name in ("mean", "deviation"):
        _check(path, name, tensors[name], (features,))
    if (tensors["deviation"] < 0).any():
        raise _wrong(path, "a deviation is negative")
    if type(clip) is not float or not 0 < clip < math.inf:
        raise _wrong(path, f"clip is {clip!r:.40}")
    return Standardisation(tensors["mean"], tensors["deviation"], clip)


def _calibration(tensors: dict[str, Tensor], described: Any, path: Path) -> Calibration:
    numbers = ("slope", "intercept", "threshold", "false_alarms")
    knots, values = tensors["knots"], tensors["values"]
    count = len(knots) if knots.dim() == 1 else -1
    _check(path, "knots", knots, (count,))
    _check(path, "values", values, (count,))
    if described is None:
        described = {"method": None, "slope": 1.0, "intercept": 0.0, "threshold": math.nan, "false_alarms": math.nan}
    elif not isinstance(described, dict) or set(described) != {"method", *numbers}:
        raise _wrong(path, f"its calibration is {described!r:.80}")
    elif described["method"] not in METHODS:
        raise _wrong(path, f"its calibration is by {described['method']!r:.40}")
    elif not all(type(described[name]) is float and math.isfinite(described[name]) for name in numbers):
        raise _wrong(path, "its calibration has numbers that are none")
    elif not (described["slope"] > 0 and 0 <= described["threshold"] <= 1 and 0 < described["false_alarms"] < 1):
        raise _wrong(path, "its calibration is impossible")
    isotonic = described["method"] == "isotonic"
    if (count < 2 if isotonic else count != 0) or not (knots.diff() > 0).all():
        raise _wrong(path, f"its calibration has {count} knots, or they do not ascend")
    if not (values.diff() >= 0).all() or not ((values >= 0) & (values <= 1)).all():
        raise _wrong(path, "its calibration's values must ascend from 0 to 1")
    return Calibration(**described, knots=knots, values=values)


def _model(described: Any, path: Path) -> ModelIdentity | None:
    if described is None:
        return None
    wanted = {field.name: field.type for field in fields(ModelIdentity)}
    if not isinstance(described, dict) or {name: type(value) for name, value in described.items()} != wanted:
        raise _wrong(path, f"its model is {described!r:.80}")
    return ModelIdentity(**described)


def _names(described: Any, path: Path) -> tuple[str, ...]:
    listed = isinstance(described, list) and described and all(type(name) is str for name in described)
    if not listed or len(set(described)) < len(described):
        raise _wrong(path, "its descriptors have no names, or two have one")
    return tuple(described)


def _check(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise _wrong(path, f"{name} is {tuple(tensor.shape)}, its description says {shape}")
    if not tensor.isfinite().all():
        raise _wrong(path, f"{name} is not finite")


def _wrong(path: Path, what: str) -> FileFormatError:
    return FileFormatError(f"{path} contradicts itself or no detector can be so: {what}; save it anew")
