"""Figures of scores: higher = riskier everywhere. Intervals resample the sources, so twins stay together."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS, SEED = 2000, 0


def auroc(scores: Array, labels: Array, weights: Array | None = None) -> Any:
    """How often a positive scores above a negative, ties counting half. `weights` (n,) or (draws, n)."""
    order = np.argsort(scores, kind="stable")
    scores, labels = scores[order], labels[order]
    weights = np.ones(len(scores)) if weights is None else weights[..., order]
    starts = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
    positive = np.add.reduceat(weights * labels, starts, -1)
    negative = np.add.reduceat(weights * (1 - labels), starts, -1)
    below = negative.cumsum(-1) - negative / 2
    return (positive * below).sum(-1) / (positive.sum(-1) * negative.sum(-1))


def resampled(groups: list[str], draws: int = DRAWS, seed: int = SEED) -> Array:
    """(draws, n) how often each text is drawn when whole groups are."""
    names, index = np.unique(groups, return_inverse=True)
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(names), (draws, len(names)))
    counts = np.stack([np.bincount(pick, minlength=len(names)) for pick in picks])
    return counts[:, index].astype(float)


def interval(values: Array) -> list[float]:
    """The middle 95 %."""
    low, high = np.quantile(values[np.isfinite(values)], (0.025, 0.975))
    return [round(float(low), 3), round(float(high), 3)]


def auroc_with_interval(scores: Array, labels: Array, groups: list[str]) -> list[float]:
    """[value, low, high]."""
    return [round(float(auroc(scores, labels)), 3), *interval(auroc(scores, labels, resampled(groups)))]


def difference(one: Array, other: Array, labels: Array, groups: list[str]) -> list[float]:
    """[value, low, high] of AUROC(one) - AUROC(other) on the same texts, resampled together."""
    weights = resampled(groups)
    value = float(auroc(one, labels) - auroc(other, labels))
    return [round(value, 3), *interval(auroc(one, labels, weights) - auroc(other, labels, weights))]


def precision_area(scores: Array, labels: Array) -> float:
    """Average precision."""
    order = np.argsort(-scores, kind="stable")
    sorted_labels = labels[order]
    last = np.concatenate([scores[order][1:] != scores[order][:-1], [True]])
    hits = sorted_labels.cumsum()[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((precision * np.diff(hits, prepend=0)).sum() / labels.sum())


def false_alarms_at(scores: Array, labels: Array, found: float = 0.95) -> float:
    """The share of negatives at or above the threshold that finds so many positives."""
    threshold = np.quantile(scores[labels == 1], 1 - found, method="lower")
    return float((scores[labels == 0] >= threshold).mean())


def hits_at(scores: Array, labels: Array, false_alarms: list[float]) -> Array:
    """The share of positives found at such shares of negatives: the ROC curve, straight through ties."""
    order = np.argsort(-scores, kind="stable")
    last = np.concatenate([scores[order][1:] != scores[order][:-1], [True]])
    hits = np.concatenate([[0.0], labels[order].cumsum()[last] / labels.sum()])
    alarms = np.concatenate([[0.0], (1 - labels[order]).cumsum()[last] / (1 - labels).sum()])
    upper = np.concatenate([alarms[1:] != alarms[:-1], [True]])  # where the curve is upright, its upper end counts
    return np.interp(false_alarms, alarms[upper], hits[upper])


def f1(scores: Array, labels: Array, threshold: float) -> float:
    flagged = scores >= threshold
    return float(2 * (flagged & (labels == 1)).sum() / max(flagged.sum() + labels.sum(), 1))


def best_f1_threshold(scores: Array, labels: Array) -> float:
    candidates = np.unique(scores)
    return float(max(candidates, key=lambda threshold: f1(scores, labels, threshold)))


def calibration_error(probabilities: Array, labels: Array, bins: int = 10) -> float:
    """Expected calibration error over bins of equal width."""
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = [
        (which == one).mean() * abs(probabilities[which == one].mean() - labels[which == one].mean())
        for one in np.unique(which)
    ]
    return float(sum(gaps))


def pairs_right(scores: Array, labels: Array, keys: list[str]) -> float:
    """Of prompts with answers of both labels: how often the mean score of the wrong is above that of the right."""
    wins = []
    for key in dict.fromkeys(keys):
        mine = np.array([name == key for name in keys])
        bad, good = scores[mine & (labels == 1)], scores[mine & (labels == 0)]
        if len(bad) and len(good):
            wins.append(float(np.sign(bad.mean() - good.mean()) + 1) / 2)
    return float(np.mean(wins)) if wins else float("nan")


def platt(scores: Array, labels: Array) -> tuple[float, float]:
    """(slope, offset) of the logistic curve through the scores."""
    from sklearn.linear_model import LogisticRegression

    centre, scale = float(scores.mean()), float(scores.std()) + 1e-12
    fitted = LogisticRegression(C=1e3).fit((scores[:, None] - centre) / scale, labels)
    slope = float(fitted.coef_[0, 0]) / scale
    return slope, float(fitted.intercept_[0]) - slope * centre


def summary(scores: dict[str, Array], labels: dict[str, Array], groups: list[str], keys: list[str]) -> dict[str, Any]:
    """All figures of one method on the test part; thresholds and calibration from validation. Keys: splits."""
    known, known_labels, new, truth = scores["validation"], labels["validation"], scores["test"], labels["test"]
    slope, offset = platt(known, known_labels)
    probabilities = 1 / (1 + np.exp(-(slope * new + offset)))
    return {
        "auroc": auroc_with_interval(new, truth, groups),
        "validation auroc": round(float(auroc(known, known_labels)), 3),
        "pairs right": round(pairs_right(new, truth, keys), 3),
        "auprc": round(precision_area(new, truth), 3),
        "f1": round(f1(new, truth, best_f1_threshold(known, known_labels)), 3),
        "fpr at 95 % found": round(false_alarms_at(new, truth), 3),
        "calibration error": round(calibration_error(probabilities, truth), 3),
    }
