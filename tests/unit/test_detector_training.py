"""What training learns, and on which side of the split it learns it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eigentrack import Detector, MismatchError
from eigentrack.training import auroc, class_weights, split_by_item
from tests.helpers import generator, normal, same_bits

F = 12
NAMES = [f"d{i}" for i in range(F)]


def drifting(count: int, seed: int, strength: float = 0.8) -> tuple[list[Tensor], list[int]]:
    """Right: independent tokens. Wrong: a slow walk, each token of which is distributed like a right one."""
    random = generator(seed)
    sequences, labels = [], []
    for i in range(count):
        length = int(torch.randint(12, 30, (1,), generator=random))
        noise = torch.randn(length, F, generator=random)
        if i % 2:
            walk = noise[:, 0].clone()
            for t in range(1, length):
                walk[t] = strength * walk[t - 1] + math.sqrt(1 - strength**2) * noise[t, 0]
            noise[:, 0] = walk
        sequences.append(noise)
        labels.append(i % 2)
    return sequences, labels


def shifted(count: int, seed: int, shift: float = 0.5) -> tuple[list[Tensor], list[int]]:
    sequences = [normal(8 + i % 5, F, seed=1000 * seed + i) for i in range(count)]
    for i in range(1, count, 2):
        sequences[i][:, 3] += shift
    return sequences, [i % 2 for i in range(count)]


def area(detector: Detector, sequences: list[Tensor], labels: list[int]) -> float:
    """AUROC of the mean risk."""
    return auroc(torch.stack([risk.mean() for risk in detector.score(sequences)]), torch.tensor(labels))


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_it_learns_what_is_there(cell: str) -> None:
    detector = Detector(NAMES, cell=cell)
    history = detector.fit(*shifted(400, 1, shift=1.5), items=range(400), epochs=40, progress=False)
    assert area(detector, *shifted(200, 2, shift=1.5)) > 0.95
    assert history.validation_auroc[history.best_epoch] > 0.95


def test_it_learns_what_only_order_in_time_tells() -> None:
    detector = Detector(NAMES)
    detector.fit(*drifting(1200, 1, 0.95), items=range(1200), epochs=60, learning_rate=0.01, progress=False)
    sequences, labels = drifting(300, 2, 0.95)
    ordered = area(detector, sequences, labels)
    random = generator(0)
    mixed = area(detector, [x[torch.randperm(len(x), generator=random)] for x in sequences], labels)
    assert ordered > 0.9 and mixed < ordered - 0.15, (ordered, mixed)


def test_it_learns_nothing_from_shuffled_labels() -> None:
    sequences, labels = shifted(400, 1, shift=1.5)
    shuffled = torch.tensor(labels)[torch.randperm(400, generator=generator(5))].tolist()
    detector = Detector(NAMES)
    detector.fit(sequences, shuffled, items=range(400), epochs=40, progress=False)
    assert abs(area(detector, *shifted(400, 2, shift=0.0)) - 0.5) < 0.1
    assert 0.3 < area(detector, *shifted(400, 2, shift=1.5)) < 0.7


def test_classes_of_unequal_size_count_the_same() -> None:
    sequences, labels = shifted(600, 1, shift=0.0)
    kept = [i for i in range(600) if not labels[i] or i % 20 == 1]
    detector = Detector(NAMES)
    detector.fit([sequences[i] for i in kept], [labels[i] for i in kept], items=kept, epochs=4, progress=False)
    mean = torch.cat(detector.score(sequences)).mean()
    assert abs(float(mean) - 0.5) < 0.1, "without balance it would be about 0.09"
    assert class_weights(torch.tensor([0.0, 0, 0, 1])).tolist() == pytest.approx([4 / 6, 2])


def test_a_long_sequence_counts_as_much_as_a_short_one() -> None:
    """The loss by its formula: tokens averaged within a sequence, classes balanced as the training sequences were."""
    sequences, labels = shifted(90, 1, shift=1.5)
    sequences, labels = [x[:2] if i % 3 else x for i, x in enumerate(sequences)], [int(i % 3 == 0) for i in range(90)]
    held = [x[: 1 + i % 7] for i, x in enumerate(shifted(40, 2)[0])], [i % 2 for i in range(40)]
    detector = Detector(NAMES)
    history = detector.fit(sequences, labels, validation=held, epochs=3, progress=False)
    total = weights = 0.0
    for risk, label in zip(detector.score(held[0]), held[1], strict=True):
        weight = 90 / (2 * 30) if label else 90 / (2 * 60)
        total += weight * float(-torch.log(risk if label else 1 - risk).mean())
        weights += weight
    assert history.validation_loss[history.best_epoch] == pytest.approx(total / weights, rel=1e-5)


def test_items_never_straddle_the_split() -> None:
    sequences, labels = shifted(300, 1)
    items = [("question", i // 3) for i in range(300)]
    history = Detector(NAMES).fit(sequences, labels, items=items, epochs=1, validation=0.25, progress=False)
    inside, held = history.train_indices, history.validation_indices
    assert sorted(inside + held) == list(range(300)) and len(held) == 75
    assert not {items[i] for i in inside} & {items[i] for i in held}


def test_twins_stay_together_and_both_classes_are_held_out() -> None:
    items = [i // 2 for i in range(100)]
    labels = torch.tensor([float(i % 2) for i in range(100)])
    inside, held = split_by_item(items, labels, 0.2, generator(0))
    assert {i // 2 for i in held}.isdisjoint(i // 2 for i in inside) and labels[held].mean() == 0.5 and len(held) == 20
    assert split_by_item(items, labels, 0.2, generator(0)) == (inside, held)
    assert split_by_item(items, labels, 0.2, generator(1))[1] != held
    rare = torch.tensor([float(i < 10) for i in range(100)])
    _, held = split_by_item(list(range(100)), rare, 0.2, generator(0))
    assert rare[held].sum() == 2 and len(held) == 20, "each kind of item in its share"


def test_twins_that_straddled_would_be_remembered() -> None:
    """The split is what keeps validation honest: noise told apart by its item alone has no AUROC above chance."""
    sequences, labels, items = [], [], []
    for item in range(60):
        base = normal(6, F, seed=item)
        for twin in range(4):
            sequences.append(base + 0.01 * normal(6, F, seed=10_000 + 4 * item + twin))
            labels.append(item % 2)
            items.append(item)
    options: dict[str, Any] = {"epochs": 40, "patience": 40, "learning_rate": 0.02, "progress": False}
    honest = Detector(NAMES).fit(sequences, labels, items=items, **options)
    leaky = Detector(NAMES).fit(sequences, labels, items=range(240), **options)
    assert max(leaky.validation_auroc) > 0.95 and honest.validation_auroc[-1] < 0.8


def test_it_stops_early_and_keeps_the_best_weights() -> None:
    sequences, labels = shifted(120, 1, shift=0.3)
    held = shifted(120, 2, shift=0.3)
    detector = Detector(NAMES)
    options: dict[str, Any] = {"validation": held, "learning_rate": 0.02, "progress": False}
    history = detector.fit(sequences, labels, epochs=200, patience=5, **options)
    ran = len(history.validation_loss)
    assert ran == history.best_epoch + 6 < 200
    assert history.best_epoch == int(np.argmin(history.validation_loss))
    assert history.train_indices == history.validation_indices == []
    again = Detector(NAMES)
    again.fit(sequences, labels, epochs=history.best_epoch + 1, patience=200, **options)
    assert all(map(same_bits, detector.score(held[0]), again.score(held[0])))


def test_absent_rows_are_as_if_they_were_not_there() -> None:
    sequences, labels = shifted(60, 1)
    holes = []
    for sequence in sequences:
        holey = torch.full((2 * len(sequence) + 1, F), torch.nan)
        holey[1::2] = sequence
        holes.append(holey)
    plain, with_holes = Detector(NAMES), Detector(NAMES)
    options: dict[str, Any] = {"items": range(60), "epochs": 3, "progress": False}
    assert plain.fit(sequences, labels, **options) == with_holes.fit(holes, labels, **options)
    assert same_bits(with_holes.score(holes)[0][1::2], plain.score(sequences)[0])


def test_a_bar_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    sequences, labels = shifted(40, 1)
    Detector(NAMES).fit(sequences, labels, items=range(40), epochs=2)
    assert "auroc=" in capsys.readouterr().err
    Detector(NAMES).fit(sequences, labels, items=range(40), epochs=2, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0] * 20}, "both classes"),
        ({"labels": [0, 2] * 10}, "0 or 1"),
        ({"labels": [0, 1]}, "20 sequences"),
        ({"items": None}, "source item"),
        ({"items": range(3)}, "source item"),
        ({"items": [0] * 20}, "cannot be split"),
        ({"validation": 0.0}, "share"),
        ({"validation": 1.0}, "share"),
        ({"validation": ([], [])}, "validation"),
        ({"epochs": 0}, "epochs"),
        ({"patience": 0}, "patience"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_what_cannot_be_trained_on_changes_nothing(changes: dict[str, Any], message: str) -> None:
    sequences, labels = shifted(20, 1)
    detector = Detector(NAMES)
    detector.fit(sequences, labels, items=range(20), epochs=1, progress=False)
    before = detector.score(sequences)
    given: dict[str, Any] = {"labels": labels, "items": range(20), "epochs": 1, "progress": False}
    with pytest.raises(MismatchError, match=message):
        detector.fit(sequences, **(given | changes))
    assert all(map(same_bits, detector.score(sequences), before))


def test_sequences_without_a_token_are_named() -> None:
    sequences, labels = shifted(20, 1)
    for empty in (torch.empty(0, F), torch.full((3, F), torch.nan)):
        with pytest.raises(MismatchError, match="sequence 7"):
            Detector(NAMES).fit([*sequences[:7], empty, *sequences[8:]], labels, items=range(20), progress=False)


def test_auroc_counts_pairs() -> None:
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.2]), torch.tensor([0, 0, 1, 1, 1])
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    assert auroc(scores, labels) == pytest.approx(sum(map(float, pairs)) / 6)
    assert math.isnan(auroc(scores, torch.ones(5)))
