"""Trains the detector's network: split by item, balanced classes, early stopping."""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from eigentrack.errors import MismatchError
from eigentrack.network import Network, padded, token_losses, token_mean
from eigentrack.standardisation import Standardisation

LARGEST_GRADIENT = 1.0
EVALUATED_AT_ONCE = 256


@dataclass
class TrainingHistory:
    """How a training went, epoch by epoch.

    Attributes:
        train_loss, validation_loss: balanced cross-entropy, tokens averaged within each sequence first.
        validation_auroc: of the mean logit of a sequence; NaN if validation has one class only.
        best_epoch: whose weights were kept, from 0.
        train_indices, validation_indices: which of the sequences given to `fit`; none for explicit validation.
    """

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_auroc: list[float] = field(default_factory=list)
    best_epoch: int = -1
    train_indices: list[int] = field(default_factory=list)
    validation_indices: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """How to train: the arguments of `Detector.fit`."""

    epochs: int
    patience: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise MismatchError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise MismatchError(
                f"learning_rate must be above 0 and weight_decay not below, got {self.learning_rate!r} and "
                f"{self.weight_decay!r}"
            )


@dataclass(frozen=True)
class Labelled:
    """Sequences (T_i, F) without absent rows, and their (n,) labels in float32."""

    sequences: list[Tensor]
    labels: Tensor

    def subset(self, indices: Sequence[int]) -> "Labelled":
        return Labelled([self.sequences[i] for i in indices], self.labels[list(indices)])


def split_by_item(
    items: Sequence[Hashable] | None, labels: Tensor, share: float, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Indices for training and for validation; no item is in both.

    Items are drawn apart by the labels that they have (right, wrong, or both), so that both parts have what there is.

    Raises:
        MismatchError: if there is not an item to each label, there are too few, or the share is none.
    """
    if items is None or len(items) != len(labels):
        raise MismatchError(
            f"give the source item of each of the {len(labels)} sequences, so that none is on both sides of the split; "
            f"got {'none' if items is None else len(items)}"
        )
    if not 0 < share < 1:
        raise MismatchError(f"validation must be a share between 0 and 1, or (sequences, labels), got {share!r}")
    members: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault(item, []).append(index)
    kinds: dict[frozenset[float], list[Hashable]] = {}
    for item, indices in members.items():
        kinds.setdefault(frozenset(labels[indices].tolist()), []).append(item)
    held: set[int] = set()
    for kind in sorted(kinds, key=sorted):
        order = torch.randperm(len(kinds[kind]), generator=generator).tolist()
        for position in order[: round(share * len(order))]:
            held.update(members[kinds[kind][position]])
    if not held or len(held) == len(items):
        raise MismatchError(f"{len(members)} items cannot be split into training and {share:.0%} validation: give more")
    return [i for i in range(len(items)) if i not in held], sorted(held)


def train(
    network: Network,
    standardise: Standardisation,
    given: Labelled,
    held: Labelled,
    plan: Plan,
    history: TrainingHistory,
) -> None:
    """Leaves the network with the weights of the epoch of least validation loss, and the course in `history`."""
    generator = torch.Generator().manual_seed(plan.seed)
    optimiser = torch.optim.Adam(network.parameters(), plan.learning_rate, weight_decay=plan.weight_decay)
    balance = class_weights(given.labels)
    least, best = float("inf"), _weights(network)
    for epoch in _progress(plan, history):
        history.train_loss.append(_epoch(network, standardise, given, balance, plan.batch_size, optimiser, generator))
        loss, area = _evaluate(network, standardise, held, balance)
        history.validation_loss.append(loss)
        history.validation_auroc.append(area)
        if loss < least:
            least, best, history.best_epoch = loss, _weights(network), epoch
        elif epoch - history.best_epoch >= plan.patience:
            break
    network.load_state_dict(best)
    if history.best_epoch < 0:
        raise MismatchError("the loss was never finite: look for values beyond float32, or lower the learning rate")


def class_weights(labels: Tensor) -> Tensor:
    """(2,): what a sequence of class 0 and of class 1 counts, so that both classes count the same; 1 on average."""
    counts = torch.stack([(labels == 0).sum(), (labels == 1).sum()])
    return len(labels) / (2 * counts.clamp(min=1)).float()


def auroc(scores: Tensor, labels: Tensor) -> float:
    """How often a score of class 1 is above one of class 0, ties half; NaN if a class is missing."""
    values = scores.double().numpy()
    wrong, right = np.sort(values[labels.numpy() == 1]), np.sort(values[labels.numpy() == 0])
    if not (len(wrong) and len(right)):
        return float("nan")
    below = np.searchsorted(right, wrong, "left") + np.searchsorted(right, wrong, "right")
    return float(below.sum() / (2 * len(wrong) * len(right)))


@contextmanager
def one_thread() -> Iterator[None]:
    """The order of sums, and with it the last bits, depends on the number of threads; so small a net gains by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _epoch(
    network: Network,
    standardise: Standardisation,
    given: Labelled,
    balance: Tensor,
    batch_size: int,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
) -> float:
    """One pass over the sequences in random order; the mean loss on the way."""
    total = 0.0
    for chosen in torch.randperm(len(given.sequences), generator=generator).split(batch_size):
        labels = given.labels[chosen]
        batch, valid = padded([given.sequences[i] for i in chosen.tolist()])
        losses = token_mean(token_losses(network(standardise(batch)), labels), valid)
        loss = (losses * balance[labels.long()]).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
        optimiser.step()
        total += float(loss.detach()) * len(chosen)
    return total / len(given.sequences)


@torch.no_grad()
def _evaluate(network: Network, standardise: Standardisation, held: Labelled, balance: Tensor) -> tuple[float, float]:
    """Balanced loss, and AUROC of the mean logit."""
    losses, scores = [], []
    for start in range(0, len(held.sequences), EVALUATED_AT_ONCE):
        part = slice(start, start + EVALUATED_AT_ONCE)
        batch, valid = padded(held.sequences[part])
        logits = network(standardise(batch))
        losses.append(token_mean(token_losses(logits, held.labels[part]), valid))
        scores.append(token_mean(logits, valid))
    weights = balance[held.labels.long()]
    return float((torch.cat(losses) * weights).sum() / weights.sum()), auroc(torch.cat(scores), held.labels)


def _weights(network: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _progress(plan: Plan, history: TrainingHistory) -> Iterator[int]:
    """The epochs, with a bar that shows how validation goes."""
    if not plan.progress:
        yield from range(plan.epochs)
        return
    from tqdm import tqdm

    with tqdm(total=plan.epochs, desc="detector", unit="epoch") as bar:
        for epoch in itertools.islice(itertools.count(), plan.epochs):
            yield epoch
            bar.set_postfix(loss=f"{history.validation_loss[-1]:.3f}", auroc=f"{history.validation_auroc[-1]:.3f}")
            bar.update()
