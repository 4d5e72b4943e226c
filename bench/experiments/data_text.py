"""Text classification for the experiments of RMT-KD: subsets named here, batches of like length, and accuracy."""

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from bench.experiments import texts
from rmtkd.calibration import move_to

BATCH, EVALUATION_BATCH = 32, 64
POOL = 32  # batches that are drawn at random together and then sorted by length


class Task(NamedTuple):
    """Rows of token ids. `about` says which subset this is."""

    name: str
    labels: int
    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    about: str


def sst2(tokenizer: Any) -> Task:
    """All there is: 6920 sentences to train, 872 to test."""
    train, dev = (
        encode(tokenizer, [(row["text"],) for row in rows], [row["label"] for row in rows], 128)
        for rows in (texts.rows("sst2/train.jsonl.gz"), texts.rows("sst2/dev.jsonl.gz"))
    )
    return Task("SST-2", 2, train, dev, "sentence level: all 6920 to train, all 872 of dev to test, at most 128 tokens")


def qnli(tokenizer: Any, train: int = 3000, dev: int = 900, length: int = 64) -> Task:
    """A part of GLUE's dev pairs, split by question."""
    rows = texts.rows("qnli/train.jsonl.gz")
    questions = sorted({row["question"] for row in rows})
    order = {question: place for place, question in enumerate(random.Random(0).sample(questions, len(questions)))}
    rows.sort(key=lambda row: order[row["question"]])  # stable: the rows of a question stay together
    pairs = [(row["question"], row["sentence"]) for row in rows]
    encoded = encode(tokenizer, pairs, [row["label"] for row in rows], length)
    first = len(rows) - dev
    while rows[first]["question"] == rows[first - 1]["question"]:
        first += 1
    about = (
        f"{train} pairs to train and {len(rows) - first} to test, no question in both, of the 3957 there are (GLUE's "
        f"dev part), cut to {length} tokens"
    )
    return Task("QNLI", 2, encoded[:train], encoded[first:], about)


def ag_news(tokenizer: Any, train: int = 4000, dev: int = 1000, length: int = 64) -> Task:
    """A part of the original test part."""
    rows = texts.rows("ag_news/train.jsonl.gz")
    rows = random.Random(0).sample(rows, len(rows))
    encoded = encode(
        tokenizer, [(f"{row['title']} {row['text']}",) for row in rows], [row["label"] for row in rows], length
    )
    about = f"{train} articles to train and {dev} to test of the 5600 there are, cut to {length} tokens"
    return Task("AG News", 4, encoded[:train], encoded[-dev:], about)


TASKS: dict[str, Callable[[Any], Task]] = {"sst2": sst2, "qnli": qnli, "ag_news": ag_news}


def encode(tokenizer: Any, inputs: list[tuple[str, ...]], labels: list[int], length: int) -> list[dict[str, Any]]:
    parts = list(zip(*inputs, strict=True))
    found = tokenizer(*map(list, parts), truncation=True, max_length=length)
    keys = [key for key in ("input_ids", "token_type_ids") if key in found]
    return [{**{key: found[key][i] for key in keys}, "labels": label} for i, label in enumerate(labels)]


class LikeLengths(Sampler[list[int]]):
    """Batches of rows of about the same length: POOL batches are drawn together and cut up by length, in random order.

    Every pass over it is another order, the same for the same seed.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.passes = lengths, batch, seed, 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        generator = random.Random(1000 * self.seed + self.passes)
        self.passes += 1
        order = generator.sample(range(len(self.lengths)), len(self.lengths))
        batches = []
        for first in range(0, len(order), POOL * self.batch):
            pool = sorted(order[first : first + POOL * self.batch], key=lambda i: self.lengths[i])
            batches += [pool[i : i + self.batch] for i in range(0, len(pool), self.batch)]
        return iter(generator.sample(batches, len(batches)))


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded with 0 (BERT's [PAD]) to the longest of the batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        key: torch.tensor([row[key] + [0] * (longest - len(row[key])) for row in rows])
        for key in rows[0]
        if key != "labels"
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def loader(rows: list[dict[str, Any]], seed: int, batch: int = BATCH) -> DataLoader[Any]:
    sampler = LikeLengths([len(row["input_ids"]) for row in rows], batch, seed)
    return DataLoader(rows, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def calibration(rows: list[dict[str, Any]], seed: int, share: float = 0.1) -> list[dict[str, Tensor]]:
    """The paper's tenth of the training rows, without labels."""
    chosen = random.Random(seed).sample(rows, round(share * len(rows)))
    return [inputs(collate(chosen[i : i + BATCH])) for i in range(0, len(chosen), BATCH)]


@torch.no_grad()
def logits(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """(rows, labels) on the CPU, in the order of the rows, in eval mode; the mode is put back."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    found: list[Tensor] = []
    for first in range(0, len(order), EVALUATION_BATCH):
        batch = collate([rows[i] for i in order[first : first + EVALUATION_BATCH]])
        found.append(model(**move_to(inputs(batch), device)).logits.cpu())
    model.train(training)
    result = torch.cat(found)
    return result[torch.tensor(np.argsort(order))]


def correct(model: Any, rows: list[dict[str, Any]]) -> list[int]:
    """1 for every row whose label the model finds, else 0."""
    labels = torch.tensor([row["labels"] for row in rows])
    return [int(hit) for hit in logits(model, rows).argmax(1) == labels]


class Remembered(torch.nn.Module):
    """A teacher whose logits on the training rows are computed once: in eval mode they never change."""

    def __init__(self, rows: list[dict[str, Any]], found: Tensor) -> None:
        super().__init__()
        self.found = torch.nn.Parameter(found, requires_grad=False)
        self.places = {tuple(row["input_ids"]): place for place, row in enumerate(rows)}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        lengths = attention_mask.sum(1).tolist()
        rows = [tuple(row[:length]) for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        return self.found[torch.tensor([self.places[row] for row in rows])]
