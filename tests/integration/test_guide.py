"""The guide's snippets run as they are printed, one after the other; so does the example."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, Trainer, TrainingArguments

import eigentrack
from bench.experiments import defaults, reference_ood
from tests.integration.snippets import ROOT, run_python
from tests.integration.test_monitor import hooks_of


class Tokenizer:
    """Each word is a token, known by its length."""

    def __call__(self, text: str, return_tensors: str) -> BatchEncoding:
        ids = torch.tensor([[3 + (7 * len(word) + i) % 60 for i, word in enumerate(text.split())]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(f"<{int(token)}>" for token in ids)


@pytest.fixture
def endless(llama: Any) -> Any:
    """Ends no answer early, and samples."""
    llama.generation_config.eos_token_id = None
    llama.config.eos_token_id = None
    return llama


def test_the_snippets_of_the_guide(
    endless: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = Tokenizer()
    names: dict[str, Any] = {
        "torch": torch,
        "model": endless,
        "tokenizer": tokenizer,
        "inputs": tokenizer("What is the capital of France ?", "pt"),
        "text": "One two three, four; five: six seven and eight.",
        "judged_questions": [(f"What is the {'q' * (i % 9 + 1)} of {'y' * i} ?", i % 2) for i in range(48)],
        "ordinary_questions": [f"How far is it from here to {'x' * length} ?" for length in range(8)],
    }
    assert run_python("docs/eigentrack.md", names) == 9
    assert hooks_of(endless) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["0", "1", "2", "3"], "one line for each watched step"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answer.safetensors",
        "detector",
        "reference.safetensors",
    ]
    assert len(names["history"].train_indices) + len(names["history"].validation_indices) == 24
    assert names["detector"].calibrated and names["detector"].settings.window == 32
    assert isinstance(names["recording"], eigentrack.Recording) and names["recording"].window == 32
    assert names["track"].tokens.tolist() == names["ids"][:, 1:].tolist()


def test_the_snippets_of_the_page_about_reports(endless: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="needs prometheus_client")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prometheus, "REGISTRY", prometheus.CollectorRegistry())
    tokenizer = Tokenizer()
    arguments = TrainingArguments(str(tmp_path / "trained"), report_to="none", use_cpu=True)
    names: dict[str, Any] = {
        "model": endless,
        "tokenizer": tokenizer,
        "inputs": tokenizer("What is the capital of France ?", "pt"),
        "trainer": Trainer(endless, arguments),
    }
    assert run_python("docs/report.md", names) == 3
    assert hooks_of(endless) == 0
    assert "What is the capital of France?" in (tmp_path / "run.html").read_text()
    assert any(isinstance(one, names["SpectraCallback"]) for one in names["trainer"].callback_handler.callbacks)
    assert prometheus.REGISTRY.get_sample_value("eigentrack_tokens_total", {"monitor": "chat"}) == 19


@pytest.mark.parametrize(
    ("page", "experiment"), [("eigentrack.md", reference_ood), ("conventions.md", defaults)], ids=["guide", "defaults"]
)
def test_the_figures_of_a_page_are_those_of_the_committed_result(page: str, experiment: ModuleType) -> None:
    made = re.search(
        rf"<!-- made by: python -m {re.escape(experiment.__name__)} -->\n(.*?)\n<!-- end of table -->",
        (ROOT / "docs" / page).read_text(),
        re.DOTALL,
    )
    assert made is not None
    assert made[1] == experiment.table(json.loads(experiment.RESULT.read_text()))


def test_the_experiment_s_auroc_and_baselines() -> None:
    assert reference_ood.auroc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == [1.0, 1.0, 1.0]
    assert reference_ood.auroc(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))[0] == 0.5
    assert reference_ood.auroc(torch.tensor([0.0]), torch.tensor([1.0])) == [0.0, 0.0, 0.0]
    reference = torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]])
    got = reference_ood.robust(torch.tensor([[1.0, 5.0], [1.0 + 1.4836 * 2, 5.0]]), reference)
    torch.testing.assert_close(got, torch.tensor([0.0, 2**0.5]), rtol=1e-4, atol=1e-6)


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_lowers_the_temperature_where_the_gate_fires(
    endless: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load_example("lower_temperature")
    monkeypatch.setattr(example, "load_causal_lm", lambda name: (endless, Tokenizer()))
    reference = tmp_path / "reference.safetensors"
    arguments = ["--model", "tiny", "--max-new-tokens", "24", "--window", "8", "--reference", str(reference)]
    example.main([*arguments, "--share", "1"])
    every = capsys.readouterr().out
    assert (
        every.startswith("reference: 6 answers") and len(re.findall(r"^ *\d\.\d\d cooled", every, re.MULTILINE)) >= 21
    )
    example.main([*arguments, "--share", "0.5"])
    half = capsys.readouterr().out
    assert half.startswith(" "), "the reference was read, not made"
    fired, steps = map(int, re.search(r"fired at (\d+) of (\d+) tokens", half).groups())  # type: ignore[union-attr]
    assert 0 < fired < steps == 23
    assert len(re.findall(r"^ *\d\.\d\d cooled", half, re.MULTILINE)) == fired


def test_the_example_s_processor_touches_only_the_sequences_that_fired() -> None:
    lower = load_example("lower_temperature").LowerTemperature(lambda step: step.watched, 0.5)
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(lower(None, scores), scores), "nothing has been watched yet"
    lower.watch(eigentrack.Step(0, torch.zeros(2), torch.zeros(2, 1), torch.tensor([False, True]), torch.ones(2)))
    assert torch.equal(lower(None, scores), torch.tensor([[1.0, 2.0], [6.0, 8.0]]))
    assert torch.equal(lower(None, scores), scores), "the same step is not used twice"
