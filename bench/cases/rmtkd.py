"""rmtkd: what width mode gains on one thread, 128 tokens: BERT encoders as they are against the narrower shape.

6×384 in the shape that quantile 0.45 gives on SST-2 (docs/rmtkd-results.md), 12×768 at the paper's −80.9 %. Width mode
makes stock models, whose speed depends on nothing but their shape: both are stock models with random weights.
"""

from typing import Any

import torch

from bench.case import Case, case

TOKENS, HEADS = 128, 12
SMALL, SMALL_NARROW = (6, 384, 1536), (6, 192, 600)
BASE, BASE_NARROW = (12, 768, 3072), (12, 288, 1128)
DENSE = "as it was"


def encoder(layers: int, hidden: int, inner: int) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=HEADS
    )
    return BertModel(config).eval()


def narrowing(
    shape: tuple[int, int, int], narrow: tuple[int, int, int], batch: int, cut: float, target: float | None
) -> Case:
    """`cut`: the share of the parameters that must be gone; `target`: how many times as fast it is to be."""
    dense, smaller = encoder(*shape), encoder(*narrow)
    ids = torch.randint(0, 30_000, (batch, TOKENS), generator=torch.Generator().manual_seed(0))

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids).last_hidden_state
        return found

    def verify() -> None:
        before, after = (sum(parameter.numel() for parameter in model.parameters()) for model in (dense, smaller))
        assert after <= (1 - cut) * before, f"{1 - after / before:.1%} cut, not {cut:.1%}"
        for model, (_, hidden, _) in ((dense, shape), (smaller, narrow)):
            assert run(model).shape == (batch, TOKENS, hidden) and run(model).isfinite().all(), "wrong output"

    return Case(
        ours=lambda: run(smaller),
        peers={DENSE: lambda: run(dense)},
        verify=verify,
        targets={} if target is None else {DENSE: target},
        rounds=30 if batch == 1 else 12,
    )


@case("rmtkd.width_6x384_batch1")
def small_one() -> Case:
    return narrowing(SMALL, SMALL_NARROW, 1, 0.63, 2.5)


@case("rmtkd.width_6x384_batch32")
def small_many() -> Case:
    return narrowing(SMALL, SMALL_NARROW, 32, 0.63, None)


@case("rmtkd.width_12x768_batch1")
def base_one() -> Case:
    return narrowing(BASE, BASE_NARROW, 1, 0.809, 5)
