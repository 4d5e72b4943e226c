"""Where each hidden state lies along the direction that tells wrong training answers from right ones, layer by layer.

Linear discriminants of tokens, from sums and products alone. A training answer gets its values from directions that
were fitted on other sources, as a test answer does.
"""

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.experiments.detector.data import Data
from bench.experiments.detector.items import draw
from bench.experiments.detector.probes import logistic
from bench.experiments.detector.store import Answer
from bench.experiments.detector.vectors import normalised

FOLDS = 5
COMPONENTS = 64  # principal directions


@dataclass
class Moments:
    """Of (n, layers, D) rows of one class: count, sums (layers, D), products (layers, D, D)."""

    count: float
    sums: Tensor
    products: Tensor

    @staticmethod
    def of(rows: Tensor) -> "Moments":
        by_layer = rows.transpose(0, 1)
        return Moments(len(rows), by_layer.double().sum(1), (by_layer.mT @ by_layer).double())

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.sums + other.sums, self.products + other.products)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.count - other.count, self.sums - other.sums, self.products - other.products)

    @property
    def mean(self) -> Tensor:
        return self.sums / self.count

    @property
    def scatter(self) -> Tensor:
        return self.products - self.count * self.mean[:, :, None] * self.mean[:, None, :]


def directions(
    data: Data, rows: list[Tensor], *, cumulative: bool = False, differing: bool = False, shrinkage: float = 0.1
) -> list[Tensor]:
    """(A, layers) of every answer.

    Args:
        data: the set.
        rows: (A, layers, D) of every answer; each layer has a direction of its own.
        cumulative: means over the tokens so far instead of tokens.
        differing: fit on the tokens that an answer does not share with its twin.
        shrinkage: of the covariance, in units of its mean eigenvalue.
    """
    if cumulative:
        rows = [row.cumsum(0) / torch.arange(1, len(row) + 1)[:, None, None] for row in rows]
    taught = different_tokens(data.answers, data.where("train").tolist()) if differing else None
    moments = moments_by_fold(data, rows, taught)
    fitted = {fold: discriminant(right, wrong, shrinkage) for fold, (right, wrong) in moments.items()}
    found = []
    for i, row in enumerate(rows):
        weights, offsets = fitted[fold_of(data, i)]
        found.append((row * weights).sum(2) - offsets)
    return found


def fold_of(data: Data, row: int) -> int:
    """Which of the fits an answer gets its values from: FOLDS if it is not for training, which is the fit on all."""
    return int(draw(f"fold {data.groups[row]}") * FOLDS) if data.answers[row].split == "train" else FOLDS


def moments_by_fold(
    data: Data, rows: list[Tensor], taught: dict[int, Tensor] | None = None
) -> dict[int, tuple[Moments, Moments]]:
    """Of right and of wrong training answers outside each fold, and of all as the last; of the tokens `taught`."""
    train = data.where("train").tolist()
    folds = {i: fold_of(data, i) for i in train}
    moments = {
        (fold, label): Moments.of(
            torch.cat(
                [
                    rows[i][taught[i]] if taught else rows[i]
                    for i in train
                    if folds[i] == fold and data.answers[i].label == label
                ]
            )
        )
        for fold in range(FOLDS)
        for label in (0, 1)
    }
    right, wrong = (_added([moments[fold, label] for fold in range(FOLDS)]) for label in (0, 1))
    found = {fold: (right - moments[fold, 0], wrong - moments[fold, 1]) for fold in range(FOLDS)}
    return found | {FOLDS: (right, wrong)}


def of_hidden(data: Data, layers: list[int], **options: Any) -> list[Tensor]:
    """(A, layers): directions of the hidden states, rows of root mean square 1; the embedding is layer 0."""
    return directions(data, [normalised(answer.hidden[:, layers]) for answer in data.answers], **options)


def of_hidden_together(data: Data, layers: list[int], **options: Any) -> list[Tensor]:
    """(A, 1): one direction for these layers side by side."""
    rows = [normalised(answer.hidden[:, layers]).flatten(1)[:, None] for answer in data.answers]
    return directions(data, rows, **options)


def principal(data: Data, layers: list[int]) -> list[Tensor]:
    """(A, COMPONENTS): coordinates of these layers, side by side, along the principal directions of training tokens."""
    rows = [normalised(answer.hidden[:, layers]).flatten(1) for answer in data.answers]
    total = Moments.of(torch.cat([rows[i] for i in data.where("train")])[:, None])
    _, vectors = torch.linalg.eigh(total.scatter[0])
    leading = vectors[:, -COMPONENTS:].float()
    mean = total.mean[0].float()
    return [(row - mean) @ leading for row in rows]


def of_features(data: Data, features: list[Tensor], **options: Any) -> list[Tensor]:
    """(A, 1): the direction of (A, F) features, standardised on training answers and cut at five deviations."""
    known = torch.cat([features[i] for i in data.where("train")]).double()
    centre, scale = known.mean(0), known.std(0) + 1e-6
    return directions(data, [((one - centre) / scale).clamp(-5, 5).float()[:, None] for one in features], **options)


def probe_so_far(data: Data, strength: float = 0.01) -> list[Tensor]:
    """(A, 1): the logistic probe of mean hidden states of all layers, on the mean of the tokens so far.

    Training answers get theirs from probes of other sources.
    """
    means, labels = data.mean.flatten(1).numpy(), data.labels
    train = data.where("train")
    folds = np.full(len(data), FOLDS)
    folds[train] = [int(draw(f"fold {data.groups[i]}") * FOLDS) for i in train]
    found = [torch.empty(len(answer), 1) for answer in data.answers]
    for fold in range(FOLDS + 1):
        taught = train[folds[train] != fold]
        fitted = logistic(strength).fit(means[taught], labels[taught])
        for i in np.flatnonzero(folds == fold):
            hidden = data.answers[i].hidden.flatten(1)
            so_far = hidden.cumsum(0) / torch.arange(1, len(hidden) + 1)[:, None]
            found[i][:, 0] = torch.from_numpy(fitted.decision_function(so_far.numpy()))
    return found


def discriminant(right: Moments, wrong: Moments, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Directions (layers, D) and offsets (layers,)."""
    covariance = (right.scatter + wrong.scatter) / (right.count + wrong.count)
    level = shrinkage * covariance.diagonal(dim1=1, dim2=2).mean(1)
    shrunk = covariance + level[:, None, None] * torch.eye(covariance.shape[-1], dtype=torch.float64)
    directions = torch.linalg.solve(shrunk, wrong.mean - right.mean)
    return directions.float(), (directions * (right.mean + wrong.mean) / 2).sum(1).float()


def different_tokens(answers: list[Answer], wanted: list[int]) -> dict[int, Tensor]:
    """Per answer wanted, which of its tokens do not match its twin's in order; all of them, without a twin."""
    by_key: dict[str, list[int]] = {}
    for i in wanted:
        by_key.setdefault(answers[i].item.key, []).append(i)
    found = {i: torch.ones(len(answers[i])).bool() for i in wanted}
    for some in by_key.values():
        if len(some) == 2:
            one, other = some
            matcher = SequenceMatcher(
                None, answers[one].tokens.tolist(), answers[other].tokens.tolist(), autojunk=False
            )
            for start, behind, size in matcher.get_matching_blocks():
                found[one][start : start + size] = False
                found[other][behind : behind + size] = False
    return found


def _added(parts: list[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
