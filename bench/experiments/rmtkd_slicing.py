"""Slicing as SliceGPT does it (arXiv 2401.15024): a rotation per normalised position, cut to its leading directions.

SliceGPT is of networks that normalise before each branch. What it needs is that RMSNorm commutes with a rotation,
and a matrix on every shortcut. BERT normalises after the sum, LayerNorm(x + f(x)), so the state on the shortcut
carries the gains and offsets of the norm before: with h = g ⊙ u + b, u = M z / rms(M z) and M = I − 11ᵀ/d, they go into
the readers of h and into the shortcut, whose matrix becomes Q′ᵀ M diag(g) Q; M goes into the writers. At full width
this is the same function. The result is no stock BERT: its shortcuts have weights and its norms have none.

The moments are those of the uncut model, not of the part that is already cut. Tied embeddings stay tied: the final gain
becomes one small matrix before the head. `shared` takes one rotation of the pooled moment for all positions and no
shortcut matrices where none are needed (Llama): PCA of the residual stream, without the Marchenko-Pastur rule.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.experiments.rmtkd_units import parameters

Batch = Mapping[str, Tensor]


class UnitNorm(nn.Module):
    """Division by the root mean square over `dim` numbers, of which the rest was cut off; it has no gain."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.dim + self.eps)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A float32 layer of this weight (d_out, d_in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def embedding(table: Tensor, padding: int | None = None) -> nn.Embedding:
    return nn.Embedding.from_pretrained(table.float(), freeze=False, padding_idx=padding)


@torch.no_grad()
def rotations(
    model: nn.Module,
    norms: Iterable[str],
    batches: Iterable[Batch],
    unit: Callable[[nn.Module, Tensor], Tensor],
    shared: bool = False,
) -> list[Tensor]:
    """Per norm (d, d) float64 eigenvectors of the moment of its normalised rows, largest first.

    Args:
        norms: names of modules, in order.
        unit: (module, its input) to the rows of unit root mean square that its gains are applied to.
        shared: one rotation, of the pooled moment, for all.
    """
    names = list(norms)
    modules = dict(model.named_modules())
    sums: dict[str, Tensor] = {}
    mask = torch.empty(0)

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = unit(module, args[0])[mask].double()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return add

    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if shared:
        pooled = torch.stack([sums[name] for name in names]).sum(0)
        return [leading(pooled)] * len(names)
    return [leading(sums[name]) for name in names]


def leading(moment: Tensor) -> Tensor:
    """Eigenvectors (d, d), largest first; SliceGPT's damping by a multiple of the identity changes none of them."""
    return torch.linalg.eigh(moment).eigenvectors.flip(1)


def centred_unit(module: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + module.eps)  # type: ignore[operator]


def plain_unit(module: nn.Module, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)  # type: ignore[operator]


class SlicedOutput(nn.Module):
    """Stands for BertSelfOutput and BertOutput: the writer, the shortcut with its matrix, the norm without gains."""

    def __init__(self, dense: nn.Linear, shortcut: nn.Linear, norm: UnitNorm, dropout: nn.Module) -> None:
        super().__init__()
        self.dense, self.shortcut, self.norm, self.dropout = dense, shortcut, norm, dropout

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        found: Tensor = self.norm(self.dropout(self.dense(hidden_states)) + self.shortcut(input_tensor))
        return found


def slice_bert(model: Any, batches: Iterable[Batch], width: int, positions: list[Tensor] | None = None) -> Any:
    """A copy of a BERT with a task head, its residual stream cut to `width` directions per position.

    Args:
        positions: rotations found before, see `bert_rotations`.
    """
    positions = bert_rotations(model, batches) if positions is None else positions
    student = copy.deepcopy(model)
    bert = student.bert
    queue = [basis[:, :width] for basis in positions]
    norm, basis = bert.embeddings.LayerNorm, queue.pop(0)
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        table = getattr(bert.embeddings, name)
        cut = _centre(table.weight.detach().double().T).T @ basis
        setattr(bert.embeddings, name, embedding(cut, table.padding_idx))
    bert.embeddings.LayerNorm = UnitNorm(len(basis), norm.eps)
    for layer in bert.encoder.layer:
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            setattr(attention, name, _reader(getattr(attention, name), norm, basis))
        layer.attention.output, norm, basis = _output(layer.attention.output, norm, basis, queue.pop(0))
        layer.intermediate.dense = _reader(layer.intermediate.dense, norm, basis)
        layer.output, norm, basis = _output(layer.output, norm, basis, queue.pop(0))
    bert.pooler.dense = _reader(bert.pooler.dense, norm, basis)
    return student


def bert_rotations(model: Any, batches: Iterable[Batch]) -> list[Tensor]:
    names = ["bert.embeddings.LayerNorm"]
    for i in range(len(model.bert.encoder.layer)):
        names += [f"bert.encoder.layer.{i}.attention.output.LayerNorm", f"bert.encoder.layer.{i}.output.LayerNorm"]
    return rotations(model, names, batches, centred_unit)


