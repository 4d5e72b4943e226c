"""The snippets of docs/rmtkd.md run as they are printed, one after the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertForSequenceClassification

from tests.integration.snippets import run_python


def test_the_snippets_of_the_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = torch.randint(50, (4, 8, 12))

    def accuracy(model: Any) -> float:
        with torch.no_grad():
            return float((model(ids[0]).logits.argmax(1) == ids[0, :, 0] % 2).float().mean())

    names: dict[str, Any] = {
        "torch": torch,
        "model": BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)).eval(),
        "calibration": [{"input_ids": batch} for batch in ids],
        "train": [{"input_ids": batch, "labels": batch[:, 0] % 2} for batch in ids],
        "accuracy": accuracy,
    }
    bits = {name: tensor.clone() for name, tensor in names["model"].state_dict().items()}
    assert run_python("docs/rmtkd.md", names) >= 5
    printed = capsys.readouterr().out
    assert names["plan"].table() in printed and names["result"].table() in printed
    assert all(torch.equal(tensor, bits[name]) for name, tensor in names["model"].state_dict().items())
    assert (tmp_path / "plan.png").exists()
    stock = AutoModel.from_pretrained(tmp_path / "smaller")
    assert stock.config.hidden_size == names["result"].model.config.hidden_size < 32
    with torch.no_grad():
        assert torch.equal(names["again"](ids[0]).logits, names["result"].model(ids[0]).logits)
