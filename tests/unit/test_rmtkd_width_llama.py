"""Llama narrowed: nothing is lost at the full width, nor where the wide model is a narrow one in disguise."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rmtkd import width
from rmtkd.calibration import calibrate
from rmtkd.config import Config
from rmtkd.errors import PlanError

VOCABULARY, HEADS, HEAD, LAYERS = 50, 4, 6, 2
KINDS = ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification")
FULL = {"hidden_size": 24, "intermediate_size": 40}


def llama(hidden: int, inner: int, kind: str = "LlamaForCausalLM", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD,
        pad_token_id=0,
        **changes,
    )
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(0.5 + torch.rand(parameter.shape))
            else:
                parameter.normal_(std=0.2 if name.endswith("bias") else (1.5 / parameter.shape[-1]) ** 0.5)
    return model


def batches(count: int = 6, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, VOCABULARY, (8, 12 + i), generator=generator)} for i in range(count)]


def moments(model: nn.Module) -> dict[str, Tensor]:
    states = calibrate(model, batches(), width.groups(model), rows=10_000, progress=False)
    return {name: state.covariance(center=False) for name, state in states.items()}


def outputs(model: nn.Module) -> Tensor:
    (batch,) = batches(1, seed=2)
    with torch.no_grad():
        found: Tensor = model(**batch)[0]
    return found


def disguised(narrow: Any, hidden: int) -> Any:
    """A wide Llama that does what a narrow one does: each axis of the stream spread over axes of equal last gain."""
    k, generator = narrow.config.hidden_size, torch.Generator().manual_seed(7)
    changes = {"tie_word_embeddings": narrow.config.tie_word_embeddings, "attention_bias": narrow.config.attention_bias}
    wide = llama(hidden, 2 * narrow.config.intermediate_size, type(narrow).__name__, **changes)
    axis = torch.arange(hidden)[torch.randperm(hidden, generator=generator)] % k
    turn = torch.zeros(hidden, k)
    turn[torch.arange(hidden), axis] = torch.randn(hidden, generator=generator)
    turn /= turn.norm(dim=0)
    ratio = (k / hidden) ** 0.5
    with torch.no_grad():
        wide.model.embed_tokens.weight.copy_(narrow.model.embed_tokens.weight @ turn.T)
        wide.lm_head.weight.copy_(narrow.lm_head.weight @ turn.T)
        wide.model.norm.weight.copy_(ratio * narrow.model.norm.weight[axis])
        for new, old in zip(wide.model.layers, narrow.model.layers, strict=True):
            for name in ("q_proj", "k_proj", "v_proj"):
                layer, source = getattr(new.self_attn, name), getattr(old.self_attn, name)
                weight = source.weight * old.input_layernorm.weight @ turn.T * ratio
                layer.weight.copy_(weight / new.input_layernorm.weight)
                if layer.bias is not None:
                    layer.bias.copy_(source.bias)
            new.self_attn.o_proj.weight.copy_(turn @ old.self_attn.o_proj.weight)
            if new.self_attn.o_proj.bias is not None:
                new.self_attn.o_proj.bias.copy_(turn @ old.self_attn.o_proj.bias)
            for name in ("gate_proj", "up_proj"):
                weight = getattr(old.mlp, name).weight * old.post_attention_layernorm.weight @ turn.T * ratio
                getattr(new.mlp, name).weight.copy_(weight.repeat(2, 1) / new.post_attention_layernorm.weight)
            down = turn @ old.mlp.down_proj.weight
            new.mlp.down_proj.weight.copy_(torch.cat((0.4 * down, 0.6 * down), 1))
    return wide


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_width_gives_the_same(kind: str) -> None:
    model = llama(24, 40, kind)
    same = width.narrow(model, FULL, moments(model), Config(), batches())
    torch.testing.assert_close(outputs(same), outputs(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True}])
def test_a_narrow_model_in_disguise_loses_nothing(changes: dict[str, bool]) -> None:
    """Gains that fold away, gains of the last norm that do not, neurons, and biases."""
    wide = disguised(llama(12, 20, seed=3, **changes), 24)
    widths = {"hidden_size": 12, "intermediate_size": 20}
    narrow = width.narrow(wide, widths, moments(wide), Config())
    torch.testing.assert_close(outputs(narrow), outputs(wide), rtol=0, atol=2e-3)


def test_the_disguise_is_the_narrow_model() -> None:
    narrow = llama(12, 20, seed=3)
    torch.testing.assert_close(outputs(disguised(narrow, 24)), outputs(narrow), rtol=0, atol=2e-4)


def test_tied_embeddings_stay_tied_and_heads_keep_their_width() -> None:
    model = llama(24, 40, tie_word_embeddings=True)
    narrow = width.narrow(model, {"hidden_size": 16}, moments(model), Config())
    assert narrow.lm_head.weight is narrow.model.embed_tokens.weight
    assert narrow.config.head_dim == HEAD
    assert narrow.model.layers[0].self_attn.q_proj.weight.shape == (HEADS * HEAD, 16)
    assert (narrow.config.hidden_size, narrow.config.intermediate_size) == (16, 40)


@pytest.mark.parametrize("tied", [False, True])
def test_stock_transformers_load_it_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    model = llama(24, 40, tie_word_embeddings=tied)
    narrow = width.narrow(model, {"hidden_size": 16, "intermediate_size": 24}, moments(model), Config())
    narrow.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(loaded), outputs(narrow))
    prompt = batches(1)[0]["input_ids"][:2]
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **settings), narrow.generate(prompt, **settings))


def test_groups() -> None:
    model = llama(24, 40)
    residual, *inner = width.groups(model)
    assert residual.scaled and residual.multiple == HEADS and len(residual.taps) == 2 * LAYERS + 1
    assert [group.taps[0].module for group in inner] == [f"model.layers.{i}.mlp.down_proj" for i in range(LAYERS)]
    assert {group.width for group in inner} == {"intermediate_size"}


def test_a_width_the_config_refuses() -> None:
    model = llama(24, 40)
    with pytest.raises(PlanError, match="multiple of 4"):
        width.narrow(model, {"hidden_size": 18}, moments(model), Config())
