"""README: its figures are those of the committed results, and a target that was missed is explained."""

import json
import re
from pathlib import Path

import pytest

from bench.table import markdown
from rmtkernels import DESCRIPTORS

RESULT = "bench/results/first-run.json"


OPERATORS = "bench/results/operators.json"


@pytest.mark.parametrize(("result", "targets_only"), [(RESULT, False), (OPERATORS, True)])
def test_the_tables_are_made_from_the_committed_results(root: Path, result: str, targets_only: bool) -> None:
    readme = (root / "README.md").read_text()
    block = re.search(rf"<!-- made by: .*{result} -->\n(.*?)\n<!-- end of table -->", readme, re.DOTALL)
    assert block is not None
    assert block[1] == markdown(json.loads((root / result).read_text()), targets_only)


def test_a_missed_target_is_explained(root: Path) -> None:
    cases = json.loads((root / RESULT).read_text())["cases"]
    goals = [goal for case in cases.values() for goal in case["targets"]]
    assert len(goals) >= 7
    table = (root / "README.md").read_text().split(f"{RESULT} -->")[1]
    explained = table.split("<!-- end of table -->")[1].split("\n## ")[0]
    for goal in goals:
        assert goal["met"] or goal["what"].removeprefix("times faster than best of: ") in explained


def test_the_cost_is_that_of_the_descriptors_there_are(root: Path) -> None:
    assert json.loads((root / RESULT).read_text())["machine"]["descriptors"] == str(len(DESCRIPTORS))
