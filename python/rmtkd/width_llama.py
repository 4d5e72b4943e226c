"""Llama, narrowed: one projection for the whole residual stream, gains folded into what reads them, neurons chosen."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rmtkd.config import Config
from rmtkd.groups import Group, Tap
from rmtkd.neurons import choose_neurons
from rmtkd.residual import norm_gain, rms_norm_basis
from rmtkd.width_parts import (
    Layer,
    Narrowed,
    bias_of,
    moment_of,
    name_prefix,
    smaller,
    weight_of,
    width_of,
    write,
)

CLASSES = ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification")

_RESIDUAL = "residual"


def groups(model: Layer) -> list[Group]:
    """The residual stream before every norm, each row of one size as norms read it, and every layer's neurons."""
    prefix = name_prefix(model, model.base_model)
    taps = tuple(Tap(name, "input") for name in [*_inner_norms(model), f"{prefix}norm"])
    heads = model.config.num_attention_heads  # the config wants the width to be a multiple, though heads keep theirs
    inner = [
        Group(_inner(index), (Tap(f"{prefix}layers.{index}.mlp.down_proj", "input"),), width="intermediate_size")
        for index in range(model.config.num_hidden_layers)
    ]
    return [Group(_RESIDUAL, taps, width="hidden_size", multiple=heads, scaled=True), *inner]


def narrow(model: Layer, widths: Mapping[str, int], covariances: Mapping[str, Tensor], config: Config) -> Narrowed:
    """See `rmtkd.width.narrow`. Heads keep their width, so rotary embeddings and the scale of scores stay.

    No norm is left to be fitted: gains fitted axis by axis made SmolLM2 worse (576 → 486, before distillation:
    perplexity 38.8 without, 42.1 with them; 19.5 at the full width).
    """
    old = model.config
    hidden = width_of(widths, "hidden_size", old.hidden_size, old.num_attention_heads)
    inner = width_of(widths, "intermediate_size", old.intermediate_size)
    moment = moment_of(covariances, _RESIDUAL, old.hidden_size)
    inner_moments = [
        moment_of(covariances, _inner(index), old.intermediate_size) for index in range(old.num_hidden_layers)
    ]
    wide = model.base_model
    basis = rms_norm_basis(moment, hidden, weight_of(wide.norm))
    gain = norm_gain(moment, basis)
    new = smaller(model, hidden_size=hidden, intermediate_size=inner)
    narrow_base = new.base_model
    write(narrow_base.embed_tokens, weight_of(wide.embed_tokens) @ basis)
    for layer, wide_layer, inner_moment in zip(narrow_base.layers, wide.layers, inner_moments, strict=True):
        gains = weight_of(wide_layer.input_layernorm)
        attention, wide_attention = layer.self_attn, wide_layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            old_layer = getattr(wide_attention, name)
            write(getattr(attention, name), weight_of(old_layer) * gains @ basis, bias_of(old_layer))
        output = wide_attention.o_proj
        write(attention.o_proj, basis.T @ weight_of(output), basis.T @ bias_of(output))
        neurons = choose_neurons(inner_moment, inner, config.neurons)
        gains = weight_of(wide_layer.post_attention_layernorm)
        for name in ("gate_proj", "up_proj"):
            old_layer = getattr(wide_layer.mlp, name)
            weight = neurons.before @ (weight_of(old_layer) * gains) @ basis
            write(getattr(layer.mlp, name), weight, neurons.before @ bias_of(old_layer))
        down = wide_layer.mlp.down_proj
        write(layer.mlp.down_proj, basis.T @ weight_of(down) @ neurons.after, basis.T @ bias_of(down))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            write(norm, torch.full((hidden,), gain))
    write(narrow_base.norm, gain * (basis.square().T @ weight_of(wide.norm)))
    for name in ("lm_head", "score"):
        if hasattr(model, name):
            write(getattr(new, name), weight_of(getattr(model, name)) @ basis)
    return Narrowed(new, norms=())


def _inner_norms(model: Layer) -> list[str]:
    """All but the last, in the order of execution."""
    prefix = name_prefix(model, model.base_model)
    return [
        f"{prefix}layers.{index}.{name}"
        for index in range(model.config.num_hidden_layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]


def _inner(index: int) -> str:
    return f"layer.{index}.inner"
