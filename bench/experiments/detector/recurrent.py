"""EigenTrack's detector on the sequences of a set."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.experiments.detector.data import Data
from bench.experiments.detector.early import FALSE_ALARMS
from bench.experiments.detector.probes import Scored, best, judged
from eigentrack import Detector

CELLS = ("rnn", "gru", "lstm")
SEEDS = (0, 1, 2)
TAKEN = {"last": lambda row: row[-1], "mean": np.mean, "max": np.max}  # of a text's logits


@dataclass
class Tracked(Scored):
    """Scores of a text, and the risks of its tokens.

    Attributes:
        risks: (A,) of each answer.
        detector: what gave them.
    """

    risks: list[Tensor] = None  # type: ignore[assignment]
    detector: Detector = None  # type: ignore[assignment]


def track(data: Data, sequences: list[Tensor], cell: str = "gru", seed: int = 0, **options: Any) -> Tracked:
    """Trains on the training part, stops by the validation part, and calibrates there (5 % false alarms)."""
    names = [f"feature{i}" for i in range(sequences[0].shape[1])]
    widths = {key: options.pop(key) for key in ("hidden", "projection") if key in options}
    detector = Detector(names, cell=cell, **widths)
    part = {
        split: ([sequences[i] for i in data.where(split)], data.labels[data.where(split)].astype(int).tolist())
        for split in ("train", "validation")
    }
    detector.fit(*part["train"], validation=part["validation"], seed=seed, progress=False, **options)
    right = part["validation"][1].count(0)
    detector.calibrate(*part["validation"], false_alarms=max(FALSE_ALARMS, 1 / (right + 1)))
    risks = detector.score(sequences)
    logits = [risk.double().logit(eps=1e-7).numpy() for risk in risks]
    scored = best(
        [
            judged(np.array([float(take(row)) for row in logits]), data.labels, data.where("validation"), taken=kind)
            for kind, take in TAKEN.items()
        ]
    )
    return Tracked(scored.values, scored.choice, scored.validation, risks, detector)


def shuffled_in_time(sequences: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Each with its tokens in random order."""
    generator = torch.Generator().manual_seed(seed)
    return [rows[torch.randperm(len(rows), generator=generator)] for rows in sequences]
