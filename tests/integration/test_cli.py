"""What a user types, and what the terminal and the picture then show."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from eigentrack import Overhead, Recording, Settings, Step, cli, loading
from eigentrack.plot import plot_spectra
from eigentrack.watch import Watched, _paint, _Printer, relative_entropy, watch
from rmtkernels import DESCRIPTORS

DEMO = ["watch", "--demo", "--prompt", "Say hello.", "--max-new-tokens", "3", "--threads", "1"]
COLOUR = re.compile(r"\x1b\[38;5;(\d+)m(.*?)\x1b\[0m")


class Tokenizer:
    """Has no chat template; a token's text is its number, in front of whatever `around` is."""

    def __init__(self, around: str = "") -> None:
        self.around = around

    def __call__(self, text: str, return_tensors: str) -> BatchEncoding:
        ids = torch.tensor([[5, 9, 17, 33]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(f"<{int(token)}>{self.around}" for token in ids)


@pytest.fixture
def endless(llama: Any) -> Any:
    """A model that never ends its answer early."""
    llama.generation_config.eos_token_id = None
    llama.config.eos_token_id = None
    return llama


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(arguments: Any) -> None:
        pytest.fail("the model is loaded")

    monkeypatch.setattr(cli, "_load", load)


# The command line


def test_the_command_a_newcomer_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "spectra.png"
    arguments = ["watch", "--demo", "--prompt", "Say\x1b[31m hello.", "--max-new-tokens", "6", "--threads", "1"]
    assert cli.main([*arguments, "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "eff.rank" in printed and "monitor:" in printed and "\x1b" not in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_loaded_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, wanted in (("--model", "no-such-folder", "no-such-folder"), ("--layers", "x", "--layers must")):
        model = [] if option == "--model" else ["--demo"]
        assert cli.main(["watch", *model, option, value, "--prompt", "x"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("eigentrack: ") and wanted in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--max-new-tokens", "1", "must be a whole number of at least 2, got '1'"),
        ("--max-new-tokens", "many", "must be a whole number of at least 2, got 'many'"),
        ("--threads", "0", "must be a whole number of at least 1, got '0'"),
        ("--window", "0", "must be a whole number from 1 to 128, got '0'"),
        ("--window", "129", "must be a whole number from 1 to 128, got '129'"),
        ("--picture", "spectra.bmp", "must end in .png, .pdf, .svg, got 'spectra.bmp'"),
        ("--picture", "spectra", "must end in .png, .pdf, .svg, got 'spectra'"),
    ],
)
def test_wrong_arguments_are_argparse_s(
    unloadable: None, capsys: pytest.CaptureFixture[str], option: str, value: str, wanted: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*DEMO, option, value])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: eigentrack watch")
    assert error.endswith(f"eigentrack watch: error: argument {option}: {wanted}\n")


def test_arguments_at_their_limits() -> None:
    parse = cli._parser().parse_args
    arguments = parse([*DEMO, "--max-new-tokens", "2", "--threads", "1", "--window", "128", "--picture", "a.SVG"])
    assert (arguments.max_new_tokens, arguments.threads, arguments.window) == (2, 1, 128)
    assert arguments.picture == Path("a.SVG")
    assert parse([*DEMO, "--window", "1"]).window == 1


def test_the_least_answer_shows_a_token(
    endless: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_load", lambda arguments: (endless, Tokenizer()))
    assert cli.main(["watch", "--model", "tiny", "--prompt", "x", "--max-new-tokens", "2"]) == 0
    assert len(re.findall(r"^ +\d+  <\d+> ", capsys.readouterr().out, re.MULTILINE)) == 1


# For programs


@pytest.fixture
def tiny(endless: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that watch a tiny model, which has three tokens to show."""
    monkeypatch.setattr(loading, "load_causal_lm", lambda name: (endless, Tokenizer()))
    return ["watch", "--model", "tiny", "--prompt", "x", "--max-new-tokens", "4"]


def test_json_is_all_there_is_on_standard_output(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "new" / "run.html"
    assert cli.main([*tiny, "--prompt", "y", "--json", "--report", str(page)]) == 0
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert [run["prompt"] for run in found["runs"]] == ["x", "y"] and found["report"] == str(page)
    assert re.fullmatch(r"(<\d+>){4}", found["runs"][0]["answer"]) and found["runs"][0]["overhead"]["tokens"] == 2
    assert error.startswith("loading tiny\n") and len(re.findall(r"^ +\d+  <\d+> ", error, re.MULTILINE)) == 6
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])["runs"]  # type: ignore[index]
    assert [run["prompt"] for run in shown] == ["x", "y"] and len(shown[1]["tokens"]) == 3


def test_json_has_null_for_what_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_report", lambda arguments: {"risk": [0.5, math.nan, -math.inf], "more": {"x": math.inf}})
    assert cli.main(["report", "recording", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"risk": [0.5, None, None], "more": {"x": None}}


def test_quiet_shows_results_only(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*tiny, "--quiet"]) == 0
    out, error = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == ["answer", "monitor"] and error == ""


def test_a_live_page_s_address_does_not_disturb_json(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*tiny, "--live", "--json", "--quiet"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["runs"] and re.fullmatch(r"live: http://127\.0\.0\.1:\d+/[\w-]{22}/\n", error)


def test_ctrl_c_is_one_line(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_causal_lm", interrupted)
    assert cli.main([*tiny, "--live", "--quiet"]) == 130
    assert capsys.readouterr().err.splitlines()[1:] == ["eigentrack: stopped"]


# What is not installed


def test_missing_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["watch", "--model", "folder", "--prompt", "x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("eigentrack: ") and "transformers" in error
    assert error.endswith(": pip install 'rmtkernels[eigentrack]'\n") and error.count("\n") == 1


def test_missing_matplotlib_is_said_before_the_model_is_loaded(
    unloadable: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["watch", "--model", "folder", "--prompt", "x", "--picture", "a.png"]) == 1
    error = capsys.readouterr().err
    assert "matplotlib" in error and error.endswith(": pip install 'rmtkernels[eigentrack]'\n")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_missing_packages_of_the_demo(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(arguments: Any) -> None:
        raise ImportError(f"Please install\n{package}")

    monkeypatch.setattr(cli, "_load", load)
    for model in (["--demo"], ["--model", "some.gguf"]):
        assert cli.main(["watch", *model, "--prompt", "x"]) == 1
        assert capsys.readouterr().err == f"eigentrack: Please install {package}: pip install 'rmtkernels[demo]'\n"


def test_transformers_without_gguf_is_answered_so(tmp_path: Path) -> None:
    """In a process of its own: transformers remembers what it has found."""
    code = "import sys; sys.modules['gguf'] = None; from eigentrack.cli import main; sys.exit(main(sys.argv[1:]))"
    variables = {**os.environ, "RMTKERNELS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, *DEMO], env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(": pip install 'rmtkernels[demo]'\n")


# The terminal


def test_a_terminal_that_cannot_encode(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_load", lambda arguments: (endless, Tokenizer("é")))
    for encoding in ("ascii", "latin-1"):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        assert cli.main(["watch", "--model", "tiny", "--prompt", "世界", "--max-new-tokens", "4"]) == 0
        assert cli.main(["watch", "--model", "tiny", "--prompt", "x", "--layers", "世界"]) == 1
        for stream in streams:
            stream.flush()
        out, error = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
        assert "prompt: ??" in out and "??/??" in out and "got '??'" in error
        assert ("é" in out) == (encoding == "latin-1")


def test_a_stream_that_cannot_be_reconfigured(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_load", lambda arguments: (endless, Tokenizer()))
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["watch", "--model", "tiny", "--prompt", "世界", "--max-new-tokens", "4"]) == 0
    assert "世界" in out.getvalue()


def test_colours_are_for_terminals_that_want_them(
    endless: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_load", lambda arguments: (endless, Tokenizer()))
    arguments = ["watch", "--model", "tiny", "--prompt", "x", "--max-new-tokens", "4"]
    for terminal, options, wanted in ((True, [], 3), (True, ["--no-colour"], 0), (False, [], 0)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        assert cli.main([*arguments, *options]) == 0
        assert len(COLOUR.findall(capsys.readouterr().out)) == wanted


@pytest.mark.parametrize("colour", [False, True])
def test_control_characters_never_reach_the_terminal(
    endless: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], colour: bool
) -> None:
    hostile = "\x1b]0;title\x07\x9b31m\r\b\u202e\u2028"
    monkeypatch.setattr(cli, "_load", lambda arguments: (endless, Tokenizer(hostile)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: colour)
    assert cli.main(["watch", "--model", "tiny", "--prompt", f"a{hostile}\nb", "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    assert "\\x1b" in printed
    assert all(line.isprintable() for line in COLOUR.sub(r"\2", printed).split("\n"))


# The rows


@pytest.mark.parametrize("spectra", ["per_layer", "joint"])
def test_each_row_shows_its_own_step(endless: Any, spectra: str) -> None:
    lines: list[str] = []
    run = watch(
        endless,
        Tokenizer(),
        "x",
        max_new_tokens=14,
        colour=False,
        write=lines.append,
        layers="all",
        spectra=spectra,
        window=6,
    )
    ids = Tokenizer()("x", "pt").to(endless.device)
    with torch.no_grad():
        answer = endless.generate(**ids, max_new_tokens=14, do_sample=False)[0, 4:]
    rows = [line.split() for line in lines if re.match(r" *\d", line)]
    assert [row[0] for row in rows] == [str(step) for step in range(13)]
    assert [row[1] for row in rows] == [f"<{int(token)}>" for token in answer[:-1]]
    assert run.descriptors.shape == (13, 6 if spectra == "per_layer" else 1, len(DESCRIPTORS))
    mean = run.descriptors.mean(1)
    formats = {"share_1": ".3f", "entropy": ".3f", "participation": ".2f", "above_edge": ".1f"}
    for step, row in enumerate(rows):
        wanted = [format(float(mean[step, DESCRIPTORS.index(name)]), form) for name, form in formats.items()]
        assert row[2:6] == wanted
        entropy = float(mean[step, DESCRIPTORS.index("entropy")])
        assert len("".join(row[6:])) == round(20 * relative_entropy(entropy, step, 6, True))
    assert len({tuple(row[2:4]) for row in rows}) > 8, "the steps look alike: nothing is shown by this test"


def test_rows_come_while_the_model_generates(endless: Any) -> None:
    passes = [0]
    endless.register_forward_hook(lambda *_: passes.append(passes[-1] + 1))
    seen: list[int] = []
    watch(endless, Tokenizer(), "x", max_new_tokens=6, colour=False, write=lambda line: seen.append(passes[-1]))
    assert seen == [0, 0, 0, 2, 3, 4, 5, 6]  # three lines of heading; the first pass is the prompt's


def test_entropy_is_compared_with_the_most_a_window_can_have() -> None:
    assert relative_entropy(math.log(4), 3, 32, center=False) == pytest.approx(1)
    assert relative_entropy(math.log(4), 4, 32, center=True) == pytest.approx(1), "the mean takes one"
    assert relative_entropy(math.log(8), 100, 8, center=False) == pytest.approx(1), "full"
    assert relative_entropy(math.log(7), 100, 8, center=True) == pytest.approx(1)
    assert relative_entropy(math.log(2), 3, 32, center=False) == pytest.approx(0.5)
    assert relative_entropy(0.0, 0, 32, center=False) == 0
    assert relative_entropy(0.0, 1, 32, center=True) == 0
    assert relative_entropy(0.0, 100, 1, center=True) == 0


def test_paint_goes_from_calm_to_alarmed() -> None:
    assert _paint("x", 0) == "\x1b[38;5;27mx\x1b[0m"
    assert _paint("x", 0.5) == "\x1b[38;5;82mx\x1b[0m"
    assert _paint("x", 1) == "\x1b[38;5;196mx\x1b[0m"


def test_the_colour_is_the_rank_among_the_tokens_so_far() -> None:
    entropies = [0.0, 0.6, 0.2, 0.5, 0.1]  # relative: 0, 0.87, 0.18, 0.36, 0.06
    lines: list[str] = []
    printer = _Printer(Tokenizer(), 8, False, True, lines.append)
    for t, entropy in enumerate(entropies):
        descriptors = torch.zeros(1, len(DESCRIPTORS))
        descriptors[0, DESCRIPTORS.index("entropy")] = entropy
        printer(Step(t, torch.tensor([t]), descriptors, torch.tensor([True]), torch.tensor([t + 1])))
    painted = [COLOUR.findall(line) for line in lines]
    assert [text.strip() for [(_, text)] in painted] == ["<0>", "<1>", "<2>", "<3>", "<4>"]
    # Ranks 1/1, 2/2, 2/3, 3/4 and 2/5: colours 10, 10, 7, 8 and 4 of 0 to 10.
    assert [code for [(code, _)] in painted] == ["196", "196", "190", "220", "48"]


# The picture


def watched(prompt: str, descriptors: torch.Tensor, eigenvalues: torch.Tensor, layers: list[int]) -> Watched:
    steps, spectra, window = eigenvalues.shape
    settings = Settings(
        model="Tiny",
        names=tuple(f"{spectrum}.{name}" for spectrum in range(spectra) for name in DESCRIPTORS),
        taps=tuple(f"layer{layer}" for layer in layers),
        layers=tuple(layers),
        window=window,
        spectra="per_layer" if spectra > 1 else "joint",
        start="answer",
        normalize="rms",
        center=True,
        noise="median",
        layer_scale="trace",
        end_tokens=(),
    )
    ids = torch.arange(steps)[None]
    values = descriptors.flatten(1)[None], eigenvalues[None]
    return Watched(prompt, "text", Recording(*values, ids, ids >= 0, settings, {}), Overhead(1, 0.1, 1.0))


def test_lines_carry_the_values_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    closed: list[Any] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", closed.append)
    torch.manual_seed(0)
    runs = []
    for spectra, steps in ((3, 7), (1, 5)):
        eigenvalues = torch.rand(steps, spectra, 4).sort(dim=-1, descending=True).values
        eigenvalues[0, :, 1:] = 0  # a window of one row
        descriptors = torch.rand(steps, spectra, len(DESCRIPTORS))
        runs.append(watched("costs $5", descriptors, eigenvalues, [2, 5, 8]))
    path = plot_spectra(runs, tmp_path / "spectra.svg")
    assert "<svg" in path.read_text(encoding="utf-8")
    [figure] = closed
    for column, (run, middle) in enumerate(zip(runs, (1, 0), strict=True)):
        top, bottom = figure.axes[column], figure.axes[2 + column]
        drawn = torch.stack([torch.as_tensor(line.get_ydata()) for line in top.lines], 1)
        given = run.eigenvalues[:, middle]
        torch.testing.assert_close(drawn, given.where(given > 0, torch.nan), rtol=0, atol=0, equal_nan=True)
        drawn = torch.stack([torch.as_tensor(line.get_ydata()) for line in bottom.lines], 1)
        assert torch.equal(drawn, run.descriptors[..., DESCRIPTORS.index("entropy")])
        assert [list(line.get_xdata()) for line in bottom.lines] == [list(range(len(drawn)))] * drawn.shape[1]
    assert [line.get_label() for line in figure.axes[2].lines] == ["layer 2", "layer 5", "layer 8"]
    assert [line.get_label() for line in figure.axes[3].lines] == ["joint"]
    assert figure.axes[0].get_ylabel().endswith("layer 5")
    close(figure)


@pytest.mark.parametrize("spectra", ["per_layer", "joint"])
def test_an_answer_that_ends_at_once(
    endless: Any, spectra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = Tokenizer()("x", return_tensors="pt")
    endless.generation_config.eos_token_id = int(endless.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1])
    monkeypatch.setattr(cli, "_load", lambda arguments: (endless, Tokenizer()))
    picture = tmp_path / "spectra.png"
    arguments = ["watch", "--model", "x", "--prompt", "x", "--prompt", "y", "--spectra", spectra]
    assert cli.main([*arguments, "--picture", str(picture)]) == 0
    assert capsys.readouterr().out.count("answer:") == 2 and picture.exists()
