"""`eigentrack watch` with a detector: the risk of each token, in colour."""

import re
from pathlib import Path
from typing import Any

import pytest

from eigentrack import Detector, EigenTrack, cli, detector_file
from eigentrack.watch import _paint
from tests.integration.conftest import tiny_gpt2, tiny_llama
from tests.integration.test_cli import Tokenizer
from tests.integration.test_detector import detector_for


@pytest.fixture(scope="module")
def detector() -> Detector:
    return detector_for(tiny_llama())


@pytest.fixture
def command(llama: Any, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a command whose detector is saved in a folder."""
    llama.generation_config.eos_token_id = llama.config.eos_token_id = None
    monkeypatch.setattr(cli, "_load", lambda arguments: (llama, Tokenizer()))
    detector.save_pretrained(tmp_path / "saved")
    return ["watch", "--model", "tiny", "--prompt", "x", "--max-new-tokens", "9", "--detector", str(tmp_path / "saved")]


def test_the_command_shows_the_risk_in_colour(
    llama: Any, detector: Detector, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    ids = Tokenizer()("x", "pt")
    with EigenTrack(llama, detector=detector) as track:
        llama.generate(**ids, max_new_tokens=9, do_sample=False)
    risks = track.risk[0].tolist()
    rows = re.findall(r"^ *\d+  \x1b\[38;5;(\d+)m.*?\x1b\[0m.* (\d\.\d{3})  (▇*)(  !)?$", printed, re.MULTILINE)
    assert [float(row[1]) for row in rows] == [pytest.approx(risk, abs=6e-4) for risk in risks]
    assert [row[0] for row in rows] == [re.findall(r"5;(\d+)m", _paint("", risk))[0] for risk in risks]
    assert [bool(row[3]) for row in rows] == [risk > detector.threshold for risk in risks]
    assert [len(row[2]) for row in rows] == [pytest.approx(20 * risk, abs=0.51) for risk in risks]
    assert f"! above {detector.threshold:.3f}" in printed and "layers 1, 3; window 8" in printed
    assert f"risk: at most {max(risks):.3f}, behind token {risks.index(max(risks))}" in printed


def test_the_command_refuses_what_does_not_fit(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for options, message in ((["--window", "9"], "window"), (["--detector", str(tmp_path)], "no detector.safetensors")):
        assert cli.main([*command, *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("eigentrack: ") and message in error and error.count("\n") == 1
    monkeypatch.setattr(cli, "_load", lambda arguments: (tiny_gpt2(), Tokenizer()))
    assert cli.main(command) == 1
    assert "architecture llama and gpt2" in capsys.readouterr().err


def test_the_demo_takes_the_detector_of_its_model(
    detector: Detector, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    demo = ["watch", "--demo", "--prompt", "x", "--max-new-tokens", "4"]
    monkeypatch.setattr(detector_file, "SHIPPED", tmp_path / "shipped")
    for arguments, shown in ((demo, False), (demo, True), ([*demo, "--layers", "all"], False)):
        assert cli.main(arguments) == 0
        assert ("risk" in capsys.readouterr().out) == shown
        detector.save_pretrained(tmp_path / "shipped" / cli.DEMO_DETECTOR)


def test_an_uncalibrated_detector_and_an_answer_of_one_token(
    llama: Any, command: list[str], tmp_path: Path, capsys: Any
) -> None:
    detector_for(llama, false_alarms=0).save_pretrained(tmp_path / "saved")
    llama.generation_config.eos_token_id = None
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "risk: at most" in printed and "!" not in printed
    first = int(llama.generate(**Tokenizer()("x", "pt"), max_new_tokens=1, do_sample=False)[0, -1])
    llama.generation_config.eos_token_id = first
    assert cli.main(command) == 0
    assert "risk: at most" not in capsys.readouterr().out
