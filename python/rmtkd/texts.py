"""Texts for the command line: a .jsonl file as batches, and the score of a model on them."""

import gzip
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmtkd.calibration import as_it_was, move_to
from rmtkd.errors import RmtkdError
from rmtkd.progress import with_bar

IGNORED = -100  # the label of what does not count, as everywhere in PyTorch
_FEWEST = 512  # texts to calibrate on, if there are as many


class DataError(RmtkdError, ValueError):
    """A file of texts cannot be used."""


@dataclass(frozen=True)
class Example:
    """A line of a file: a text, and its class if it has one."""

    text: str
    label: int | str | None


def read_examples(path: str | Path) -> list[Example]:
    """The lines of a .jsonl or .jsonl.gz file, objects with "text" and, for classification, "label".

    Raises:
        DataError: if a line is no such object, only some lines have labels, or there are no lines.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    examples = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    examples.append(_example(line, f"line {number} of {path}"))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is not a whole text file: {error}") from error
    if not examples:
        raise DataError(f"{path} has no lines")
    if len({example.label is None for example in examples}) > 1:
        raise DataError(f"{path} has lines with a label and lines without: give all of them one, or none")
    return examples


def _example(line: str, where: str) -> Example:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise DataError(f'{where} is no object with a "text": {line.strip()!r:.60}')
    label = found.get("label")
    if isinstance(label, bool) or not (label is None or isinstance(label, (int, str))):
        raise DataError(f"{where} has {label!r:.40} for a label; it must be a number from 0, or a class's name")
    return Example(found["text"], label)


def class_indices(examples: Sequence[Example], names: Mapping[str, int]) -> list[int]:
    """Labels as numbers; names are looked up.

    Raises:
        DataError: if a name is not known, or a number is none of the model's classes.
    """
    indices = []
    for example in examples:
        index = names.get(example.label) if isinstance(example.label, str) else example.label
        if index is None or not 0 <= index < len(names):
            raise DataError(f"the label {example.label!r:.60} is no class of the model: {', '.join(names)}")
        indices.append(index)
    return indices


class Texts:
    """Tokenised texts, as batches for calibration, training and scoring.

    Args:
        tokenizer: of transformers. One without a padding token pads with its end token.
        examples: of `read_examples`.
        labels: class per example; None for a language model, whose labels are the tokens themselves.
        batch: examples per batch.
        longest: tokens after which texts are cut.
    """

    def __init__(
        self,
        tokenizer: Any,
        examples: Sequence[Example],
        labels: Sequence[int] | None,
        batch: int,
        longest: int,
        progress: bool = False,
    ) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer, self._batch = tokenizer, batch
        texts = [example.text for example in examples]
        self._ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        self._labels, self._progress = labels, progress

    def calibration(self, share: float = 1.0) -> list[dict[str, Tensor]]:
        """Batches without labels, of a random share of the texts that is the same each time."""
        count = min(max(math.ceil(share * len(self._ids)), _FEWEST), len(self._ids))
        chosen = sorted(random.Random(0).sample(range(len(self._ids)), count))
        return [self._inputs(chosen[first : first + self._batch]) for first in range(0, count, self._batch)]

    def training(self) -> Any:
        """A loader of batches with labels, in an order drawn from PyTorch's random state."""
        return torch.utils.data.DataLoader(
            range(len(self._ids)),  # type: ignore[arg-type]
            self._batch,
            shuffle=True,
            collate_fn=self._labelled,
        )

    def score(self, model: nn.Module) -> float:
        """Accuracy of a classifier; of a language model the mean log-likelihood of a token, in nats."""
        device = next(model.parameters()).device
        total, counted = 0.0, 0
        with as_it_was(model):
            for first in with_bar(range(0, len(self._ids), self._batch), "scoring", self._progress):
                batch = move_to(self._labelled(range(first, min(first + self._batch, len(self._ids)))), device)
                labels = batch.pop("labels")
                gained, rows = _score(model(**batch).logits.float(), labels, self._labels is None)
                total, counted = total + gained, counted + rows
        if not counted:
            raise DataError("no text has a second token: a language model is scored on tokens that follow others")
        return total / counted

    def one_and_all(self) -> dict[int, dict[str, Tensor]]:
        """The first text, and the first batch, by their number of texts: for timing."""
        first = min(self._batch, len(self._ids))
        return {count: self._inputs(range(count)) for count in sorted({1, first})}

    def _inputs(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        return dict(self._tokenizer.pad({"input_ids": [self._ids[index] for index in chosen]}, return_tensors="pt"))

    def _labelled(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        batch = self._inputs(chosen)
        if self._labels is None:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        else:
            labels = torch.tensor([self._labels[index] for index in chosen])
        return {**batch, "labels": labels}


def _score(logits: Tensor, labels: Tensor, tokens: bool) -> tuple[float, int]:
    """The sum over a batch, and over how many."""
    if not tokens:
        return float((logits.argmax(-1) == labels).sum()), len(labels)
    following = labels[:, 1:]
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten(), reduction="sum")
    return -float(loss), int((following != IGNORED).sum())
