"""The files that experiments write."""

import json
from pathlib import Path

import pytest

from bench.experiments.results import write_json
from bench.experiments.texts import ROOT


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "r.json", {"a": [1.5, float("nan")], "b": {"c": (float("-inf"), "NaN")}})
    found = json.loads((tmp_path / "deep" / "r.json").read_text(), parse_constant=refuse)
    assert found == {"a": [1.5, None], "b": {"c": [None, "NaN"]}}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "r.json", {"a": object()})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("file", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda file: file.stem)
def test_committed_results_are_json(file: Path) -> None:
    json.loads(file.read_text(), parse_constant=refuse)
