"""The command line on models of a few thousand parameters, and everything that a user can get wrong."""

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import rmtkd
from rmtkd import cli, commands, progress
from rmtkd.files import DESCRIPTION
from rmtkd.plans import Plan
from rmtkd.texts import DataError, Example, Texts, class_indices, read_examples

WORDS = ["[PAD]", "[UNK]", "[EOS]", "good", "bad", "film", "plot", "a", "the", "very", "was", "is"]


def tokenizer(**special: str) -> Any:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)


def labelled_texts() -> list[dict[str, Any]]:
    """A line for each example: 24 of them, the last word of which is the label."""
    return [
        {"text": f"{a} {noun} was {very} {word}", "label": int(word == "good")}
        for a in ("a", "the")
        for noun in ("film", "plot")
        for very in ("", "very", "very very")
        for word in ("good", "bad")
    ]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier, the encoder without a head, a language model, and texts with and without labels."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    built: dict[str, Any] = {
        "classifier": BertForSequenceClassification(config),
        "encoder": BertModel(config),
        "language": LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, **sizes)),
    }
    for name, model in built.items():
        model.save_pretrained(root / name)
        tokenizer(**({"eos_token": "[EOS]"} if name == "language" else {"pad_token": "[PAD]"})).save_pretrained(
            root / name
        )
    lines = labelled_texts()
    with gzip.open(root / "labelled.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    (root / "plain.jsonl").write_text("\n".join(json.dumps({"text": line["text"]}) for line in lines) + "\n\n")
    found = {name: root / name for name in built}
    return found | {"labelled": root / "labelled.jsonl.gz", "plain": root / "plain.jsonl"}


def command(*arguments: Any) -> list[str]:
    return [*map(str, arguments), "--quiet", "--threads", "1", "--batch", "8"]


RUN = ["--multiple", "4", "--epochs", "1", "--stages", "1", "--max-drop", "1"]


# What the commands do


@pytest.mark.parametrize("mode", ["width", "factor"])
def test_plan(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    before = {path.name: path.read_bytes() for path in folders["classifier"].iterdir()}
    output = tmp_path / "deep" / "plan"
    settings = ["--mode", mode, "--modules", "*.dense", "--modules", "!*pooler*", "--multiple", "4"]
    arguments = command("plan", "--model", folders["classifier"], "--data", folders["labelled"], "--output", output)
    assert cli.main([*arguments, *settings]) == 0
    captured = capsys.readouterr()
    planned = Plan.from_json((output / "plan.json").read_text())
    assert captured.out == f"{planned.table()}\npicture: {output / 'plan.png'}\n"
    assert captured.err == ""
    assert planned.config.modules == ("*.dense", "!*pooler*")
    assert (output / "plan.png").stat().st_size > 1000
    assert {path.name: path.read_bytes() for path in folders["classifier"].iterdir()} == before


def test_plan_as_json(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command("plan", "--model", folders["encoder"], "--data", folders["labelled"]), "--json"]) == 0
    found = capsys.readouterr().out
    assert Plan.from_json(found).widths.keys() == {"hidden_size", "intermediate_size"}


@pytest.mark.parametrize("mode", ["width", "factor"])
def test_run_then_compare(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    data = ["--data", folders["labelled"], "--dev", folders["labelled"]]
    settings = [*RUN, "--mode", mode, *(["--keep-slower", "--min-ratio", "0"] if mode == "factor" else [])]
    arguments = [*command("run", "--model", folders["classifier"], *data, "--output", tmp_path / "out"), *settings]
    assert cli.main(arguments) == 0
    first = capsys.readouterr()
    assert f"model: {tmp_path / 'out' / 'model'}" in first.out and "all 1 stages are done" in first.out
    assert first.err == ""
    weights = [path for path in (tmp_path / "out" / "model").iterdir() if path.suffix == ".safetensors"]
    bits = weights[0].read_bytes()
    assert cli.main(arguments) == 0  # there is nothing left to do
    assert weights[0].read_bytes() == bits
    history = json.loads((tmp_path / "out" / "result.json").read_text())["history"]
    assert history[1]["parameters"] < history[0]["parameters"]
    AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    if mode == "width":
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    capsys.readouterr()
    both = command("compare", folders["classifier"], tmp_path / "out" / "model", "--data", folders["labelled"])
    assert cli.main(both) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["parameters", "accuracy", "ms,", "ms,"]
    assert rows[1].endswith(" %") and "−" in rows[1]
    assert rows[3].startswith("ms, 1 text ") and rows[4].startswith("ms, 8 texts ") and rows[4].endswith("as fast")
    assert cli.main([*both, "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [model["parameters"] for model in models] == [stage["parameters"] for stage in history]
    assert models[1]["score"] == history[1]["score"]
    assert models[0]["texts"] == 24 and models[0]["milliseconds"].keys() == {"1", "8"}


def test_a_new_head_is_trained_first(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", folders["labelled"], "--dev", folders["labelled"]]
    arguments = [*command("run", "--model", folders["encoder"], *data, "--output", tmp_path / "out"), *RUN]
    assert cli.main(arguments) == 1
    assert "no trained classification head: say with --baseline" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    lines = gzip.decompress(folders["labelled"].read_bytes()).decode()
    (tmp_path / "more.jsonl").write_text(4 * lines)
    trained = ["--data", str(tmp_path / "more.jsonl"), "--baseline", "0.9", "--learning-rate", "1e-3", "--batch", "2"]
    assert cli.main([*arguments, *trained]) == 0
    history = json.loads((tmp_path / "out" / "result.json").read_text())["history"]
    assert history[0]["score"] > 0.7  # half of the texts are good


@pytest.mark.parametrize("mode", ["width", "factor"])
def test_run_on_a_language_model(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    data = ["--data", folders["plain"], "--dev", folders["plain"]]
    settings = [*RUN, "--mode", mode, *(["--keep-slower", "--min-ratio", "0"] if mode == "factor" else [])]
    arguments = command("run", "--model", folders["language"], *data, "--output", tmp_path / "out")
    assert cli.main([*arguments, *settings]) == 0
    capsys.readouterr()
    history = json.loads((tmp_path / "out" / "result.json").read_text())["history"]
    assert history[1]["parameters"] < history[0]["parameters"]
    both = command("compare", folders["language"], tmp_path / "out" / "model", "--data", folders["plain"], "--json")
    assert cli.main(both) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [model["score"] for model in models] == [stage["score"] for stage in history]
    assert models[1]["perplexity"] == pytest.approx(math.exp(-models[1]["score"]))
    if mode == "width":
        narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        assert narrow.config.hidden_size < 16


def test_evaluate_a_language_model(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command("evaluate", "--model", folders["language"], "--data", folders["plain"])
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = LlamaForCausalLM.from_pretrained(folders["language"])
    total, tokens = 0.0, 0
    for line in folders["plain"].read_text().split("\n")[:-2]:
        ids = tokenizer()(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probabilities = model(ids).logits[0, :-1].double().log_softmax(-1)
        total += log_probabilities.gather(1, ids[0, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
    assert found["score"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(2.718281828 ** -(total / tokens), rel=1e-5)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert cli.main(arguments) == 0
    assert "perplexity" in capsys.readouterr().out


def test_what_takes_long_shows_a_bar_unless_it_is_to_be_quiet(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0)
    evaluate = command("evaluate", "--model", folders["classifier"], "--data", folders["labelled"])
    plan = command("plan", "--model", folders["encoder"], "--data", folders["labelled"], "--mode", "factor")
    for arguments, wanted in ((evaluate, ("scoring",)), (plan, ("spectra", "timing layers"))):
        for quiet in (True, False):
            assert cli.main([flag for flag in arguments if quiet or flag != "--quiet"]) == 0
            out, error = capsys.readouterr()
            assert all((name in error) != quiet and name not in out for name in wanted)


def test_accuracy_is_counted(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command("evaluate", "--model", folders["classifier"], "--data", folders["labelled"])
    assert cli.main([*arguments, "--json"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(folders["classifier"]).eval()
    right = 0
    for example in read_examples(folders["labelled"]):
        inputs = tokenizer()(example.text, return_tensors="pt")
        with torch.no_grad():
            right += (
                int(model(**{n: inputs[n] for n in ("input_ids", "attention_mask")}).logits.argmax()) == example.label
            )
    assert json.loads(capsys.readouterr().out)["score"] == right / 24


# Settings


def test_flags_go_before_the_file_and_the_file_before_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"quantile": 0.4, "multiple": 16}')
    seen = []
    monkeypatch.setattr(commands, "plan", lambda _, config: seen.append(config) or commands.Report({}, ""))
    assert cli.main(["plan", "--model", "m", "--data", "d", "--config", str(tmp_path / "config.json")]) == 0
    flags = ["--config", str(tmp_path / "config.json"), "--multiple", "4", "--keep-slower", "--noise", "fit"]
    assert cli.main(["plan", "--model", "m", "--data", "d", *flags]) == 0
    assert [(c.quantile, c.multiple, c.keep_slower, c.noise) for c in seen] == [
        (0.4, 16, False, "quantile"),
        (0.4, 4, True, "fit"),
    ]


@pytest.mark.parametrize("name", sorted(cli.SETTINGS))
def test_every_flag_sets_its_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(commands, "run", lambda _, config: seen.append(config) or commands.Report({}, ""))
    default = getattr(cli.Config(), name)
    value = (
        cli.CHOICES[name][1] if name in cli.CHOICES else {bool: "", tuple: "x", int: "7", float: "0.125"}[type(default)]
    )
    flag = f"--{name.replace('_', '-')}"
    base = ["run", "--model", "m", "--data", "d", "--dev", "d", "--output", "o"]
    assert cli.main([*base, flag, *([value] if value else [])]) == 0
    assert getattr(seen[0], name) != default


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--quantile", "1.5"], "quantile must be above 0 and below 1, got 1.5"),
        (["--quantile", "half"], "invalid float value: 'half'"),
        (["--noise", "guess"], "invalid choice: 'guess'"),
        (["--stages", "2"], "unrecognized arguments: --stages"),
        (["--batch", "0"], "must be a whole number of at least 1, got '0'"),
        (["--config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_usage_exits_with_two(flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--model", "m", "--data", "d", *flags])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", '{"quantil": 1}', '{"alpha": 3}', "\xff"])
def test_a_bad_settings_file_is_wrong_usage(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(content, encoding="latin-1")
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--model", "m", "--data", "d", "--config", str(tmp_path / "c.json")])
    assert ended.value.code == 2


def test_no_command_and_help() -> None:
    for arguments, code in (([], 2), (["--help"], 0), (["plan", "--help"], 0), (["nonsense"], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == code


def test_help_waits_for_nothing() -> None:
    script = """
import sys
from rmtkd.cli import main
try:
    main(["run", "--help"])
except SystemExit:
    print("transformers" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("False\n") and "--quantile" in shown


# What goes wrong


@pytest.mark.parametrize(
    ("model", "data", "reason"),
    [
        ("nowhere", "labelled", "no folder of a model"),
        ("classifier", "nowhere", "No such file"),
        ("labelled", "labelled", "no folder of a model"),
        ("empty", "labelled", "cannot load"),
        ("encoder", "labelled", "no trained classification head, so it has no score"),
    ],
)
def test_a_failure_is_one_line_and_a_one(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, data: str, reason: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = folders | {"nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty"}
    assert cli.main(command("evaluate", "--model", places[model], "--data", places[data])) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("rmtkd: ") and captured.err.count("\n") == 1
    assert reason in captured.err


@pytest.mark.parametrize(("model", "data"), [("language", "labelled"), ("classifier", "plain")])
def test_a_saved_model_is_what_it_is(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, data: str
) -> None:
    kind: Any = AutoModelForCausalLM if model == "language" else AutoModelForSequenceClassification
    rmtkd.save(kind.from_pretrained(folders[model]), tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    assert cli.main(command("evaluate", "--model", tmp_path / "saved", "--data", folders[data])) == 1
    assert f"which is for texts {'without' if model == 'language' else 'with'} labels" in capsys.readouterr().err


def test_texts_of_one_token_have_no_perplexity(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n' * 3)
    assert cli.main(command("evaluate", "--model", folders["language"], "--data", tmp_path / "short.jsonl")) == 1
    assert "no text has a second token" in capsys.readouterr().err


def test_a_family_that_cannot_be_narrowed(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16)).save_pretrained(tmp_path)
    tokenizer(eos_token="[EOS]").save_pretrained(tmp_path)
    assert cli.main(command("plan", "--model", tmp_path, "--data", folders["plain"])) == 1
    assert 'mode="factor" takes any model' in capsys.readouterr().err


def test_a_damaged_result_is_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / DESCRIPTION).write_text("{")
    tokenizer(pad_token="[PAD]").save_pretrained(tmp_path)
    assert cli.main(command("evaluate", "--model", tmp_path, "--data", folders["labelled"])) == 1
    assert "damaged" in capsys.readouterr().err


def test_what_rmtkd_did_not_write_is_not_replaced_after_hours_of_training(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("x")
    monkeypatch.setattr(commands, "_load", lambda *_: pytest.fail("it has begun"))
    data = ["--data", folders["labelled"], "--dev", folders["labelled"]]
    assert cli.main(command("run", "--model", folders["classifier"], *data, "--output", tmp_path)) == 1
    assert "nothing that rmtkd wrote" in capsys.readouterr().err


# Texts


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has no lines"),
        (b"{", "line 1 of .* is not JSON"),
        (b'{"text": "a"}\n[]', 'line 2 of .* is no object with a "text"'),
        (b'{"text": 3}', "is no object"),
        (b'{"text": "a", "label": 1.5}', "1.5 for a label"),
        (b'{"text": "a", "label": true}', "True for a label"),
        (b'{"text": "a", "label": 1}\n{"text": "a"}', "lines with a label and lines without"),
        (b"\xff\xff", "is not a whole text file"),
    ],
)
def test_files_of_texts_that_are_none(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize("spoil", [lambda data: data[:-9], lambda data: b"plain" + data])
def test_packed_files_that_are_damaged(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(spoil(gzip.compress(b'{"text": "a"}\n' * 100)))
    with pytest.raises(DataError, match="not a whole text file"):
        read_examples(tmp_path / "a.jsonl.gz")


def test_labels_are_names_or_numbers() -> None:
    names = {"bad": 0, "good": 1}
    assert class_indices([Example("a", "good"), Example("b", 0)], names) == [1, 0]
    for wrong in ("great", 2, -1):
        with pytest.raises(DataError, match="is no class of the model: bad, good"):
            class_indices([Example("a", wrong)], names)


def test_calibration_takes_a_share_that_is_the_same_each_time() -> None:
    examples = [Example("good " * (1 + i % 5), None) for i in range(2000)]
    batches = [Texts(tokenizer(pad_token="[PAD]"), examples, None, 64, 3).calibration(0.5) for _ in range(2)]
    assert sum(len(batch["input_ids"]) for batch in batches[0]) == 1000
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*batches, strict=True))
    assert "labels" not in batches[0][0] and max(batch["input_ids"].shape[1] for batch in batches[0]) == 3
    few = Texts(tokenizer(pad_token="[PAD]"), examples, None, 64, 3).calibration(0.1)
    assert sum(len(batch["input_ids"]) for batch in few) == 512
