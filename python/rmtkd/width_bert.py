"""BERT, narrowed: one projection for the whole residual stream, heads narrowed from within, neurons chosen."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rmtkd.config import Config
from rmtkd.errors import ModelError
from rmtkd.groups import Group, Tap
from rmtkd.heads import narrow_scores, narrow_values
from rmtkd.neurons import choose_neurons
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
    """The residual stream after every norm, and the inner neurons of every layer."""
    _check(model)
    prefix = name_prefix(model, model.base_model)
    stream = tuple(Tap(name, "output") for name in _norm_names(model))
    inner = [
        Group(_inner(index), (Tap(f"{prefix}encoder.layer.{index}.output.dense", "input"),), width="intermediate_size")
        for index in range(model.config.num_hidden_layers)
    ]
    return [Group(_RESIDUAL, stream, width="hidden_size", multiple=model.config.num_attention_heads), *inner]


def narrow(model: Layer, widths: Mapping[str, int], covariances: Mapping[str, Tensor], config: Config) -> Narrowed:
    """See `rmtkd.width.narrow`."""
    _check(model)
    old = model.config
    hidden = width_of(widths, "hidden_size", old.hidden_size, old.num_attention_heads)
    inner = width_of(widths, "intermediate_size", old.intermediate_size)
    moment = moment_of(covariances, _RESIDUAL, old.hidden_size)
    inner_moments = [
        moment_of(covariances, _inner(index), old.intermediate_size) for index in range(old.num_hidden_layers)
    ]
    basis = layer_norm_basis(moment, hidden)
    new = smaller(model, hidden_size=hidden, intermediate_size=inner)
    stream = _Stream(moment, basis)
    wide, narrow_base = model.base_model, new.base_model
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        write(getattr(narrow_base.embeddings, name), weight_of(getattr(wide.embeddings, name)) @ basis)
    for index, (layer, wide_layer) in enumerate(zip(narrow_base.encoder.layer, wide.encoder.layer, strict=True)):
        _attention(layer.attention, wide_layer.attention, old.num_attention_heads, stream)
        neurons = choose_neurons(inner_moments[index], inner, config.neurons)
        first, second = wide_layer.intermediate.dense, wide_layer.output.dense
        write(layer.intermediate.dense, neurons.before @ weight_of(first) @ basis, neurons.before @ bias_of(first))
        write(layer.output.dense, basis.T @ weight_of(second) @ neurons.after, basis.T @ bias_of(second))
    for name in _norm_names(model):
        stream.norm(new.get_submodule(name), model.get_submodule(name))
    _heads(new, model, stream)
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


def _attention(new: Layer, old: Layer, heads: int, stream: _Stream) -> None:
    """Queries, keys, values and the output layer, each head narrowed from h = d / heads to k / heads.

    The attention of a head divides its scores by the root of its width, which is smaller now: queries and keys make up
    for it, half each. Biases of values are added to every output, whatever the attention, and go to the output layer.
    """
    d, k = stream.basis.shape
    if k == d:
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            layer = old.get_submodule(name)
            write(new.get_submodule(name), layer.weight, layer.bias)
        return
    scale = (k / d) ** 0.25
    query, key, value, output = old.self.query, old.self.key, old.self.value, old.output.dense
    rows: dict[str, list[Tensor]] = {name: [] for name in ("query", "query_bias", "key", "key_bias", "value", "output")}
    for wq, bq, wk, bk, wv, wo in zip(
        *(part(layer).chunk(heads) for layer in (query, key) for part in (weight_of, bias_of)),
        weight_of(value).chunk(heads),
        weight_of(output).chunk(heads, dim=1),
        strict=True,
    ):
        query_moment = wq @ stream.moment @ wq.T + torch.outer(bq, bq)
        for_queries, for_keys = narrow_scores(query_moment, wk @ stream.moment @ wk.T, k // heads)
        for_output, for_values = narrow_values(wv @ stream.moment @ wv.T, wo, k // heads)
        rows["query"].append(scale * for_queries.T @ wq)
        rows["query_bias"].append(scale * for_queries.T @ bq)
        rows["key"].append(scale * for_keys.T @ wk)
        rows["key_bias"].append(scale * for_keys.T @ bk)
        rows["value"].append(for_values.T @ wv)
        rows["output"].append(wo @ for_output)
    write(new.self.query, torch.cat(rows["query"]) @ stream.basis, torch.cat(rows["query_bias"]))
    write(new.self.key, torch.cat(rows["key"]) @ stream.basis, torch.cat(rows["key_bias"]))
    write(new.self.value, torch.cat(rows["value"]) @ stream.basis, torch.zeros(k, dtype=torch.float64))
    carried = bias_of(output) + weight_of(output) @ bias_of(value)
    write(new.output.dense, stream.basis.T @ torch.cat(rows["output"], 1), stream.basis.T @ carried)


def _heads(new: Layer, old: Layer, stream: _Stream) -> None:
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


def _norm_names(model: Layer) -> list[str]:
    """In the order of execution."""
    prefix = name_prefix(model, model.base_model)
    names = [f"{prefix}embeddings.LayerNorm"]
    for index in range(model.config.num_hidden_layers):
        layer = f"{prefix}encoder.layer.{index}."
        names += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    return names
