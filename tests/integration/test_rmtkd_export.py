"""Compressed models where this package is not: ONNX in onnxruntime, and programs of torch.export."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import rmtkd
import rmtkernels
from rmtkd.modules import ProjectedConv2d, ProjectedEmbedding, ProjectedLinear

TOKENS = torch.arange(2 * 24).reshape(2, 24) * 7 % 64
OTHERS = torch.arange(3 * 10).reshape(3, 10) * 5 % 64
BATCH, STEPS = Dim("batch", min=1, max=64), Dim("steps", min=2, max=64)


class Logits(nn.Module):
    """Tokens in, logits out: what a server wants of a classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=64, **sizes)).eval()


def compressed(model: nn.Module, batches: list[Any], side: str) -> Any:
    config = rmtkd.Config(mode="factor", side=side, keep_slower=True, noise="median", multiple=4, min_ratio=0.1)
    return rmtkd.compress(model, rmtkd.plan(model, batches, config, progress=False)).eval()


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A classifier with projected layers and a projected embedding, saved and loaded again."""
    folder = tmp_path_factory.mktemp("factor") / "model"
    rmtkd.save(compressed(classifier(), [{"input_ids": TOKENS}], "output"), folder)
    model = rmtkd.load(folder)
    kinds = {type(module) for module in model.modules()}
    assert {ProjectedLinear, ProjectedEmbedding} <= kinds
    return Logits(model).eval()


def in_onnxruntime(model: nn.Module, example: Tensor, dynamic: Any, *inputs: Tensor) -> list[Tensor]:
    """Outputs of the model written as ONNX, of inputs of any shape that `dynamic` allows."""
    file = io.BytesIO()
    torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=dynamic, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [torch.from_numpy(np.asarray(session.run(None, {name: each.numpy()})[0])) for each in inputs]


def test_projected_layers_in_onnx(projected: nn.Module) -> None:
    found = in_onnxruntime(projected, TOKENS, ({0: BATCH, 1: STEPS},), TOKENS, OTHERS, TOKENS[:1, :5])
    with torch.no_grad():
        for tokens, logits in zip((TOKENS, OTHERS, TOKENS[:1, :5]), found, strict=True):
            torch.testing.assert_close(logits, projected(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["output", "input"])
def test_projected_convolutions_in_onnx(side: str) -> None:
    torch.manual_seed(0)
    mixing = torch.randn(3, 3, 1, 1)
    pictures = [nn.functional.conv2d(torch.randn(4, 3, 16, 16), mixing) for _ in range(2)]
    model = compressed(Pictures().eval(), pictures, side)
    assert any(isinstance(module, ProjectedConv2d) for module in model.modules())
    (found,) = in_onnxruntime(model, pictures[0], ({0: BATCH},), pictures[1][:3])
    with torch.no_grad():
        torch.testing.assert_close(found, model(pictures[1][:3]), rtol=1e-4, atol=1e-5)


def test_a_narrowed_model_in_onnx(tmp_path: Path) -> None:
    dense = classifier()
    plan = rmtkd.plan(dense, [{"input_ids": TOKENS}], rmtkd.Config(multiple=4), progress=False)
    rmtkd.save(rmtkd.compress(dense, plan), tmp_path / "narrow")
    narrow = Logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "narrow")).eval()
    assert narrow.model.config.hidden_size < 32
    (found,) = in_onnxruntime(narrow, TOKENS, ({0: BATCH, 1: STEPS},), OTHERS)
    with torch.no_grad():
        torch.testing.assert_close(found, narrow(OTHERS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_a_program_runs_without_this_package(projected: nn.Module, strict: bool, tmp_path: Path) -> None:
    """In another process, which cannot import rmtkernels, and with other shapes than it was traced with."""
    with torch.no_grad():
        program = torch.export.export(projected, (TOKENS,), dynamic_shapes=({0: BATCH, 1: STEPS},), strict=strict)
        save_file({"tokens": OTHERS, "logits": projected(OTHERS)}, tmp_path / "expected.safetensors")
    torch.export.save(program, tmp_path / "program.pt2")
    script = (
        "import safetensors.torch, sys, torch\n"
        "sys.modules['rmtkernels'] = sys.modules['rmtkd'] = None\n"
        "expected = safetensors.torch.load_file('expected.safetensors')\n"
        "found = torch.export.load('program.pt2').module()(expected['tokens'])\n"
        "torch.testing.assert_close(found, expected['logits'], rtol=1e-4, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_a_backend_that_was_asked_for_stays_in_a_program() -> None:
    class Forced(nn.Module):
        def forward(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
            return rmtkernels.lowrank_linear(x, down, up, backend="cpu")

    program = torch.export.export(Forced(), (torch.randn(1, 8), torch.randn(2, 8), torch.randn(8, 2)))
    assert "rmtkernels.lowrank_linear" in str(program.graph)
