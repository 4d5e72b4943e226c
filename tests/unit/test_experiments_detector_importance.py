"""What descriptors give, subspaces of training answers, and the pictures: on small cases with known answers."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from bench.experiments.detector import figures, importance, subspaces
from bench.experiments.detector.items import Item, split_of
from bench.experiments.detector.store import Answer
from rmtkernels import DESCRIPTORS

F, LAYERS = len(DESCRIPTORS), 2


def sequences(number: int = 6) -> list[torch.Tensor]:
    """Row t of sequence s has s + t / 64 in every column, plus the column times 1024: exact in float32."""
    columns = 1024.0 * torch.arange(LAYERS * F)
    return [s + torch.arange(2 + s % 3)[:, None] / 64 + columns for s in range(number)]


def test_one_descriptor_comes_from_another_answer_and_the_rest_stays() -> None:
    before = sequences()
    for own, changed in zip(before, importance.exchanged(before, 3, seed=0), strict=True):
        kept = [column for column in range(LAYERS * F) if column % F != 3]
        assert torch.equal(changed[:, kept], own[:, kept])
        course = changed[:, 3] - 3 * 1024
        donor = int(course[0])
        wanted = before[donor][torch.arange(len(own)).clamp(max=len(before[donor]) - 1), 3] - 3 * 1024
        assert torch.equal(course, wanted)
        assert torch.equal(changed[:, 3 + F] - 1024 * (3 + F), course), "all layers from one donor"
    assert not all(map(torch.equal, before, importance.exchanged(before, 3, seed=0)))


def test_groups_are_all_descriptors_once() -> None:
    assert sorted(name for group in importance.GROUPS.values() for name in group) == sorted(DESCRIPTORS)


def test_what_is_left_out_is_gone_from_all_layers() -> None:
    names = ("overlap", "entropy")
    rows = importance.without(sequences(), names)[0]
    assert rows.shape[1] == LAYERS * (F - 2)
    left = {int(value) // 1024 % F for value in rows[0].tolist()}
    assert left == set(range(F)) - {DESCRIPTORS.index(name) for name in names}


def test_what_carries_the_label_is_lost_when_exchanged() -> None:
    labels = np.array([0.0, 1] * 30)
    whole = labels + 0.1 * np.random.default_rng(0).normal(size=60)
    groups = [str(index // 2) for index in range(60)]
    value, low, high = importance.lost([whole], [[whole[::-1], whole]], labels, groups)
    assert value == pytest.approx(0.5) and low <= value <= high
    assert importance.lost([whole], [[whole]], labels, groups) == [0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def data() -> Any:
    """Wrong tokens spread along the first axis, right ones along the second; no mean tells them apart."""
    from bench.experiments.detector.data import Data

    answers = []
    for row in range(120):
        label, generator = row % 2, torch.Generator().manual_seed(row)
        hidden = torch.randn(6, LAYERS, 24, generator=generator)
        hidden[..., 1 - label] *= 3
        item = Item(str(row // 2), str(row // 2), "", ("", ""), (0, 1))
        empty = torch.zeros(6, 4)
        answers.append(
            Answer(row, item, label, label, split_of(item.group), "", hidden, empty, empty[:, 0], empty, empty, empty)
        )
    states = torch.stack([one.hidden.mean(0) for one in answers])
    return Data("", Path(), answers, [one.choice for one in answers], states, states, states)


def test_likelihoods_see_what_no_direction_sees(data: Any) -> None:
    found = [rows.mean() for rows in subspaces.likelihoods(data)]
    test = data.where("test")
    wrong, right = ([float(found[i]) for i in test if data.labels[i] == label] for label in (1, 0))
    assert min(np.mean(wrong), -np.mean(right)) > 0


def test_likelihoods_of_a_training_answer_do_not_know_it(data: Any) -> None:
    from dataclasses import replace

    changed = int(data.where("train")[0])
    answers = list(data.answers)
    answers[changed] = replace(answers[changed], label=1 - answers[changed].label)
    before, after = subspaces.likelihoods(data), subspaces.likelihoods(replace(data, answers=answers))
    assert torch.equal(before[changed], after[changed])
    test = int(data.where("test")[0])
    assert not torch.equal(before[test], after[test]), "it is in the fit for others"


def test_leading_directions_against_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspaces, "LEADING", 2)
    monkeypatch.setattr(subspaces, "WINDOW", 4)
    rows, basis = torch.randn(1, 6, 12), torch.linalg.qr(torch.randn(1, 12, 3)).Q
    window = rows[0, 2:] - rows[0, 2:].mean(0)
    _, sizes, directions = torch.linalg.svd(window, full_matrices=False)
    inside = (directions[:2] @ basis[0]).square().sum(1)
    wanted = torch.stack([inside.mean(), (inside * sizes[:2] ** 2).sum() / (sizes[:2] ** 2).sum()])
    torch.testing.assert_close(subspaces._leading(rows, basis)[5], wanted, rtol=1e-4, atol=1e-5)


def test_the_pictures_are_those_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    committed = {name: figures.path_of(name) for name in figures.FIGURES}
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.main()
    for name, path in committed.items():
        picture, made = (one.read_text(encoding="utf-8") for one in (path, figures.path_of(name)))
        assert path.stat().st_size < 150_000
        assert len(curves(made)) > 2
        if f"Matplotlib v{matplotlib.__version__}" in picture:  # another version sets the axes a little elsewhere
            assert curves(made) == curves(picture), name


def curves(svg: str) -> list[str]:
    return re.findall(r'<path d="([^"]*)"\s+clip-path', svg)
