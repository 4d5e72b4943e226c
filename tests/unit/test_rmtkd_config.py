"""Settings: every refusal has its reason, and JSON gives back what was written."""

import json
from dataclasses import fields
from typing import Any

import pytest

from rmtkd.config import CHOICES, Config
from rmtkd.errors import ConfigError


def test_defaults_are_the_papers() -> None:
    config = Config()
    assert (config.noise, config.quantile, config.alpha, config.warm_up) == ("quantile", 0.45, 0.7, 0.9)
    assert (config.learning_rate, config.final_learning_rate, config.weight_decay) == (1e-4, 1e-5, 5e-4)


def test_every_setting_comes_back_from_json() -> None:
    changed: dict[str, Any] = {}
    for field in fields(Config):
        default = field.default
        if field.name in CHOICES:
            changed[field.name] = CHOICES[field.name][1]
        elif isinstance(default, bool):
            changed[field.name] = not default
        elif isinstance(default, tuple):
            changed[field.name] = ("encoder.*", "!*.query")
        elif isinstance(default, int):
            changed[field.name] = default + 1
        else:
            changed[field.name] = 0.125
    config = Config(**changed)
    assert all(getattr(config, field.name) != field.default for field in fields(Config))
    assert Config.from_json(config.to_json()) == config
    assert hash(config) == hash(Config(**changed))


def test_settings_that_are_not_named_keep_their_defaults() -> None:
    assert Config.from_json('{"quantile": 0.4}') == Config(quantile=0.4)
    assert Config.from_json("{}") == Config()


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_every_choice_is_taken_and_no_other(name: str) -> None:
    for choice in CHOICES[name]:
        assert getattr(Config(**{name: choice}), name) == choice
    with pytest.raises(ConfigError, match=f"{name} must be one of .*got 'other'"):
        Config(**{name: "other"})


@pytest.mark.parametrize(
    ("name", "wrong", "kind"),
    [
        (field.name, wrong, kind)
        for field in fields(Config)
        for kind, of, wrongs in (
            ("a tuple of texts", tuple, ["*", (), (1,), ["*"]]),
            ("true or false", bool, [1, "yes", None]),
            ("a number", float, [True, "0.4", None]),
            ("a whole number", int, [True, 1.0, "3", None]),
            ("a text", str, [1, None]),
        )
        for wrong in wrongs
        if type(field.default) is of
    ],
)
def test_types(name: str, wrong: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be {kind}, got "):
        Config(**{name: wrong})


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("quantile", [1e-9, 0.999], [0, 1, -0.1, NAN]),
        ("warm_up", [0.1, 1], [0, 1.1, NAN]),
        ("min_ratio", [0, 1], [-0.1, 1.1, NAN]),
        ("alpha", [0, 1], [-0.1, 1.1]),
        ("max_drop", [0, 2.5], [-0.1, INF]),
        ("target_parameters", [0, 1], [-0.1, 1.1]),
        ("multiple", [1, 512], [0, -8]),
        ("calibration_rows", [1], [0]),
        ("stages", [1], [0]),
        ("seed", [0, 2**32 - 1], [-1, 2**40]),
        ("epochs", [0, 7], [-1]),
        ("warm_up_epochs", [0], [-1]),
        ("weight_decay", [0], [-0.1, INF, NAN]),
        ("baseline", [0, 0.9], [-0.1, INF]),
        ("final_learning_rate", [0], [-1e-9, INF]),
        ("temperature", [0.5], [0, INF, NAN]),
        ("learning_rate", [1e-5], [0, INF]),
    ],
)
def test_ranges(name: str, right: list[float], wrong: list[float]) -> None:
    for value in right:
        assert getattr(Config(**{name: value}), name) == value
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"{name} must be (above|at least) .*, got "):
            Config(**{name: value})


def test_every_number_has_a_range() -> None:
    tested = {mark.args[1][i][0] for mark in test_ranges.pytestmark for i in range(len(mark.args[1]))}
    numbers = {field.name for field in fields(Config) if type(field.default) in (int, float)}
    assert numbers == tested


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 10**5, "not JSON"),
        ("[]", "must be a JSON object, got list"),
        ("3", "must be a JSON object, got int"),
        ('{"quantil": 0.4}', "unknown settings quantil; there are: alpha, baseline"),
        ('{"quantile": "0.4"}', "quantile must be a number"),
        ('{"modules": [1]}', "modules must be a tuple of texts"),
        ('{"quantile": NaN}', "quantile must be above 0 and below 1, got nan"),
    ],
)
def test_bad_json(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Config.from_json(text)


def test_json_is_for_people_too() -> None:
    assert json.loads(Config(modules=("a", "b")).to_json())["modules"] == ["a", "b"]
    assert "\n" in Config().to_json()
