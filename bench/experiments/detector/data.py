"""A cached set in memory: one row per answer, and what the methods look at."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.experiments.detector.extract import default_cache
from bench.experiments.detector.store import Answer, read_answers
from bench.experiments.detector.windows import cached_descriptors

SPLITS = ("train", "validation", "test")
Array = NDArray[np.float64]


@dataclass
class Data:
    """Answers of a set, with everything per answer in the same order.

    Attributes:
        name: of the set.
        answers: with label and split.
        descriptors: (A, layers * F) each.
        mean, last, prompt: (n, layers, D) hidden states: the answer's mean, its last, and the last of the prompt (of
            root mean square 1).
    """

    name: str
    folder: Path
    answers: list[Answer]
    descriptors: list[Tensor]
    mean: Tensor
    last: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def labels(self) -> Array:
        return np.array([answer.label for answer in self.answers], dtype=float)

    @property
    def groups(self) -> list[str]:
        return [answer.item.group for answer in self.answers]

    @property
    def keys(self) -> list[str]:
        return [answer.item.key for answer in self.answers]

    def where(self, split: str) -> NDArray[np.intp]:
        """Rows of a split; validation and test hold strict items only."""
        return np.array(
            [i for i, a in enumerate(self.answers) if a.split == split and (a.item.strict or split == "train")],
            dtype=int,
        )

    def keep(self, wanted: Callable[[Answer], bool]) -> "Data":
        """The answers wanted."""
        rows = [i for i, answer in enumerate(self.answers) if wanted(answer)]
        index = torch.tensor(rows, dtype=torch.long)
        return replace(
            self,
            answers=[self.answers[i] for i in rows],
            descriptors=[self.descriptors[i] for i in rows],
            mean=self.mean[index],
            last=self.last[index],
            prompt=self.prompt[index],
        )

    def with_descriptors(self, setting: str) -> "Data":
        """The same answers, described with another setting of the monitor."""
        everything = cached_descriptors(self.folder, setting)
        return replace(self, descriptors=[everything[answer.row] for answer in self.answers])


def load(name: str, cache: Path | None = None) -> Data:
    """A set, with the monitor's default settings."""
    folder = (cache or default_cache()) / name
    answers = list(read_answers(folder))
    described = cached_descriptors(folder, "window 32")
    described = [described[answer.row] for answer in answers]
    mean = torch.stack([answer.hidden.mean(0) for answer in answers])
    last = torch.stack([answer.hidden[-1] for answer in answers])
    prompt = torch.stack([answer.prompt for answer in answers])
    return Data(name, folder, answers, described, mean, last, prompt)
