"""What descriptors give, principal directions, and the pictures: on small cases with known answers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from bench.experiments.detector import directions, figures, importance
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


def test_principal_directions_are_those_of_training_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.experiments.detector.data import Data

    monkeypatch.setattr(directions, "COMPONENTS", 2)
    answers = []
    for row in range(20):
        item, empty = Item(str(row), str(row), "", ("",), (0,)), torch.zeros(6, 4)
        hidden = torch.randn(6, LAYERS, 5, generator=torch.Generator().manual_seed(row))
        known = (item, 0, 0, split_of(item.group), "")
        answers.append(Answer(row, *known, hidden, empty, empty[:, 0], empty, empty, empty))
    data = Data("", Path(), answers, [], torch.zeros(0), torch.zeros(0), torch.zeros(0))
    rows = [(one.hidden / one.hidden.square().mean(2, keepdim=True).sqrt()).flatten(1) for one in answers]
    train = torch.cat([rows[i] for i in data.where("train")])
    leading = torch.linalg.svd(train - train.mean(0), full_matrices=False)[2][:2]
    wanted = ((rows[0] - train.mean(0)) @ leading.T).abs()
    torch.testing.assert_close(directions.principal(data, [0, 1])[0].abs().flip(1), wanted, rtol=1e-3, atol=1e-3)


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
