"""What an ordinary value of each descriptor is: mean and deviation over training tokens, without their outliers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SAMPLE = 1 << 16  # tokens that mean and deviation are taken from, at most
OUTLYING = 5.0  # robust deviations from the median beyond which a value has no part in them
CONSTANT = 1e-6  # of the mean's size: a smaller deviation is rounding


@dataclass(frozen=True, eq=False)
class Standardisation:
    """z = (x - mean) / deviation, at most `clip` either way; 0 for NaN, and for what was constant in training.

    Attributes:
        mean, deviation: (F,) float32; deviation 0 for constants.
        clip: in deviations.
    """

    mean: Tensor
    deviation: Tensor
    clip: float

    @property
    def limit(self) -> Tensor:
        """(F,): the largest |x - mean| that counts."""
        return self.clip * self.deviation

    @property
    def inverse(self) -> Tensor:
        """(F,) float64: 1 / deviation, 0 for constants."""
        deviation = self.deviation.double()
        return torch.where(deviation > 0, 1 / deviation, 0)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., F)."""
        z = (x - self.mean).clamp_(-self.limit, self.limit).nan_to_num_(0.0)
        return z.mul_(self.inverse.to(z.dtype))

    @staticmethod
    def fit(sequences: Sequence[Tensor], clip: float, generator: torch.Generator) -> "Standardisation":
        """From (T, F) sequences, each token counting once; from 65536 tokens drawn at random if there are more.

        The first window of a sequence holds one row and its `log_trace` is -87: a few such values would be the whole
        deviation. So values more than five robust deviations (interquartile range / 1.349, or the deviation where that
        is 0) from the median have no part in mean and deviation.
        """
        total = sum(map(len, sequences))
        chosen = torch.ones(total, dtype=torch.bool)
        if total > SAMPLE:
            chosen = torch.zeros(total, dtype=torch.bool)
            chosen[torch.randperm(total, generator=generator)[:SAMPLE]] = True
        parts = chosen.split([len(sequence) for sequence in sequences])
        pool = torch.cat([sequence[part] for sequence, part in zip(sequences, parts, strict=True)]).numpy()
        moments = np.array([_moments(column) for column in pool.T.astype(np.float64)])
        mean, deviation = torch.from_numpy(moments).float().unbind(1)
        return Standardisation(mean.contiguous(), deviation.contiguous(), clip)


def _moments(column: np.ndarray) -> tuple[float, float]:
    """Mean and deviation of the values that are finite and no outliers."""
    values = column[np.isfinite(column)]
    if not len(values):
        return 0.0, 0.0
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    spread = (high - low) / 1.349 or values.std()
    values = values[abs(values - median) <= OUTLYING * spread]
    mean, deviation = float(values.mean()), float(values.std())
    return mean, deviation if deviation > CONSTANT * abs(mean) else 0.0
