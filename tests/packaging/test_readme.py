"""README: its figures are those of the committed result, and that result met its targets."""

import json
import re
from pathlib import Path

from bench.table import markdown

RESULT = "bench/results/first-run.json"


def test_the_table_is_made_from_the_committed_result(root: Path) -> None:
    readme = (root / "README.md").read_text()
    block = re.search(rf"<!-- made by: .*{RESULT} -->\n(.*?)\n<!-- end of table -->", readme, re.DOTALL)
    assert block is not None
    assert block[1] == markdown(json.loads((root / RESULT).read_text()))


def test_a_missed_target_is_explained(root: Path) -> None:
    cases = json.loads((root / RESULT).read_text())["cases"]
    goals = [goal for case in cases.values() for goal in case["targets"]]
    assert len(goals) >= 7
    explained = (root / "README.md").read_text().split("<!-- end of table -->")[1].split("\n## ")[0]
    for goal in goals:
        assert goal["met"] or goal["what"].removeprefix("times faster than best of: ") in explained
