"""`python -m bench ACTION`: ours against well-kept peers. docs/benchmarks.md says what each action is for."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.experiments.results import write_json


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 if every case was right and met its targets and nothing got slower, else 1."""
    options = _parser().parse_args(arguments)
    if not __debug__:
        sys.exit("results are checked by assertions, which python -O leaves out: run without it")
    status: int = options.action(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, action: Any, text: str, names: str = "") -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=text)
        found.set_defaults(action=action)
        if names:
            found.add_argument("names", nargs="*", metavar=names, help="names, or beginnings of names (default: all)")
        return found

    add("list", _list, "the cases", "CASE")
    add("verify", _verify, "check the results of ours and of the peers, and time nothing", "CASE")
    run = add("run", _run, "check the results, then time ours and the peers in turn", "CASE")
    scale = add("scale", _scale, "time and memory against each size, with the exponents of fit and theory", "OPERATOR")
    for timed in (run, scale):
        timed.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    table = add("table", _table, "results as a table for the README")
    table.add_argument("file", type=Path, metavar="FILE")
    table.add_argument("--targets", action="store_true", help="only the peers that have a target")
    page = add("page", _page, "make the tables of docs/benchmarks.md from the committed results")
    page.add_argument("--write", type=Path, metavar="FILE", required=True, help="the page")
    compare = add("compare", _compare, "two runs: what moved beyond noise; exit status 1 if something got slower")
    compare.add_argument("old", type=Path, metavar="OLD")
    compare.add_argument("new", type=Path, metavar="NEW")
    compare.add_argument("--margin", type=float, default=0.05, help="how much slower is a regression (default: 0.05)")
    plot = add("plot", _plot, "results of run or scale as SVG files")
    plot.add_argument("file", type=Path, metavar="FILE")
    plot.add_argument("-o", "--output", type=Path, metavar="FOLDER", required=True)
    instructions = add("instructions", _instructions, "what each CPU kernel executes, against the budget (valgrind)")
    instructions.add_argument("--write", action="store_true", help="make the budget anew")
    return parser


def _names(options: argparse.Namespace, known: Any) -> list[str]:
    names = [name for name in known if not options.names or any(name.startswith(given) for given in options.names)]
    if not names:
        sys.exit(f"nothing begins with any of {options.names}; there is: {', '.join(known)}")
    return names


def _list(options: argparse.Namespace) -> int:
    from bench.cases import REGISTRY

    print("\n".join(_names(options, REGISTRY)))
    return 0


def _verify(options: argparse.Namespace) -> int:
    return _check_and_time(options, timed=False)


def _run(options: argparse.Namespace) -> int:
    return _check_and_time(options, timed=True)


def _check_and_time(options: argparse.Namespace, timed: bool) -> int:
    """A case whose results are wrong, or that lacks its data, is named, not timed, and makes the exit status 1."""
    from bench.cases import REGISTRY
    from bench.measure import machine, measure

    found: dict[str, Any] = {"machine": machine(), "cases": {}, "wrong": {}, "not run": {}}
    for name in _names(options, REGISTRY):
        threads, setup = REGISTRY[name]
        torch.set_num_threads(threads)
        try:
            prepared = setup()
            prepared.verify()
        except AssertionError as error:
            found["wrong"][name] = str(error)
            print(f"{name}: WRONG, so not timed: {error}", flush=True)
            continue
        except FileNotFoundError as error:
            found["not run"][name] = str(error)
            print(f"{name}: not run: {error}", flush=True)
            continue
        print(f"{name} ({threads} thread{'s' * (threads > 1)}): results right", flush=True)
        if timed:
            found["cases"][name] = {"threads": threads, **measure(prepared)}
            _write(options.json, found)
    if timed:
        _write(options.json, found)
    missed = any(not line["met"] for case in found["cases"].values() for line in case["targets"])
    return int(missed or bool(found["wrong"]) or bool(found["not run"]))


def _scale(options: argparse.Namespace) -> int:
    from bench.measure import machine
    from bench.scale import SWEEPS, measure

    found: dict[str, Any] = {"machine": machine(), "scales": {}}
    for name in _names(options, SWEEPS):
        print(name, flush=True)
        found["scales"][name] = measure(SWEEPS[name])
        _write(options.json, found)
    return 0


def _table(options: argparse.Namespace) -> int:
    from bench.table import markdown

    print(markdown(_read(options.file), options.targets))
    return 0


def _page(options: argparse.Namespace) -> int:
    from bench.page import filled

    options.write.write_text(filled(options.write.read_text()))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from bench.compare import report

    text, regressed = report(_read(options.old), _read(options.new), options.margin)
    print(text)
    return int(regressed)


def _plot(options: argparse.Namespace) -> int:
    from bench.plot import draw

    options.output.mkdir(parents=True, exist_ok=True)
    for file in draw(_read(options.file), options.output):
        print(file)
    return 0


def _instructions(options: argparse.Namespace) -> int:
    from bench.instructions import main as count

    return count(options.write)


def _write(file: Path | None, found: dict[str, Any]) -> None:
    """After each case: what is interrupted keeps what it has."""
    if file is not None:
        write_json(file, found)


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    sys.exit(main())
