"""BERT, narrowed: one projection for the whole residual stream, heads and neurons chosen."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rmtkd.config import Config
from rmtkd.errors import ModelError
from rmtkd.groups import Group, Tap
from rmtkd.heads import choose_heads
from rmtkd.neurons import choose_neurons, interpolation
from rmtkd.residual import layer_norm_basis, norm_gain
from rmtkd.width_parts import (
    Layer,
    Narrowed,
    Norm,
    bias_of,
    moment_of,
    name_prefix,
    smaller,
    weight_of,
    width_of,
    write,
)

PER_TOKEN = ("BertForTokenClassification", "BertForQuestionAnswering")
CLASSES = ("BertModel", "BertForSequenceClassification", *PER_TOKEN)

_RESIDUAL = "residual"


def groups(model: Layer) -> list[Group]:
    """The residual stream after every norm, and of every layer the inner neurons and the context of its heads."""
    _check(model)
    layers = range(model.config.num_hidden_layers)
    prefix = f"{name_prefix(model, model.base_model)}encoder.layer"
    stream = tuple(Tap(name, "output") for name in _norm_names(model))
    inner = [(_inner(index), Tap(f"{prefix}.{index}.output.dense", "input")) for index in layers]
    context = [(_context(index), Tap(f"{prefix}.{index}.attention.output.dense", "input")) for index in layers]
    return [
        Group(_RESIDUAL, stream, width="hidden_size", multiple=_head_width(model)),
        *(Group(name, (tap,), width="intermediate_size") for name, tap in inner),
        *(Group(name, (tap,), ranked=False) for name, tap in context),
    ]


def narrow(model: Layer, widths: Mapping[str, int], covariances: Mapping[str, Tensor], config: Config) -> Narrowed:
    """See `rmtkd.width.narrow`."""
    _check(model)
    old = model.config
    hidden = width_of(widths, "hidden_size", old.hidden_size, _head_width(model))
    inner = width_of(widths, "intermediate_size", old.intermediate_size)
    moment = moment_of(covariances, _RESIDUAL, old.hidden_size)
    layers = range(old.num_hidden_layers)
    inner_moments = [moment_of(covariances, _inner(index), old.intermediate_size) for index in layers]
    context_moments = [moment_of(covariances, _context(index), old.hidden_size) for index in layers]
    basis = layer_norm_basis(moment, hidden)
    heads = hidden // _head_width(model)
    new = smaller(model, hidden_size=hidden, num_attention_heads=heads, intermediate_size=inner)
    stream = _Stream(moment, basis)
    wide, narrow_base = model.base_model, new.base_model
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        write(getattr(narrow_base.embeddings, name), weight_of(getattr(wide.embeddings, name)) @ basis)
    for index, (layer, wide_layer) in enumerate(zip(narrow_base.encoder.layer, wide.encoder.layer, strict=True)):
        _attention(layer.attention, wide_layer.attention, context_moments[index], stream)
        neurons = choose_neurons(inner_moments[index], inner, config.neurons)
        first, second = wide_layer.intermediate.dense, wide_layer.output.dense
        write(layer.intermediate.dense, neurons.before @ weight_of(first) @ basis, neurons.before @ bias_of(first))
        write(layer.output.dense, basis.T @ weight_of(second) @ neurons.after, basis.T @ bias_of(second))
    for name in _norm_names(model):
        stream.norm(new.get_submodule(name), model.get_submodule(name))
    _readers(new, model, stream)
    return Narrowed(new, tuple(Norm(name, basis) for name in _norm_names(model)))


class _Stream:
    """The residual stream h, of which z = Pᵀ h is left."""

    def __init__(self, moment: Tensor, basis: Tensor) -> None:
        self.moment, self.basis = moment, basis
        self._gain = norm_gain(moment, basis)

    def norm(self, new: Layer, old: Layer) -> None:
        """A norm's gains become the diagonal of what they are in the new axes."""
        gains = self.basis.square().T @ weight_of(old)
        write(new, self._gain * gains, self.basis.T @ bias_of(old))


def _attention(new: Layer, old: Layer, context: Tensor, stream: _Stream) -> None:
    """As many heads as the width takes, whole; the output layer is fitted to them.

    Args:
        context: (d, d) second moment of what all heads together pass to the output layer.
    """
    output, width = weight_of(old.output.dense), old.self.attention_head_size
    heads = choose_heads(context, stream.basis.T @ output, len(context) // width, new.self.num_attention_heads)
    kept = torch.arange(len(context), device=context.device).view(-1, width)[heads].flatten()
    for name in ("query", "key", "value"):
        layer = getattr(old.self, name)
        write(getattr(new.self, name), weight_of(layer)[kept] @ stream.basis, bias_of(layer)[kept])
    fitted = output @ interpolation(context, kept)
    write(new.output.dense, stream.basis.T @ fitted, stream.basis.T @ bias_of(old.output.dense))


def _readers(new: Layer, old: Layer, stream: _Stream) -> None:
    """The pooler and what reads it, or what reads every token.

    No statistics of the pooler's neurons are gathered, one row a text is too few: they are chosen as if their tanh were
    linear.
    """
    reads = torch.eye(len(stream.basis), dtype=torch.float64)
    pooler, wide_pooler = new.base_model.pooler, old.base_model.pooler
    if wide_pooler is not None:
        weight, bias = weight_of(wide_pooler.dense), bias_of(wide_pooler.dense)
        moment = weight @ stream.moment @ weight.T + torch.outer(bias, bias)
        neurons = choose_neurons(moment, stream.basis.shape[1], "leverage")
        write(pooler.dense, neurons.before @ weight @ stream.basis, neurons.before @ bias)
        reads = neurons.after
    if type(old).__name__ in PER_TOKEN:
        reads = stream.basis
    for name in ("classifier", "qa_outputs"):
        if hasattr(old, name):
            write(getattr(new, name), weight_of(getattr(old, name)) @ reads, bias_of(getattr(old, name)))


def _check(model: Layer) -> None:
    if model.config.add_cross_attention:
        raise ModelError("BERT with cross-attention cannot be narrowed: its other stream would keep its width")


def _inner(index: int) -> str:
    return f"layer.{index}.inner"


def _context(index: int) -> str:
    return f"layer.{index}.context"


def _head_width(model: Layer) -> int:
    return model.config.hidden_size // model.config.num_attention_heads  # type: ignore[no-any-return]


def _norm_names(model: Layer) -> list[str]:
    """In the order of execution."""
    prefix = name_prefix(model, model.base_model)
    names = [f"{prefix}embeddings.LayerNorm"]
    for index in range(model.config.num_hidden_layers):
        layer = f"{prefix}encoder.layer.{index}."
        names += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    return names
