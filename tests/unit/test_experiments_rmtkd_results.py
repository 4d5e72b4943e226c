"""Units that are done once, intervals against closed forms, batches of like length."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.experiments import data_text, rmtkd_statistics, rmtkd_tables
from bench.experiments.rmtkd_units import Units


def test_a_unit_is_done_once_and_survives(tmp_path: Path) -> None:
    file, calls = tmp_path / "results.json", []

    def work() -> dict[str, float]:
        calls.append(1)
        return {"accuracy": 0.5}

    for _ in range(2):
        units = Units(file, "command", {"steps": (3, 4)})
        assert units.once(work, method="dense", seed=0)["accuracy"] == 0.5
    assert len(calls) == 1
    assert units.get(method="dense", seed=1) is None
    assert [unit["key"] for unit in json.loads(file.read_text())["units"]] == [{"method": "dense", "seed": 0}]
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    Units(file, "command", {"steps": 3}).once(dict, seed=0)
    with pytest.raises(ValueError, match="other settings"):
        Units(file, "command", {"steps": 4})
    with pytest.raises(ValueError, match="other made by"):
        Units(file, "another", {"steps": 3})


def test_work_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    units = Units(tmp_path / "results.json", "command", {})
    units.once(lambda: {"accuracy": 1.0}, seed=0)
    before = units.file.read_bytes()
    with pytest.raises(ZeroDivisionError):
        units.once(lambda: {"accuracy": 1 / 0}, seed=1)
    assert units.file.read_bytes() == before


def test_interval_over_seeds_is_students() -> None:
    mean, half = rmtkd_statistics.over_seeds([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302652729911275 / np.sqrt(3))
    assert np.isnan(rmtkd_statistics.over_seeds([1.0])[1])


def test_paired_difference_of_a_constant_gap_has_no_width() -> None:
    theirs = np.zeros((3, 50))
    found = rmtkd_statistics.paired(theirs + 1, theirs)
    assert found == (1, 0, 1, 1)


def test_bootstrap_over_items_matches_the_normal_interval() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.random((3, 900)) < 0.8, generator.random((3, 900)) < 0.75
    found = rmtkd_statistics.paired(ours, theirs)
    gap = (ours.astype(float) - theirs).mean(0)
    half = 1.96 * gap.std() / 30
    assert found.low == pytest.approx(gap.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gap.mean() + half, abs=0.1 * half)
    with pytest.raises(ValueError, match="one shape"):
        rmtkd_statistics.paired(ours, theirs[:2])


def test_batches_of_like_length_hold_every_row_once() -> None:
    lengths = torch.randint(3, 60, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = data_text.LikeLengths(lengths, 32, seed=1)
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) == 63
    assert sorted(i for batch in first for i in batch) == list(range(2000))
    assert first != second
    assert first == list(data_text.LikeLengths(lengths, 32, seed=1)) != list(data_text.LikeLengths(lengths, 32, seed=2))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in first)
    assert padded < 1.1 * sum(lengths)


class Sums(torch.nn.Module):
    """Logits that tell the rows apart: the sum of a row's ids, without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        total = self.scale * (input_ids * attention_mask).sum(1)
        return type("Output", (), {"logits": torch.stack([total, -total], dim=1)})


def test_logits_come_in_the_order_of_the_rows_and_are_remembered() -> None:
    rows = [{"input_ids": list(range(1, 2 + (7 * i) % 11)), "labels": i % 2} for i in range(150)]
    want = torch.tensor([float(sum(row["input_ids"])) for row in rows])
    assert torch.equal(data_text.logits(Sums(), rows)[:, 0], want)
    assert data_text.correct(Sums(), rows) == [1 - row["labels"] for row in rows]
    teacher = data_text.Remembered(rows, data_text.logits(Sums(), rows))
    batch = data_text.collate(rows[10:20])
    assert torch.equal(teacher(**data_text.inputs(batch))[:, 0], want[10:20])


def unit(method: str, seed: int, correct: str, **figures: object) -> dict[str, object]:
    accuracy = correct.count("1") / len(correct)
    return {
        "key": {"method": method, "seed": seed},
        "figures": {"accuracy": accuracy, "correct": correct, "parameters": 2_000_000, **figures},
    }


def test_a_table_pairs_the_seeds_it_has() -> None:
    units = [
        unit("dense", 0, "1100"),
        unit("dense, distilled", 0, "1110"),
        unit("RMT-KD", 0, "1000", parameters=1_000_000),
        unit("dense", 1, "1111"),
        unit("dense, distilled", 1, "1111"),
    ]
    _, _, dense, distilled, ours, *_ = rmtkd_tables.classification({"units": units}).splitlines()
    assert [cell.strip() for cell in dense.split("|")[1:4]] == ["dense", "2.00 M", ""]
    assert "| +12.5 ± 158.8 |" in distilled  # 25 and 0 points
    cells = [cell.strip() for cell in ours.split("|")[1:-1]]
    assert cells[1] == "1.00 M (-50.0%)" and cells[3] == "25.0" and cells[4] == "-25.0" and cells[6] == "-50.0"


def test_a_table_is_written_between_its_comments() -> None:
    text = "a\n<!-- begin: resnet (made by x) -->\nold\n<!-- end: resnet -->\nb\n"
    want = "a\n<!-- begin: resnet (made by x) -->\n| \\1 |\n<!-- end: resnet -->\nb\n"
    assert rmtkd_tables.written(text, "resnet", "| \\1 |") == want
    with pytest.raises(ValueError, match="one pair"):
        rmtkd_tables.written(text, "language", "x")


ROOT = Path(__file__).resolve().parents[2]
COMMITTED = [name for name in rmtkd_tables.TABLES if (ROOT / f"bench/results/rmtkd-{name}.json").is_file()]


@pytest.mark.parametrize("name", COMMITTED)
def test_the_page_shows_the_committed_results(name: str) -> None:
    page = (ROOT / "docs" / "rmtkd-results.md").read_text(encoding="utf-8")
    report = json.loads((ROOT / f"bench/results/rmtkd-{name}.json").read_text(encoding="utf-8"))
    assert rmtkd_tables.written(page, name, rmtkd_tables.TABLES[name](report)) == page


def test_a_quantile_table_has_a_row_per_kind() -> None:
    def group(kept: float, spikes: float | None) -> dict[str, object]:
        return {
            "d": 600,
            "edge / noise variance": 1.5,
            "above the edge": {"0.45": kept},
            "above the quantile itself": {"0.45": 0.55},
            "other estimators": {"median": 0.4, "trace": 0.1, "fit": 0.6},
            "spikes": spikes,
        }

    groups = {"layer.0.inner": group(0.3, 0.01), "layer.1.inner": group(0.5, 0.03), "residual": group(0.2, None)}
    units = [{"key": {"model": "m"}, "figures": {"groups": groups}}]
    lines = rmtkd_tables.quantile({"units": units}).splitlines()
    assert lines[2:] == [
        "| inner (2) | 600 | 1.50 | 40% | 55% | 40% | 10% | 60% | 2.0% |",
        "| residual (1) | 600 | 1.50 | 20% | 55% | 40% | 10% | 60% |  |",
    ]


def test_processes_that_share_a_file_keep_each_others_units(tmp_path: Path) -> None:
    file = tmp_path / "shared.json"
    first, second = Units(file, "us", {}), Units(file, "us", {})
    first.once(lambda: {"a": 1}, seed=0)
    second.once(lambda: {"a": 2}, seed=1)
    assert [unit["key"]["seed"] for unit in Units(file, "us", {}).units] == [0, 1]
