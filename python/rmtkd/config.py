"""Config: everything a run of RMT-KD can be told, as a dataclass that is JSON and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rmtkd.errors import ConfigError

NOISE = ("quantile", "median", "trace", "fit", "spikes")
CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("width", "factor"),
    "side": ("output", "input"),
    "noise": NOISE,
    "neurons": ("leverage", "projection"),
    "teacher": ("previous", "average"),
}


@dataclass(frozen=True)
class Config:
    """Settings of a run. Defaults are the paper's (arXiv 2509.15724, thesis 5.1 and 5.3) where it has any; see docs.

    Attributes:
        mode: "width" narrows the network itself; "factor" replaces layers by projected drop-ins.
        modules: factor mode: patterns (`fnmatch`) of the qualified names of the layers to replace; "!pattern" excludes.
        side: factor mode: whether a layer's inputs or its outputs are projected on their leading subspace.
        noise: how the noise variance that sets the edge is estimated; "spikes" counts outliers without one.
        quantile: of `noise="quantile"` and of the start of "fit"; the paper takes 0.4 to 0.5.
        multiple: ranks are rounded up to a multiple of this.
        min_ratio: no width is cut below this share of what it was in one stage; a stage that asks for it is the last.
        neurons: width mode: inner neurons are chosen by leverage on the outlier subspace, or mixed by the projection.
        calibration_rows: rows of activations (tokens, or positions of images) a covariance is made of, at most.
        keep_slower: project also what a measurement shows to be slower that way.
        trainable: factor mode: whether projections are trained in distillation. The paper keeps them fixed.

        stages: most stages of projection and distillation.
        target_parameters: stop when the model has at most this share of its first parameters; 0 for no target.
        max_drop: stop when `evaluate` falls by more than this below the warmed-up model; that stage is undone. In the
            units of the score: shares of right answers, or a language model's nats per token, where 0.02 is little.
        baseline, warm_up: train until `evaluate` reaches `warm_up` times `baseline`, or for `warm_up_epochs`.
            A baseline of 0 means that the model is trained already.
        warm_up_epochs: most epochs of warming up.

        epochs: of distillation, per stage.
        alpha: weight of the cross-entropy with the labels; the rest is the divergence from the teacher.
        temperature: of teacher and student in the divergence, whose gradient is scaled by its square.
        teacher: the model before the stage ("previous"), or its moving average over all training so far ("average").
        learning_rate, final_learning_rate: AdamW's, at the first step of a stage and, linearly, at the last.
        weight_decay: AdamW's.
        seed: of everything random.
    """

    mode: str = "width"
    modules: tuple[str, ...] = ("*",)
    side: str = "output"
    noise: str = "quantile"
    quantile: float = 0.45
    multiple: int = 8
    min_ratio: float = 0.2
    neurons: str = "leverage"
    calibration_rows: int = 50_000
    keep_slower: bool = False
    trainable: bool = False

    stages: int = 3
    target_parameters: float = 0.0
    max_drop: float = 0.02
    baseline: float = 0.0
    warm_up: float = 0.9
    warm_up_epochs: int = 5

    epochs: int = 5
    alpha: float = 0.7
    temperature: float = 1.0
    teacher: str = "previous"
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError if a setting has the wrong type or is out of range."""
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), field.default)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("quantile", "warm_up"):
            _check_range(name, getattr(self, name), 0, 1, open_low=True, open_high=name == "quantile")
        for name in ("min_ratio", "alpha", "target_parameters"):
            _check_range(name, getattr(self, name), 0, 1)
        for name in ("multiple", "calibration_rows", "stages"):
            _check_range(name, getattr(self, name), 1, float("inf"))
        _check_range("seed", self.seed, 0, 2**32 - 1)  # of every generator, NumPy's too
        for name in ("epochs", "warm_up_epochs", "weight_decay", "baseline", "final_learning_rate", "max_drop"):
            _check_range(name, getattr(self, name), 0, float("inf"), open_high=True)
        for name in ("temperature", "learning_rate"):
            _check_range(name, getattr(self, name), 0, float("inf"), open_low=True, open_high=True)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Raises ConfigError if the text is no JSON object of settings of this class."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"this is not JSON: {error}") from error
        return cls.from_fields(found)

    @classmethod
    def from_fields(cls, found: Any) -> "Config":
        """From what a JSON object holds; settings it does not name keep their defaults."""
        if not isinstance(found, Mapping):
            raise ConfigError(f"settings must be a JSON object, got {type(found).__name__}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(found) - known):
            raise ConfigError(f"unknown settings {', '.join(map(str, unknown))}; there are: {', '.join(sorted(known))}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
        }
        return cls(**values)


def _check_type(name: str, value: Any, default: Any) -> None:
    if isinstance(default, tuple):
        right = isinstance(value, tuple) and len(value) > 0 and all(isinstance(item, str) for item in value)
        kind = "a tuple of texts"
    elif isinstance(default, bool):
        right, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, float):
        right, kind = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    elif isinstance(default, int):
        right, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        right, kind = isinstance(value, str), "a text"
    if not right:
        raise ConfigError(f"{name} must be {kind}, got {value!r:.80}")


def _check_range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    if not low <= value <= high or (open_low and value == low) or (open_high and value == high):
        bounds = f"{'above' if open_low else 'at least'} {low}" + (
            "" if high == float("inf") else f" and {'below' if open_high else 'at most'} {high}"
        )
        raise ConfigError(f"{name} must be {bounds}, got {value}")
