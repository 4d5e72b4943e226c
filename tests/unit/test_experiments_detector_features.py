"""Features and tables of the detector's experiments, against slow formulas and the committed results."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")

from bench.experiments.detector import directions, page, ship, vectors
from bench.experiments.detector.items import Item, split_of
from bench.experiments.detector.report import result_path
from bench.experiments.detector.store import Answer

BLOCKS, HEADS, LAYERS, WIDTH = 2, 2, 2, 6


def answer(row: int, key: str, label: int, tokens: list[int], seed: int) -> Answer:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(tokens), LAYERS, WIDTH, generator=generator)
    hidden[:, :, 0] += 3 * label
    attention = torch.rand(len(tokens), BLOCKS, HEADS, 2, generator=generator) / 2
    return Answer(
        row=row,
        item=Item(key, key, "", ("", ""), (0, 1)),
        place=label,
        label=label,
        split=split_of(key),
        text="",
        hidden=hidden,
        choice=torch.zeros(len(tokens), 4),
        tokens=torch.tensor(tokens),
        laplacian=torch.zeros(BLOCKS, HEADS, 5),
        attention=attention,
        prompt=torch.zeros(LAYERS, WIDTH),
    )


@pytest.fixture(scope="module")
def data() -> Any:
    from bench.experiments.detector.data import Data

    answers = [
        answer(2 * item + label, f"item {item}", label, [1, 2, 3 + label, 5], 2 * item + label)
        for item in range(40)
        for label in (0, 1)
    ]
    states = torch.stack([one.hidden.mean(0) for one in answers])
    return Data("", None, answers, [one.choice for one in answers], states, states, states)  # type: ignore[arg-type]


def test_context_features_of_one_token() -> None:
    hidden, prompt = torch.randn(3, 1, 40), torch.randn(25, 1, 40).half()
    got = vectors.of_context(hidden, prompt)[1].double()
    token = hidden[1, 0].double() / hidden[1, 0].double().square().mean().sqrt()
    context = prompt[1:, 0].double()
    mean = context.mean(0)
    _, basis = torch.linalg.eigh((context - mean).T @ (context - mean))
    leading = basis[:, -vectors.RANK :]
    about = token - mean
    inside = (about @ leading).square().sum()
    before = hidden[0, 0].double() / hidden[0, 0].double().square().mean().sqrt()
    wanted = [
        (context @ token).max() / 40,
        inside / about.square().sum(),
        ((about.square().sum() - inside) / 40).log(),
        token @ mean / (mean.norm() * 40**0.5),
        token @ before / 40,
    ]
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-3, atol=1e-4)


def test_moments_can_be_taken_apart() -> None:
    rows = torch.randn(30, 2, 5) + 1
    whole, part = directions.Moments.of(rows), directions.Moments.of(rows[:10])
    rest, wanted = whole - part, directions.Moments.of(rows[10:])
    torch.testing.assert_close(rest.scatter, wanted.scatter, rtol=1e-4, atol=1e-4)
    centred = rows[10:, 0].double() - rows[10:, 0].double().mean(0)
    torch.testing.assert_close(wanted.scatter[0], centred.T @ centred, rtol=1e-4, atol=1e-4)


def test_a_direction_separates_tokens_of_answers_that_it_was_not_fitted_on(data: Any) -> None:
    found = directions.of_hidden(data, [0, 1])
    test = data.where("test")
    wrong = torch.cat([found[i] for i in test if data.labels[i]])
    right = torch.cat([found[i] for i in test if not data.labels[i]])
    assert wrong.shape[1] == LAYERS
    assert float(wrong.mean()) > 0 > float(right.mean())


def test_a_test_answer_does_not_change_what_others_get(data: Any) -> None:
    from dataclasses import replace

    changed = int(data.where("test")[0])
    answers = list(data.answers)
    answers[changed] = replace(answers[changed], hidden=100 * torch.rand(4, LAYERS, WIDTH))
    for before, after, i in zip(
        directions.of_hidden(data, [0]),
        directions.of_hidden(replace(data, answers=answers), [0]),
        range(len(data)),
        strict=False,
    ):
        assert i == changed or torch.equal(before, after)


def test_tokens_in_which_twins_differ(data: Any) -> None:
    found = directions.different_tokens(data.answers, [0, 1, 2])
    assert found[0].tolist() == found[1].tolist() == [False, False, True, False]
    assert found[2].tolist() == [True] * 4, "its twin is not among those wanted"


def test_lookback_ratio(data: Any) -> None:
    sink, prompt = data.answers[0].attention[1, 0, 1].tolist()
    ratio: Tensor = vectors.lookback(data)[0][1].unflatten(0, (BLOCKS, HEADS))[0, 1]
    assert float(ratio) == pytest.approx(prompt / (1 - sink), rel=1e-5)


@pytest.mark.parametrize(("file", "tables"), list(zip(page.PAGES, (8, 1), strict=True)))
def test_tables_are_those_of_the_committed_results(file: Path, tables: int) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(re.findall("<!-- table: ", text)) >= tables
    assert page.filled(text) == text


def test_the_card_is_made_from_the_committed_result() -> None:
    written = (ship.FOLDER / "README.md").read_text(encoding="utf-8")
    assert written == ship.card(json.loads(result_path("shipped").read_text(encoding="utf-8")))
    assert sum(path.stat().st_size for path in ship.FOLDER.iterdir()) < 200_000
