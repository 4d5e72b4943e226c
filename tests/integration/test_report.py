"""The report as a file: whole, exact, and deaf to what texts say. `test_report_browser.py` looks at it."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eigentrack import EigenTrack, EigenTrackError, MismatchError, cli, load
from eigentrack.report import TokenTexts, page, runs_of, write_report
from rmtkernels import DESCRIPTORS
from tests.integration.recordings import Vocabulary, recording

PROMPTS = torch.tensor([[5, 9, 17, 33], [6, 7, 8, 9]])

HOSTILE = [
    "<script>window.owned = 1</script>",
    "</script><script>window.owned = 2</script>",
    "<!--<script>",
    "]]></SCRIPT >",
    '"><img src=x onerror="window.owned = 3">',
    "{{script}} {{policy}} $& \\u003c \\",
    "&lt;b&gt;&amp;",
    "\u202egnp.exe\u2066\u200f",
    "👩🏽‍🚀 é 世界 \u0645\u0631\u062d\u0628\u0627",
    "\x00\x1b[31m\x7f\u2028",
    " a\n\n b\t",
    "\ud800",
]


class Parsed(HTMLParser):
    """Tags with their attributes, and the text inside each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, str] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs).get("id") or tag

    def handle_data(self, data: str) -> None:
        if self._open in ("data", "script", "style"):
            self.raw[self._open] = self.raw.get(self._open, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def shown(text: str) -> Any:
    return json.loads(Parsed(text).raw["data"])


def test_texts_stay_texts() -> None:
    harmless, hostile = (
        page(runs_of(recording(len(HOSTILE)), Vocabulary(texts), ["".join(texts)]))
        for texts in (["x"] * len(HOSTILE), HOSTILE)
    )
    assert Parsed(hostile).tags == Parsed(harmless).tags, "a text has become a tag"
    inside = Parsed(hostile).raw["data"]
    assert inside.isascii() and not re.search("[<>&]", inside)
    [run] = shown(hostile)["runs"]
    assert run["tokens"] == HOSTILE and run["prompt"] == "".join(HOSTILE)
    assert {name: text for name, text in Parsed(hostile).raw.items() if name != "data"} == {
        name: text for name, text in Parsed(harmless).raw.items() if name != "data"
    }


@pytest.mark.parametrize("live", [False, True])
def test_the_page_may_load_and_run_nothing_else(live: bool) -> None:
    parsed = Parsed(page(runs_of(recording(2)), live=live))
    [policy] = [given["content"] for tag, given in parsed.tags if given.get("http-equiv") == "Content-Security-Policy"]
    hashes = {
        name: base64.b64encode(hashlib.sha256(parsed.raw[name].encode()).digest()).decode()
        for name in ("style", "script")
    }
    assert (policy or "").split("; ") == [
        "default-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        f"style-src 'sha256-{hashes['style']}'",
        f"script-src 'sha256-{hashes['script']}'",
        *(["connect-src 'self'"] if live else []),
    ]
    loading = {"src", "href", "srcset", "style", "action", "data", "poster"}
    for tag, given in parsed.tags:
        assert not loading & set(given) and not any(name.startswith("on") for name in given), tag
    assert not re.search(r"url\(|@import", parsed.raw["style"])
    assert re.findall(r"https?://[^\"]+", "".join(parsed.raw.values())) == ["http://www.w3.org/2000/svg"]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(", parsed.raw["script"]
    )


def test_numbers_come_back_to_the_bit() -> None:
    made = recording(5, batch=2)
    made.watched[1, 3:] = False
    made.descriptors[1, 3:], made.eigenvalues[1, 3:] = torch.nan, torch.nan
    made.watched[0, 2] = False
    for values in (made.descriptors, made.eigenvalues, made.risk):
        assert values is not None
        values[0, 2] = torch.nan
    first, second = shown(page(runs_of(made, Vocabulary(list("abcde")), ["p", "q"], threshold=0.5)))["runs"]
    assert (first["prompt"], second["prompt"], first["threshold"]) == ("p", "q", 0.5)
    assert (first["tokens"], second["tokens"]) == (list("abcde"), list("abc")), "steps behind the end are shown"
    assert first["risk"][2] is None and first["risk"][0] == pytest.approx(float(made.risk[0, 0]), abs=1e-6)  # type: ignore[index]
    for row, run in enumerate((first, second)):
        values = torch.from_numpy(np.frombuffer(base64.b64decode(run["values"]), "<f4").copy())
        values = values.view(len(run["tokens"]), 3, len(DESCRIPTORS) + 4)
        steps = len(values)
        wanted = made.descriptors[row, :steps].view(steps, 3, -1)
        torch.testing.assert_close(values[..., : len(DESCRIPTORS)], wanted, rtol=0, atol=0, equal_nan=True)
        wanted = made.eigenvalues[row, :steps]
        torch.testing.assert_close(values[..., len(DESCRIPTORS) :], wanted, rtol=0, atol=0, equal_nan=True)


def test_tokens_without_a_tokenizer_are_numbers() -> None:
    made = recording(3, risk=False)
    made.tokens[0, 1] = -1
    [run] = shown(page(runs_of(made)))["runs"]
    assert run["tokens"] == ["⟨0⟩", "⟨embedding⟩", "⟨2⟩"] and run["risk"] is None and run["prompt"] is None


class Bytes:
    """Tokens are bytes; like many tokenizers it eats the leading space of a text."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return bytes(int(token) for token in ids).decode(errors="replace").removeprefix(" ")


def test_each_token_is_given_the_text_that_it_adds() -> None:
    text = "a é 👩 b"
    decode = TokenTexts(Bytes())
    pieces = [decode(token) for token in text.encode()]
    assert "".join(pieces) == text
    assert pieces == ["a", " ", "", "é", " ", "", "", "", "👩", " ", "b"]
    damaged = [TokenTexts(Bytes())(token) for token in b"\xff"]
    assert damaged == [""], "it may still become a character"
    decode = TokenTexts(Bytes())
    assert [decode(token) for token in b"\xff\xff\xff\xffa"][3:] == ["\ufffd" * 4, "a"]


@pytest.mark.parametrize("prompts", ["text", [], ["a", "b"]])
def test_prompts_are_one_for_each_sequence(prompts: Any) -> None:
    with pytest.raises(MismatchError, match="prompts must be a list of 1"):
        runs_of(recording(2), prompts=prompts)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_is_a_risk(threshold: float) -> None:
    with pytest.raises(EigenTrackError, match="from 0 to 1"):
        runs_of(recording(2), threshold=threshold)


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "run.html").write_text("as it was")
    with pytest.raises(OSError, match=re.escape("run.html")):
        write_report(tmp_path / "run.html" / "run.html", [])
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]
    write_report(tmp_path / "run.html", [])
    assert shown((tmp_path / "run.html").read_text())["runs"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]


def test_a_monitor_reports_what_it_has_watched(llama: Any, tmp_path: Path) -> None:
    with EigenTrack(llama, layers=[1, 4], window=8) as track:
        with pytest.raises(EigenTrackError):
            track.report(tmp_path / "run.html")
        llama.generate(PROMPTS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert not (tmp_path / "run.html").exists()
    track.report(tmp_path / "run.html", Vocabulary([f"<{i}>" for i in range(64)]), ["?"] * len(PROMPTS))
    runs = shown((tmp_path / "run.html").read_text())["runs"]
    assert len(runs) == len(PROMPTS) and runs[0]["layers"] == ["layer1", "layer4"] and runs[0]["prompt"] == "?"
    assert runs[0]["tokens"] == [f"<{token}>" for token in track.tokens[0].tolist()]


# The command


def test_the_command_makes_a_page_of_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recording(3)
    made.save(tmp_path / "run.safetensors")
    assert cli.main(["report", str(tmp_path / "run.safetensors"), "--prompt", "<b>"]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'run.html'}\n"
    [run] = shown((tmp_path / "run.html").read_text())["runs"]
    assert run == json.loads(json.dumps(runs_of(load(tmp_path / "run.safetensors"), prompts=["<b>"])[0]))
    other = tmp_path / "new" / "other.html"
    assert cli.main(["report", str(tmp_path / "run.safetensors"), "--output", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(other)} and other.exists()


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(recording(3, batch=2)).save(tmp_path / "run.safetensors")
    (tmp_path / "not.safetensors").write_bytes(b"hello")
    for arguments, wanted in (
        (["none.safetensors"], "none.safetensors"),
        (["not.safetensors"], "no safetensors file"),
        (["run.safetensors", "--prompt", "one"], "prompts must be a list of 2"),
        (["run.safetensors", "--detector", "nowhere"], "nowhere"),
        (["run.safetensors", "--tokenizer", str(tmp_path / "nothing")], "cannot load the tokenizer"),
    ):
        assert cli.main(["report", str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        error = capsys.readouterr().err
        assert error.startswith("eigentrack: ") and wanted in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))
    recording(3).save(tmp_path / "run.html")
    before = (tmp_path / "run.html").read_bytes()
    assert cli.main(["report", str(tmp_path / "run.html")]) == 1
    assert "is the recording itself" in capsys.readouterr().err and (tmp_path / "run.html").read_bytes() == before
