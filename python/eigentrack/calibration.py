"""From logits to probabilities, and to a threshold with a known rate of false alarms."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eigentrack.errors import MismatchError

METHODS = ("platt", "isotonic")
LEAST_SLOPE = 1e-3  # Platt's slope stays positive: a higher logit is a higher risk, however little it says


@dataclass(frozen=True, eq=False)
class Calibration:
    """A non-decreasing map from logits to probabilities, and the threshold found with it.

    Attributes:
        method: "platt" or "isotonic"; None before calibration, when it is the logistic function.
        slope, intercept: for "platt" the probability is 1 / (1 + exp(-slope * logit - intercept)).
        knots, values: (K,) float32: for "isotonic" the probability is linear between them, constant beyond.
        threshold: the probability that the highest risk of a right sequence exceeds with at most `false_alarms`.
        false_alarms: as asked for.
    """

    method: str | None
    slope: float
    intercept: float
    knots: Tensor
    values: Tensor
    threshold: float
    false_alarms: float

    def __call__(self, logits: Tensor) -> Tensor:
        """(...) -> (...)."""
        if self.method is None:
            return logits.sigmoid()
        if self.method == "platt":
            return logits.mul(self.slope).add_(self.intercept).sigmoid_()
        return self.on(logits.device)(logits)

    def on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The isotonic curve: the sum of its rises, none of them negative, each as far as the logit has come in it."""
        knots, values = self.knots.to(device), self.values.to(device)
        first, width, least, rises = knots[:-1], knots.diff(), values[0], values.diff()

        def curve(logits: Tensor) -> Tensor:
            return (logits[..., None] - first).div_(width).clamp_(0, 1).matmul(rises).add_(least)

        return curve


def uncalibrated() -> Calibration:
    """The logistic function, and no threshold."""
    return Calibration(None, 1.0, 0.0, torch.empty(0), torch.empty(0), math.nan, math.nan)


def fit_map(logits: list[Tensor], labels: Tensor, method: str) -> Calibration:
    """The map that makes token probabilities right on average, every sequence counting the same.

    Source: Platt (1999), with his targets (n₁ + 1) / (n₁ + 2) and 1 / (n₀ + 2); Zadrozny and Elkan (2002) for
    "isotonic", its steps replaced by straight lines between their middles.
    """
    x = torch.cat(logits).double().numpy()
    weight = np.concatenate([np.full(len(one), 1 / len(one)) for one in logits])
    lengths = [len(one) for one in logits]
    y = np.repeat(labels.double().numpy(), lengths)
    if method == "platt":
        slope, intercept = _platt(x, y, weight)
        return Calibration("platt", slope, intercept, torch.empty(0), torch.empty(0), math.nan, math.nan)
    knots, values = _isotonic(x, y, weight)
    values = values.clip(1 / (len(logits) + 2), 1 - 1 / (len(logits) + 2))
    return Calibration("isotonic", 1.0, 0.0, _float(knots), _float(values), math.nan, math.nan)


def threshold_for(highest: Tensor, false_alarms: float) -> float:
    """The limit that one more right sequence exceeds with a probability of at most `false_alarms`.

    The ⌈(1 - α)(n + 1)⌉-th lowest of the highest risks of n right sequences, or rather the middle between it and the
    next one: for sequences drawn as these were, whatever the distribution (split conformal prediction).

    Raises:
        MismatchError: if there are too few sequences for so low a rate.
    """
    if not 0 < false_alarms < 1:
        raise MismatchError(f"false_alarms must be between 0 and 1, got {false_alarms!r}")
    count = len(highest)
    rank = math.ceil((1 - false_alarms) * (count + 1) - 1e-9)
    if rank > count:
        raise MismatchError(
            f"a false-alarm rate of {false_alarms} takes {math.ceil(1 / false_alarms - 1 - 1e-9)} right sequences "
            f"(label 0) or more to calibrate on, got {count}"
        )
    ordered = highest.double().sort().values
    above = float(ordered[rank]) if rank < count else 1.0
    return (float(ordered[rank - 1]) + above) / 2


def _platt(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    from scipy.optimize import minimize

    wrong, right = float(weight[y == 1].sum()), float(weight[y == 0].sum())
    target = np.where(y == 1, (wrong + 1) / (wrong + 2), 1 / (right + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters[0] * x + parameters[1]
        excess = weight * (1 / (1 + np.exp(-z.clip(-500, 500))) - target)
        gradient = np.array([(excess * x).sum(), excess.sum()])
        return float((weight * (np.logaddexp(0, z) - target * z)).sum()), gradient

    start = np.array([1.0, 0.0])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(LEAST_SLOPE, None), (None, None)])
    return float(found.x[0]), float(found.x[1])


def _isotonic(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots and values of at least two points."""
    from scipy.optimize import isotonic_regression

    points, place = np.unique(x, return_inverse=True)  # equal logits must have one value
    total = np.bincount(place, weight)
    means = np.bincount(place, weight * y) / total
    fitted = isotonic_regression(means, weights=total)
    blocks = np.asarray(fitted.blocks[:-1], dtype=np.intp)
    knots = np.add.reduceat(points * total, blocks) / np.add.reduceat(total, blocks)
    values = np.asarray(fitted.x)[blocks]
    keep = np.append(True, np.diff(knots.astype(np.float32)) > 0)
    knots, values = knots[keep], values[keep]
    return (knots, values) if len(knots) > 1 else (np.append(knots, knots + 1), np.repeat(values, 2))


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
