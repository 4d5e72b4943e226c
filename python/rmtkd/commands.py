"""What the commands of the command line do, and what they report."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import rmtkd
from rmtkd import files, processes
from rmtkd.calibration import run as forward
from rmtkd.config import Config
from rmtkd.errors import ModelError
from rmtkd.latency import milliseconds
from rmtkd.planning import parameters
from rmtkd.table import aligned, change, count
from rmtkd.texts import Example, Texts, class_indices, read_examples

CALIBRATION_SHARE = 0.1  # of the training texts: the paper's


@dataclass(frozen=True)
class Report:
    """What a command found, for a program and for a person."""

    fields: Mapping[str, Any]
    text: str


def plan(arguments: argparse.Namespace, config: Config) -> Report:
    """What would become of a model."""
    examples = read_examples(arguments.data)
    loaded = _load(arguments.model, examples, arguments, config.seed)
    texts = loaded.texts(examples, arguments)
    planned = rmtkd.plan(loaded.model, texts.calibration(), config, progress=not arguments.quiet)
    text = planned.table()
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        files.write_whole(arguments.output / files.PLAN, planned.to_json())
        picture = planned.plot(arguments.output / "plan.png")
        text += f"\npicture: {picture}"
    return Report(json.loads(planned.to_json()), text)


def run(arguments: argparse.Namespace, config: Config) -> Report:
    """The whole: stages in output/stages, their end in output/model, and what they did in output/result.json."""
    result_folder = arguments.output / "model"
    files.refuse_foreign(result_folder)
    examples, unseen = read_examples(arguments.data), read_examples(arguments.dev)
    loaded = _load(arguments.model, [*examples, *unseen], arguments, config.seed)
    if loaded.new_head and not config.baseline:
        raise ModelError(
            f"{arguments.model} has no trained classification head: say with --baseline what accuracy a trained one "
            "would reach, and it is trained first"
        )
    train, dev = loaded.texts(examples, arguments), loaded.texts(unseen, arguments)
    result = rmtkd.run(
        loaded.model,
        train.calibration(CALIBRATION_SHARE),
        train.training(),
        dev.score,
        config,
        folder=arguments.output / "stages",
        progress=not arguments.quiet,
    )
    found = {"history": [asdict(stage) for stage in result.history], "reason": result.reason}
    if not processes.first():
        return Report(found, "")
    rmtkd.save(result.model, result_folder, config=config, tokenizer=loaded.tokenizer)
    files.sweep(result_folder)
    files.write_whole(arguments.output / files.RESULT, json.dumps(found, indent=2))
    return Report(found, f"{result.table()}\nmodel: {result_folder}")


def report(arguments: argparse.Namespace, config: Config) -> Report:
    """One page of what plan or run have left."""
    from rmtkd.report import page, read

    path = arguments.output or arguments.folder / "report.html"
    files.write_whole(path, page(*read(arguments.folder)))
    return Report({"report": str(path)}, f"report: {path}")


def evaluate(arguments: argparse.Namespace, config: Config) -> Report:
    """Score, size and speed of one model."""
    return _measure([arguments.model], arguments, config)


def compare(arguments: argparse.Namespace, config: Config) -> Report:
    """The same of two."""
    return _measure(arguments.models, arguments, config)


@dataclass(frozen=True)
class _Loaded:
    """A model with its tokenizer, and whether its classification head is new."""

    model: Any
    tokenizer: Any
    new_head: bool

    def texts(self, examples: list[Example], arguments: argparse.Namespace) -> Texts:
        labels = None
        if examples[0].label is not None:
            labels = class_indices(examples, self.model.config.label2id)
        return Texts(self.tokenizer, examples, labels, arguments.batch, arguments.longest, not arguments.quiet)


def _load(folder: Path, examples: list[Example], arguments: argparse.Namespace, seed: int) -> _Loaded:
    """A classifier if the examples have labels, else a language model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder of a model")
    torch.manual_seed(seed)  # a new head is drawn
    highest = max((example.label for example in examples if isinstance(example.label, int)), default=0)
    kind: Any = AutoModelForCausalLM if examples[0].label is None else AutoModelForSequenceClassification
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if (folder / files.DESCRIPTION).is_file():
            loaded = rmtkd.load(folder)
            _check_task(folder, loaded, labelled=examples[0].label is not None)
            return _Loaded(loaded, tokenizer, False)
        with files.quiet_transformers():
            model, told = _from_pretrained(kind, folder, highest + 1)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"cannot load {folder}: {error}") from error
    return _Loaded(model.eval(), tokenizer, bool(told["missing_keys"]))


