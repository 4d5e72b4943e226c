"""`rmtkd report`: one page of plans and stages, that shows what they say and runs nothing of it."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rmtkd import cli, commands
from rmtkd.checkpoints import Stage
from rmtkd.report import page, read
from tests.unit.test_rmtkd_planning import small_plan

HOSTILE = '</td></table><script>alert(1)</script><img src=x onerror="alert(2)">&lt; \u202e $x$'
STAGES = (
    Stage(0, {}, 1000, 1.0, 0.9, 0.9, 0.9),
    Stage(1, {"hidden_size": 8}, 500, 0.5, 0.9, 0.7, 0.88),
    Stage(2, {"hidden_size": 4}, 250, 0.25, 0.88, 0.5, 0.6, undone=True),
)


class Parsed(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def test_names_stay_names_and_the_page_loads_nothing() -> None:
    plan = small_plan()
    hostile = replace(plan, layers=tuple(replace(layer, name=HOSTILE) for layer in plan.layers))
    text = page({HOSTILE: hostile}, STAGES, HOSTILE)
    parsed, plain = Parsed(text), Parsed(page({"Plan": plan}, STAGES, "x"))
    assert [(tag, sorted(given)) for tag, given in parsed.tags] == [(tag, sorted(given)) for tag, given in plain.tags]
    assert not {"script", "iframe", "link", "object"} & {tag for tag, _ in parsed.tags}
    for tag, given in parsed.tags:
        assert not any(name.startswith("on") for name in given) and "href" not in given, tag
        assert (given.get("src") or "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
    [policy] = [given["content"] for _, given in parsed.tags if given.get("http-equiv") == "Content-Security-Policy"]
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{digest}'; img-src data:"
    )
    assert any(HOSTILE[-44:][-20:] in cell for cell in parsed.cells)


def test_the_page_says_what_the_tables_say() -> None:
    plan = small_plan()
    text = page({"Plan": plan}, STAGES, "target reached")
    assert "Parameters 1 k → 500 (−50.0 %), score 0.9000 → 0.8800. target reached" in text, "what was undone counts"
    parsed = Parsed(text)
    table = [cell for row in plan.rows() for cell in row]
    cells = [cell.strip() for cell in parsed.cells]
    assert cells[-len(table) :][:-1] == table[:-1]
    for stage in STAGES[1:]:
        assert f"{stage.projected:.4f}" in parsed.cells and f"{stage.score:.4f}" in parsed.cells
    [image] = [given for tag, given in parsed.tags if tag == "img"]
    drawn = base64.b64decode((image["src"] or "").partition(",")[2])
    assert b"<svg" in drawn[:2000]
    for layer in plan.layers:
        assert f"{layer.name} keeps {layer.rank} of {layer.dim}" in (image["alt"] or "")


def leave(folder: Path) -> None:
    """What a run leaves, as far as the report reads it."""
    plan = small_plan()
    for number in (2, 10):
        (folder / "stages" / f"stage-{number}").mkdir(parents=True)
        (folder / "stages" / f"stage-{number}" / "plan.json").write_text(plan.to_json())
    result = {"history": [asdict(stage) for stage in STAGES], "reason": "target reached"}
    (folder / "result.json").write_text(json.dumps(result))


def test_the_command_reads_what_a_run_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path)
    shutil.copytree(tmp_path / "stages" / "stage-2", tmp_path / "stages" / "stage-2.bak")
    plans, history, reason = read(tmp_path)
    assert list(plans) == ["Stage 2", "Stage 10"] and history == STAGES and reason == "target reached"
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"
    shutil.rmtree(tmp_path / "stages")  # as somebody short of space does
    assert cli.main(["report", str(tmp_path), "--json", "--output", str(tmp_path / "x.html")]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "x.html")}
    first, second = ((tmp_path / name).read_text() for name in ("report.html", "x.html"))
    assert "<h2>Stage 10</h2>" in first and (first.count("<img"), second.count("<img")) == (2, 0)


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda folder: (folder / "result.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "result.json").write_text("{}"), "describes no run"),
        (lambda folder: (folder / "result.json").write_text('{"history": [], "reason": ""}'), "describes no run"),
        (lambda folder: (folder / "stages/stage-2/plan.json").write_text("{}"), "this is no plan"),
    ],
)
def test_what_is_damaged_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object, wanted: str
) -> None:
    leave(tmp_path)
    spoil(tmp_path)  # type: ignore[operator]
    assert cli.main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("rmtkd: ") and wanted in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_folder_with_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "neither plan.json nor result.json" in capsys.readouterr().err


def test_ctrl_c_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: object, config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "report", interrupted)
    assert cli.main(["report", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "rmtkd: stopped; a run that is called again with the same arguments goes on\n"
