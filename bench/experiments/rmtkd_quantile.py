"""`python -m bench.experiments.rmtkd_quantile`: what sets RMT-KD's rank, on the spectra of two real models.

Per group of taps of the 6×384 encoder (SST-2 sentences) and of SmolLM2-135M (WikiText-2): the share of directions
above the edge σ²(1+√q)² for σ² = each quantile of the spectrum; what the same quantile would keep without any edge
(the eigenvalues above σ² itself); what the other estimators keep; and spikes counted without a σ². Nothing is trained.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.experiments import data_text, rmtkd_language, rmtkd_text, texts
from bench.experiments.rmtkd_units import Units
from rmtkd import factor, width
from rmtkd.calibration import calibrate
from rmtkd.config import Config
from rmtkd.groups import Group
from rmtkd.rank import choose

RESULT = texts.ROOT / "bench" / "results" / "rmtkd-quantile.json"
QUANTILES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8)
OTHERS = ("median", "trace", "fit")
ROWS = 20_000


def spectra(model: Any, groups: Sequence[Group], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """By group: d, n, and the shares kept by every rule."""
    found = calibrate(model, batches, groups, rows=ROWS)
    return {group.name: shares(found[group.name]) for group in groups}


def shares(state: Any) -> dict[str, Any]:
    eigenvalues = torch.linalg.eigvalsh(state.covariance(center=False)).flip(0).clamp_min(0).numpy()
    dim, rows = len(eigenvalues), state.effective_rows
    config = Config(multiple=1, min_ratio=0.0)
    by_quantile = {q: choose(eigenvalues, rows, replace(config, quantile=q)) for q in QUANTILES}
    some = by_quantile[0.45]
    within = eigenvalues[: some.support]
    return {
        "d": dim,
        "n": round(rows),
        "support": some.support,
        "edge / noise variance": round(some.edges["quantile"] / some.sigma2["quantile"], 4),
        "first eigenvalue's share": round(float(eigenvalues[0] / eigenvalues.sum()), 4),
        "above the edge": {str(q): round(choice.raw_rank / dim, 4) for q, choice in by_quantile.items()},
        "above the quantile itself": {
            str(q): round(float((within > np.quantile(within, q)).sum()) / dim, 4) for q in QUANTILES
        },
        "other estimators": {name: round(some.outliers[name] / dim, 4) for name in OTHERS},
        "spikes": None if some.spikes is None else round(some.spikes / dim, 4),
    }


def encoder() -> dict[str, Any]:
    from transformers import AutoModel, AutoTokenizer

    rows = data_text.sst2(AutoTokenizer.from_pretrained(rmtkd_text.encoder())).train
    model = AutoModel.from_pretrained(rmtkd_text.encoder()).eval()
    groups = [group for group in width.groups(model) if group.ranked]
    return {"groups": spectra(model, groups, data_text.calibration(rows, seed=0))}


def language_model() -> dict[str, Any]:
    """Outputs of every seventh layer's projections, and the width mode's groups."""
    model, windows, _ = rmtkd_language.load()
    names = tuple(f"model.layers.{i}.*" for i in range(1, 30, 7))
    groups = [*factor.groups(model, Config(mode="factor", side="output", modules=names)), *width.groups(model)]
    return {"groups": spectra(model, groups, windows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    length, windows = rmtkd_language.LENGTH, rmtkd_language.CALIBRATION
    settings = {
        "rows of activations": ROWS,
        "encoder": "a tenth of SST-2's training sentences",
        "language model": f"the first {windows} windows of {length} tokens of WikiText-2 valid",
    }
    units = Units(arguments.json, "python -m bench.experiments.rmtkd_quantile", settings)
    units.once(encoder, model="6×384 encoder")
    units.once(language_model, model="SmolLM2-135M")


if __name__ == "__main__":
    main()
