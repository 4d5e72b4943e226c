"""What a monitor is set to: what the user says, else what the detector was made with, else our defaults."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from eigentrack.errors import EigenTrackError, TapError
from eigentrack.files import CHOICES, Settings
from rmtkernels import DESCRIPTORS
from rmtkernels.ops.sliding_window import MAX_WINDOW

if TYPE_CHECKING:
    from eigentrack.detector import Detector

TAPS = ("residual", "mlp")
FEW = ("share_1", "entropy", "participation", "above_edge")  # descriptors, where there is room for some only
_DEFAULTS: dict[str, Any] = {
    "layers": "every:3",
    "spectra": "per_layer",
    "window": 32,
    "start": "answer",
    "tap": "residual",
    "modules": None,
    "normalize": "rms",
    "center": True,
    "noise": "median",
    "layer_scale": "trace",
}


def descriptor_columns(names: Sequence[str]) -> dict[str, int]:
    """Where descriptors of one spectrum stand.

    Raises:
        EigenTrackError: if one is unknown.
    """
    if isinstance(names, str) or not set(names) <= set(DESCRIPTORS):
        raise EigenTrackError(f"descriptors must list some of {', '.join(DESCRIPTORS)}, got {names!r}")
    return {name: DESCRIPTORS.index(name) for name in names}


class _NotGiven:
    def __repr__(self) -> str:
        return "<default>"


NOT_GIVEN: Any = _NotGiven()


def chosen_options(model: nn.Module, detector: "Detector | None", given: dict[str, Any]) -> dict[str, Any]:
    """All options of a monitor; `given` holds NOT_GIVEN for what the user left open.

    Raises:
        EigenTrackError, TapError: if one of them is impossible.
    """
    said = {name: value for name, value in given.items() if value is not NOT_GIVEN and (name, value) != _NO_MODULES}
    if "modules" in said and said.get("tap", "residual") != "residual":
        raise TapError("give either tap or modules: modules are watched as they are")
    learnt = {} if detector is None else _of_detector(model, detector, named="modules" in said or "layers" in said)
    options = {**_DEFAULTS, **learnt, **said}
    for name in ("spectra", "start", "normalize", "noise", "layer_scale"):
        _check_choice(name, options[name], CHOICES[name])
    _check_choice("tap", options["tap"], TAPS)
    check_window(options["window"])
    return options


def check_window(window: object) -> None:
    """Raises EigenTrackError unless it is a possible N."""
    if type(window) is not int or not 1 <= window <= MAX_WINDOW:
        raise EigenTrackError(f"window must be 1 to {MAX_WINDOW}, got {window}")


def settings_of_monitor(
    model: str, taps: Sequence[str], layers: Sequence[int], end_tokens: Sequence[int], options: dict[str, Any]
) -> Settings:
    """What a monitor with these options is set to, and what its values are called."""
    prefixes = [""] if options["spectra"] == "joint" else [f"{tap}." for tap in taps]
    return Settings(
        model=model,
        names=tuple(f"{prefix}{name}" for prefix in prefixes for name in DESCRIPTORS),
        taps=tuple(taps),
        layers=tuple(layers),
        end_tokens=tuple(end_tokens),
        **{name: value for name, value in options.items() if name not in ("layers", "tap", "modules")},
    )


_NO_MODULES = ("modules", None)


def _of_detector(model: nn.Module, detector: "Detector", named: bool) -> dict[str, Any]:
    """What the detector was made with; without its modules if the user has named some."""
    own = detector.settings
    if own is None:
        return {} if detector.window is None else {"window": detector.window}
    shared = ("window", "spectra", "start", "normalize", "center", "noise", "layer_scale")
    options: dict[str, Any] = {name: getattr(own, name) for name in shared}
    blocks = [re.fullmatch(r"layer\d+(\.mlp)?", tap) for tap in own.taps]
    if all(blocks):
        options["tap"] = "mlp" if all(block and block[1] for block in blocks) else "residual"
        if not named:
            options["layers"] = list(own.layers)
    elif not named:
        options["modules"] = _modules(model, own.taps)
    return options


def _modules(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    known = dict(model.named_modules())
    missing = [name for name in names if name not in known]
    if missing:
        raise TapError(f"the detector watches {missing[0]!r}, which {type(model).__name__} does not have")
    return [known[name] for name in names]


def _check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise EigenTrackError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
