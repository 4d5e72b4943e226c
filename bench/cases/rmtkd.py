"""rmtkd: what width mode gains on one thread, 128 tokens: BERT encoders as they are against the narrower shape.

6×384 in the shape that quantile 0.45 gives on SST-2 (docs/rmtkd-results.md) and at the paper's −58.8 %, 12×768 at the
paper's −80.9 %, with fewer heads, whole. Peers have at most as many parameters: every layer and embedding as two
factors of the same share (SVD), and SliceGPT's slicing. Speed depends on shapes alone: all have random weights, and
what they compute is not compared.
"""

from typing import Any

import torch
from torch import nn

from bench.case import Case, case
from bench.experiments.rmtkd_baselines import factorable, ranks_for
from bench.experiments.rmtkd_slicing import slice_bert, width_for
from bench.experiments.rmtkd_units import parameters

TOKENS, HEADS = 128, 12
SMALL, SMALL_NARROW, SMALL_PAPER = (6, 384, 1536), (6, 192, 600), (6, 192, 1064)
BASE, BASE_NARROW = (12, 768, 3072), (12, 256, 1576)
DENSE = "as it was"


def encoder(layers: int, hidden: int, inner: int, heads: int = HEADS) -> Any:
    return classifier(layers, hidden, inner, heads).bert


def classifier(layers: int, hidden: int, inner: int, heads: int = HEADS) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads
    )
    return BertForSequenceClassification(config).eval()


def factored(shape: tuple[int, int, int], total: int) -> Any:
    """Layers and embedding as two thin ones each, with the ranks of plain SVD, and without its factors."""
    model = encoder(*shape)
    modules = dict(model.named_modules())
    chosen = factorable(model)
    shapes = {name: tuple(module.weight.shape) for name, module in chosen.items()}
    rest = parameters(model) - sum(module.weight.numel() for module in chosen.values())
    for name, rank in ranks_for(shapes, total - rest).items():
        rows, columns = shapes[name]
        wide = chosen[name]
        thin: nn.Module = (
            nn.Embedding(rows, rank) if isinstance(wide, nn.Embedding) else nn.Linear(columns, rank, False)
        )
        back = nn.Linear(rank, columns, False) if isinstance(wide, nn.Embedding) else nn.Linear(rank, rows)
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, nn.Sequential(thin, back))
    return model


def sliced(shape: tuple[int, int, int], total: int) -> Any:
    """SliceGPT's shape: the residual stream cut at every norm, with a matrix on every shortcut."""
    layers, hidden, _ = shape
    model = classifier(*shape)
    positions = [torch.eye(hidden, dtype=torch.float64)] * (2 * layers + 1)
    return slice_bert(
        model, [], width_for(lambda width: slice_bert(model, [], width, positions).bert, hidden, total), positions
    ).bert


def narrowing(
    shape: tuple[int, int, int], narrow: tuple[int, int, int], batch: int, cut: float, target: float | None
) -> Case:
    """`cut`: the share of the parameters that must be gone; `target`: how many times as fast it is to be."""
    dense, smaller = encoder(*shape), encoder(*narrow, HEADS * narrow[1] // shape[1])
    total = parameters(smaller)
    models = {DENSE: dense, "SVD": factored(shape, total), "slicing": sliced(shape, total)}
    ids = torch.randint(0, 30_000, (batch, TOKENS), generator=torch.Generator().manual_seed(0))

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids).last_hidden_state
        return found

    def verify() -> None:
        assert total <= (1 - cut) * parameters(dense), f"{1 - total / parameters(dense):.1%} cut, not {cut:.1%}"
        assert run(smaller).shape == (batch, TOKENS, narrow[1]) and run(smaller).isfinite().all(), "wrong output"
        for name, model in models.items():
            assert name == DENSE or 0.97 * total <= parameters(model) <= total, (
                f"{name}: {parameters(model)} parameters"
            )
            assert run(model).isfinite().all() and len(run(model)[0]) == TOKENS, f"{name}: wrong output"

    layers, hidden, inner = narrow
    weights = layers * (4 * hidden * hidden + 2 * hidden * inner)
    return Case(
        ours=lambda: run(smaller),
        peers={name: lambda model=model: run(model) for name, model in models.items()},
        verify=verify,
        targets={} if target is None else {DENSE: target},
        bytes_read=4 * weights,
        flops=2 * batch * TOKENS * (weights + 2 * layers * TOKENS * hidden),
        flops_dtype=torch.float32,
        rounds=30 if batch == 1 else 12,
    )


@case("rmtkd.width_6x384_batch1")
def small_one() -> Case:
    return narrowing(SMALL, SMALL_NARROW, 1, 0.63, 2.5)


@case("rmtkd.width_6x384_paper_batch1")
def small_paper() -> Case:
    return narrowing(SMALL, SMALL_PAPER, 1, 0.588, 2.5)


@case("rmtkd.width_6x384_batch32")
def small_many() -> Case:
    return narrowing(SMALL, SMALL_NARROW, 32, 0.63, None)


@case("rmtkd.width_12x768_batch1")
def base_one() -> Case:
    return narrowing(BASE, BASE_NARROW, 1, 0.809, 5)
