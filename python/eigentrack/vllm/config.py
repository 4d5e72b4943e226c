"""What is watched in vLLM: EIGENTRACK_CONFIG or `additional_config`, checked before anything is loaded."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eigentrack.detector import Detector
from eigentrack.errors import MismatchError, ServingError
from eigentrack.files import Settings
from eigentrack.identity import ModelIdentity
from eigentrack.options import chosen_options, settings_of_monitor
from eigentrack.taps import select_layers
from eigentrack.vllm.report import KEY

VARIABLE = "EIGENTRACK_CONFIG"

_MONITOR = ("layers", "spectra", "window", "normalize", "center", "noise", "layer_scale")
_KNOWN = ("detector", "stop_above", "descriptors", *_MONITOR)


@dataclass(frozen=True)
class Watch:
    """What an engine watches.

    Attributes:
        settings: as a monitor's; layers are indices of the model's blocks.
        detector: gives each token its risk.
        stop_above: a request ends when its risk exceeds this; None for never.
        descriptors: whether they are delivered beside the risk.
        slots: how many requests can be watched at a time.
        width, dtype: of a hidden state.
    """

    settings: Settings
    detector: Detector | None
    stop_above: float | None
    descriptors: bool
    slots: int
    width: int
    dtype: torch.dtype


def asked(vllm_config: Any) -> dict[str, Any] | None:
    """What the user asks for, from `additional_config` or else the environment; None if nothing.

    Raises:
        ServingError: if it cannot be understood.
    """
    additional = vllm_config.additional_config
    if isinstance(additional, dict) and KEY in additional:
        return _checked(additional[KEY], f"additional_config[{KEY!r}]")
    text = os.environ.get(VARIABLE)
    return _checked(_parsed(text), VARIABLE) if text else None


def _parsed(text: str) -> Any:
    """JSON, or that of the file that the text names."""
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(f"{VARIABLE} must be JSON or the path of a JSON file: {error}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServingError(f"{VARIABLE} is not JSON: {error}") from error


def _checked(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ServingError(f"{where} must be a JSON object, got {given!r:.60}")
    if given.get("start", "answer") != "answer":
        raise ServingError(
            'start="prompt" cannot be watched in vLLM: the rows of a cached prefix are never computed; leave start out'
        )
    unknown = sorted(set(given) - {*_KNOWN, "start"})
    if unknown:
        raise ServingError(f"{where} does not know {unknown[0]!r}; it knows {', '.join(_KNOWN)}")
    for name, kind in (("detector", str), ("descriptors", bool)):
        if name in given and type(given[name]) is not kind:
            raise ServingError(f"{name} in {where} must be of type {kind.__name__}, got {given[name]!r:.60}")
    if "detector" not in given and not given.get("descriptors"):
        raise ServingError(f'{where} asks for nothing: name a detector, or set "descriptors": true')
    return given


def resolve(given: dict[str, Any], vllm_config: Any) -> Watch:
    """Defaults, detector and model brought together.

    Raises:
        ServingError: if an option does not fit the others.
        MismatchError: if the detector is for another model.
        EigenTrackError, OSError: as of `EigenTrack` and `Detector.from_pretrained`.
    """
    config = vllm_config.model_config.hf_text_config
    detector = Detector.from_pretrained(given["detector"]) if "detector" in given else None
    if detector is not None:
        _check_detector(detector, config)
    said = {name: given[name] for name in _MONITOR if name in given}
    options = chosen_options(nn.Identity(), detector, said)
    layers = select_layers(options["layers"], config.num_hidden_layers)
    settings = settings_of_monitor(config.model_type, [f"layer{index}" for index in layers], layers, (), options)
    if detector is not None:
        detector.stepper(torch.device("cpu"), settings)  # says now what does not fit
    return Watch(
        settings,
        detector,
        _limit(given.get("stop_above"), detector),
        given.get("descriptors", False),
        vllm_config.scheduler_config.max_num_seqs,
        config.hidden_size,
        vllm_config.model_config.dtype,
    )


def _check_detector(detector: Detector, config: Any) -> None:
    """vLLM fuses weights and keeps no tokenizer in its workers: neither is compared."""
    if detector.model is not None:
        found = ModelIdentity.of_config(config)
        differences = detector.model.differences(found)
        if differences:
            raise MismatchError(f"the detector is for another model than this: {'; '.join(differences)}")
    taps = () if detector.settings is None else detector.settings.taps
    if not all(re.fullmatch(r"layer\d+", tap) for tap in taps):
        raise MismatchError(f"in vLLM whole blocks are watched; the detector watches {taps[0]!r}")


def _limit(given: Any, detector: Detector | None) -> float | None:
    """The risk that ends a request; "threshold" stands for the detector's own."""
    if given is None:
        return None
    if detector is None:
        raise ServingError("stop_above needs a detector")
    limit = detector.threshold if given == "threshold" else given
    if type(limit) not in (int, float) or not 0 <= limit <= 1:
        raise ServingError(f'stop_above must be a number from 0 to 1, as 0.8, or "threshold", got {given!r:.40}')
    return limit