def _check_task(folder: Path, model: Any, labelled: bool) -> None:
    """A saved model is what it is: no head is drawn for it."""
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    if classifies != labelled:
        raise ModelError(
            f"{folder} holds a {type(model).__name__}, which is for texts {'with' if classifies else 'without'} labels"
        )


def _from_pretrained(kind: Any, folder: Path, classes: int) -> tuple[Any, Any]:
    """The model in float32, and what transformers tells about it; with so many classes if it has a head for fewer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    if kind is not AutoModelForCausalLM:
        known = AutoConfig.from_pretrained(folder, local_files_only=True).num_labels
        options["num_labels"] = max(known, classes)
    loaded: tuple[Any, Any] = kind.from_pretrained(folder, **options)
    return loaded


def _measure(folders: list[Path], arguments: argparse.Namespace, config: Config) -> Report:
    """Scores one after the other; times in turn, on the first text alone and on the first batch."""
    examples = read_examples(arguments.data)
    models = [_load(folder, examples, arguments, config.seed) for folder in folders]
    for folder, loaded in zip(folders, models, strict=True):
        if loaded.new_head:
            raise ModelError(f"{folder} has no trained classification head, so it has no score")
    texts = [loaded.texts(examples, arguments) for loaded in models]
    found = [
        {"model": str(folder), "parameters": parameters(loaded.model), "score": one.score(loaded.model)}
        for folder, loaded, one in zip(folders, models, texts, strict=True)
    ]
    times = _times([loaded.model for loaded in models], texts)
    for index, fields in enumerate(found):
        fields["milliseconds"] = {size: taken[index] for size, taken in times.items()}
        fields["texts"] = len(examples)
        if examples[0].label is None:
            fields["perplexity"] = math.exp(-float(str(fields["score"])))
    return Report(found[0] if len(found) == 1 else {"models": found}, _side_by_side(found))


def _times(models: list[Any], texts: list[Texts]) -> dict[int, list[float]]:
    """Milliseconds of a forward pass, by texts in the batch, of each model."""
    batches = [one.one_and_all() for one in texts]
    times = {}
    for size in batches[0]:
        functions = {
            str(index): lambda model=model, batch=batches[index][size]: forward(model, batch)
            for index, model in enumerate(models)
        }
        taken = milliseconds(functions)
        times[size] = [taken[str(index)] for index in range(len(models))]
    return times


def _side_by_side(found: list[dict[str, Any]]) -> str:
    """A row per quantity, a column per model, and what has changed from the first to the second."""
    rows = [["", *(str(fields["model"]) for fields in found)]]
    rows.append(["parameters", *(count(fields["parameters"]) for fields in found)])
    name = "perplexity" if "perplexity" in found[0] else "accuracy"
    score = "perplexity" if name == "perplexity" else "score"
    rows.append([name, *(f"{fields[score]:.4f}" for fields in found)])
    for size in found[0]["milliseconds"]:
        title = f"ms, {size} text{'s' if size > 1 else ''}"
        rows.append([title, *(f"{fields['milliseconds'][size]:.1f}" for fields in found)])
    if len(found) == 2:
        rows[0].append("")
        rows[1].append(change(*(fields["parameters"] for fields in found)))
        first, second = (fields[score] for fields in found)
        rows[2].append(f"{second - first:+.4f}")
        for row, size in zip(rows[3:], found[0]["milliseconds"], strict=True):
            slow, fast = (fields["milliseconds"][size] for fields in found)
            row.append(f"{slow / fast:.2f} times as fast")
    return aligned(rows)
