"""Make a model of transformers smaller by the eigenvalues of its activations.

"rmtkd plan" shows what would become of a model and changes nothing; "rmtkd run" does it, stage by stage; "rmtkd
evaluate" and "rmtkd compare" say what models score, how large they are and how long they take; "rmtkd report" makes a
page of what was found. Models and texts are read from local files."""

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rmtkd.config import CHOICES, Config
from rmtkd.errors import ConfigError
from rmtkernels.errors import RmtkernelsError

SETTINGS = {
    "mode": "width: narrow the network itself (default). factor: replace layers by products of two thin matrices",
    "modules": "factor mode: pattern of layers to replace, '!pattern' to leave some out; may be repeated",
    "side": "factor mode: project what a layer puts out (default) or what it takes in",
    "noise": "what tells noise from signal (default quantile, the paper's)",
    "quantile": "of --noise quantile: the higher, the smaller the model (default 0.45)",
    "multiple": "round ranks up to a multiple of this (default 8)",
    "min_ratio": "keep at least this share of each width per stage (default 0.2)",
    "calibration_rows": "tokens to calibrate on (default 50000)",
    "keep_slower": "factor mode: also replace layers that are measured to be slower then",
    "stages": "of projection and distillation, at most (default 3)",
    "target_parameters": "stop at this share of the parameters",
    "max_drop": "undo a stage after which the score (accuracy, or nats per token) has fallen by more (default 0.02)",
    "baseline": "train the model first, until its score is 0.9 times this: for a head that is new",
    "epochs": "of distillation per stage (default 5)",
    "alpha": "weight of the labels against the answers of the model before the stage (default 0.7)",
    "learning_rate": "at the beginning of a stage (default 1e-4)",
    "seed": "of everything random (default 0)",
}
_TRAINING = ("stages", "target_parameters", "max_drop", "baseline", "epochs", "alpha", "learning_rate")
_DATA = '.jsonl or .jsonl.gz, a {"text": ..., "label": ...} per line; without labels, the model is a language model'


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 1 with one line on standard error if something failed; 130 if it was interrupted (Ctrl-C).

    argparse ends the process with status 2 if the arguments or the settings are wrong.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters gets question marks
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        config = _config(arguments)
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    try:
        from rmtkd import commands, processes  # not before: --help must not wait for transformers

        report = getattr(commands, arguments.command)(arguments, config)
        if not processes.first():
            return 0
    except KeyboardInterrupt:
        return _fail("stopped; a run that is called again with the same arguments goes on", 130)
    except ImportError as error:
        return _fail(f"{error}: pip install 'rmtkernels[rmtkd]'")
    except (RmtkernelsError, OSError) as error:
        return _fail(str(error))
    print(json.dumps(report.fields, indent=2) if arguments.json else report.text)
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(f"rmtkd: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rmtkd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    plan = commands.add_parser("plan", help="show what would become of a model; changes nothing")
    _add_model(plan)
    plan.add_argument("--data", required=True, type=Path, metavar="FILE", help=f"to calibrate on: {_DATA}")
    plan.add_argument("--output", type=Path, metavar="FOLDER", help="where to write plan.json and plan.png")
    _add_settings(plan, [name for name in SETTINGS if name not in _TRAINING])
    run = commands.add_parser("run", help="make a model smaller; killed and called again, it goes on")
    _add_model(run)
    run.add_argument("--data", required=True, type=Path, metavar="FILE", help=f"to train on: {_DATA}")
    run.add_argument("--dev", required=True, type=Path, metavar="FILE", help="to score on, like --data")
    run.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="result in model/, every stage in stages/"
    )
    _add_settings(run, list(SETTINGS))
    evaluate = commands.add_parser("evaluate", help="score, parameters and speed of a model")
    _add_model(evaluate)
    evaluate.add_argument("--data", required=True, type=Path, metavar="FILE", help=f"to score on: {_DATA}")
    compare = commands.add_parser("compare", help="two models side by side, timed in turn")
    compare.add_argument("models", nargs=2, type=Path, metavar="MODEL", help="folder of a model")
    compare.add_argument("--data", required=True, type=Path, metavar="FILE", help=f"to score on: {_DATA}")
    report = commands.add_parser("report", help="one HTML page of what plan or run found; it loads nothing")
    report.add_argument("folder", type=Path, metavar="FOLDER", help="the --output of plan or run")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page (default: FOLDER/report.html)")
    for command in (plan, run, evaluate, compare):
        _add_common(command)
    for command in (plan, run, evaluate, compare, report):
        _add_talk(command)
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="as save_pretrained or rmtkd writes it, with its tokenizer",
    )


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch", type=_count, default=32, metavar="N", help="texts per batch (default 32)")
    command.add_argument("--longest", type=_count, default=128, metavar="N", help="cut texts to N tokens (default 128)")
    command.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: PyTorch's choice)")


def _add_talk(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _add_settings(command: argparse.ArgumentParser, names: list[str]) -> None:
    group = command.add_argument_group("settings", "They go before those of --config.")
    group.add_argument("--config", type=Path, metavar="FILE", help="JSON of settings, as rmtkd.Config writes it")
    defaults = {field.name: field.default for field in fields(Config)}
    for name in names:
        options: dict[str, Any] = {"help": SETTINGS[name], "default": None, "dest": f"setting_{name}"}
        default = defaults[name]
        if isinstance(default, bool):
            options |= {"action": "store_true"}
        elif isinstance(default, tuple):
            options |= {"action": "append", "metavar": "PATTERN"}
        elif name in CHOICES:
            options |= {"choices": CHOICES[name]}
        else:
            options |= {"type": type(default), "metavar": "N" if isinstance(default, int) else "X"}
        group.add_argument(f"--{name.replace('_', '-')}", **options)


def _count(text: str) -> int:
    """An argparse type: whole numbers from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _config(arguments: argparse.Namespace) -> Config:
    """Defaults, then the file, then the flags."""
    path = getattr(arguments, "config", None)
    base = Config() if path is None else Config.from_json(path.read_text(encoding="utf-8"))
    given = {name: getattr(arguments, f"setting_{name}", None) for name in SETTINGS}
    return Config.from_fields(asdict(base) | {name: value for name, value in given.items() if value is not None})