def _centre(columns: Tensor) -> Tensor:
    """M times columns (d, n)."""
    return columns - columns.mean(0, keepdim=True)


def _reader(layer: nn.Linear, norm: Any, basis: Tensor) -> nn.Linear:
    weight = layer.weight.detach().double()
    bias = weight @ norm.bias.detach().double() + layer.bias.detach().double()
    return linear((weight * norm.weight.detach().double()) @ basis, bias)


def _output(output: Any, norm: Any, basis: Tensor, following: Tensor) -> tuple[SlicedOutput, Any, Tensor]:
    """Also the norm and the basis that its readers see."""
    dense = output.dense
    writer = linear(
        following.T @ _centre(dense.weight.detach().double()),
        following.T @ _centre(dense.bias.detach().double()[:, None])[:, 0],
    )
    shortcut = linear(
        following.T @ _centre(norm.weight.detach().double()[:, None] * basis),
        following.T @ _centre(norm.bias.detach().double()[:, None])[:, 0],
    )
    after = output.LayerNorm
    return SlicedOutput(writer, shortcut, UnitNorm(len(basis), after.eps), output.dropout), after, following


class SlicedLlamaLayer(nn.Module):
    """A Llama layer whose norms have no gain and whose shortcuts have a matrix, or none."""

    def __init__(self, layer: Any, norms: tuple[UnitNorm, UnitNorm], shortcuts: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.norms, self.shortcuts = nn.ModuleList(norms), nn.ModuleList(shortcuts)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.norms[0](hidden_states), **options)
        hidden_states = self.shortcuts[0](hidden_states) + attended
        found: Tensor = self.shortcuts[1](hidden_states) + self.mlp(self.norms[1](hidden_states))
        return found


def slice_llama(model: Any, width: int, positions: list[Tensor]) -> Any:
    """A copy of a LlamaForCausalLM, its residual stream cut to `width` directions per position of `llama_rotations`."""
    student = copy.deepcopy(model)
    body, queue = student.model, [basis[:, :width] for basis in positions]
    dim, first, last = len(positions[0]), queue[0], queue[-1]
    shared = all(basis is positions[0] for basis in positions)
    table = body.embed_tokens
    body.embed_tokens = embedding(table.weight.detach().double() @ first, table.padding_idx)
    for i, layer in enumerate(body.layers):
        before, middle, after = queue[2 * i : 2 * i + 3]
        _fold(layer.self_attn, ("q_proj", "k_proj", "v_proj"), layer.input_layernorm, before)
        _fold(layer.mlp, ("gate_proj", "up_proj"), layer.post_attention_layernorm, middle)
        layer.self_attn.o_proj = _writer(layer.self_attn.o_proj, middle)
        layer.mlp.down_proj = _writer(layer.mlp.down_proj, after)
        norms = tuple(
            UnitNorm(dim, n.variance_epsilon) for n in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        shortcuts = tuple(
            nn.Identity() if shared else linear(following.T @ basis)
            for basis, following in ((before, middle), (middle, after))
        )
        body.layers[i] = SlicedLlamaLayer(layer, norms, shortcuts)  # type: ignore[arg-type]
    gain = first.T @ (body.norm.weight.detach().double()[:, None] * last)
    body.norm = nn.Sequential(UnitNorm(dim, body.norm.variance_epsilon), linear(gain))
    student.lm_head = nn.Linear(width, len(table.weight), bias=False)
    student.lm_head.weight = body.embed_tokens.weight
    return student


def llama_rotations(model: Any, batches: Iterable[Batch], shared: bool = False) -> list[Tensor]:
    names = []
    for i in range(len(model.model.layers)):
        names += [f"model.layers.{i}.input_layernorm", f"model.layers.{i}.post_attention_layernorm"]
    return rotations(model, [*names, "model.norm"], batches, plain_unit, shared)


def _fold(block: Any, names: tuple[str, ...], norm: Any, basis: Tensor) -> None:
    for name in names:
        layer = getattr(block, name)
        setattr(
            block, name, linear((layer.weight.detach().double() * norm.weight.detach().double()) @ basis, layer.bias)
        )


def _writer(layer: nn.Linear, basis: Tensor) -> nn.Linear:
    bias = None if layer.bias is None else basis.T @ layer.bias.detach().double()
    return linear(basis.T @ layer.weight.detach().double(), bias)


def width_for(build: Callable[[int], nn.Module], widest: int, total: int) -> int:
    """The largest width with which `build` has at most `total` parameters: they are a quadratic of the width."""
    one, two, three = (parameters(build(width)) for width in (1, 2, 3))
    square, slope = (one - 2 * two + three) // 2, two - one
    fitting = [w for w in range(1, widest + 1) if one + (w - 1) * slope + (w - 1) * (w - 2) * square <= total]
    return max(fitting)
