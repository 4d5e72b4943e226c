"""What is known how early: alarms, lead time and tokens saved by stopping, and figures against the tokens seen."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench.experiments.detector.metrics import auroc

Array = NDArray[np.float64]
SEEN = (1, 2, 4, 8, 12, 16, 24, 32)
FALSE_ALARMS = 0.05


def threshold(risks: list[Tensor], labels: Array) -> float:
    """Of the running maximum: a share FALSE_ALARMS of right answers exceeds it; none, where they are too few."""
    highest = np.sort([float(risk.max()) for risk, label in zip(risks, labels, strict=True) if not label])
    return float(highest[min(int(np.ceil((1 - FALSE_ALARMS) * (len(highest) + 1))), len(highest)) - 1])


def stopping(risks: list[Tensor], labels: Array, level: float) -> dict[str, float]:
    """What stopping at the first risk above `level` does. Shares of answers, and of the tokens of all such answers."""
    left = [len(risk) - 1 - int((risk > level).int().argmax()) for risk in risks]
    stopped = np.array([bool((risk > level).any()) for risk in risks])
    left_over = np.where(stopped, left, 0)
    lengths = np.array([len(risk) for risk in risks])
    wrong = labels == 1
    caught = stopped & wrong
    return {
        "wrong answers stopped": share(stopped[wrong]),
        "right answers stopped": share(stopped[~wrong]),
        "median tokens left when stopped": float(np.median(left_over[caught])) if caught.any() else 0.0,
        "tokens of wrong answers saved": round(float(left_over[wrong].sum() / lengths[wrong].sum()), 3),
        "tokens of right answers lost": round(float(left_over[~wrong].sum() / lengths[~wrong].sum()), 3),
        "tokens in all": int(lengths.sum()),
    }


def share(values: Any) -> float:
    return round(float(np.mean(values)), 3)


def against_tokens(risks: list[Tensor], labels: Array) -> dict[str, float]:
    """AUROC of the risk after so many tokens, or at the end of answers that are shorter."""
    found = {
        str(seen): float(auroc(np.array([float(risk[min(seen, len(risk)) - 1]) for risk in risks]), labels))
        for seen in SEEN
    }
    found["all"] = float(auroc(np.array([float(risk[-1]) for risk in risks]), labels))
    return {seen: round(area, 3) for seen, area in found.items()}
