"""Where hidden states lie in subspaces fitted on training answers: of right ones, of wrong ones, of all.

What is fitted on labels is fitted on other sources than the answer's, as in `directions`.
"""

import torch
from torch import Tensor

from bench.experiments.detector.data import Data
from bench.experiments.detector.directions import Moments, fold_of, moments_by_fold
from bench.experiments.detector.vectors import RANK, normalised

LEADING = 4  # directions of a window
WINDOW = 32
COMPONENTS = 64


def leading_in_reference(data: Data) -> list[Tensor]:
    """(A, layers * 2): the share of the window's LEADING principal directions, and of the energy along them, inside the
    RANK leading directions of right answers' tokens (about their mean); the window is centred."""
    bases = {}
    for fold, (right, _) in moments_by_fold(data, _rows(data)).items():
        _, vectors = torch.linalg.eigh(right.scatter / right.count)
        bases[fold] = vectors[:, :, -RANK:].float()  # (layers, D, RANK)
    found = []
    for i, answer in enumerate(data.answers):
        rows = normalised(answer.hidden).transpose(0, 1)  # (layers, A, D)
        found.append(_leading(rows, bases[fold_of(data, i)]))
    return found


def _leading(rows: Tensor, basis: Tensor) -> Tensor:
    layers, length, _ = rows.shape
    inside = rows @ basis
    found = rows.new_zeros(length, layers, 2)
    for last in range(1, length):  # a window of one row has no direction once it is centred
        window = slice(max(0, last + 1 - WINDOW), last + 1)
        part = rows[:, window] - rows[:, window].mean(1, keepdim=True)
        values, vectors = torch.linalg.eigh(part @ part.mT)
        leading = vectors[:, :, -LEADING:]
        energy = values[:, -LEADING:].clamp(min=1e-6)
        along = (leading.mT @ (inside[:, window] - inside[:, window].mean(1, keepdim=True))).square().sum(2) / energy
        along = along * (energy > 1e-4 * energy[:, -1:])
        found[last, :, 0] = along.mean(1)
        found[last, :, 1] = (along * energy).sum(1) / energy.sum(1)
    return found.flatten(1)


def likelihoods(data: Data, shrinkage: float = 0.1) -> list[Tensor]:
    """(A, layers): ln p(token | wrong) − ln p(token | right) per entry, normal distributions with a covariance each: a
    quadratic discriminant, where `directions` are linear ones. Shrinkage in units of the mean eigenvalue."""
    fitted = {
        fold: [_normal(moments, shrinkage) for moments in both]
        for fold, both in moments_by_fold(data, _rows(data)).items()
    }
    found = []
    for i, answer in enumerate(data.answers):
        rows = normalised(answer.hidden).transpose(0, 1)
        right, wrong = (
            ((rows - mean) @ whitening).square().mean(2) + level for mean, whitening, level in fitted[fold_of(data, i)]
        )
        found.append((right - wrong).T.contiguous() / 2)
    return found


def _normal(moments: Moments, shrinkage: float) -> tuple[Tensor, Tensor, Tensor]:
    """(layers, 1, D) mean, (layers, D, D) whitening and (layers, 1) mean logarithm of the eigenvalues."""
    values, vectors = torch.linalg.eigh(moments.scatter / moments.count)
    values = values.clamp(min=0) + shrinkage * values.mean(1, keepdim=True)
    whitening = vectors / values.sqrt()[:, None]
    return moments.mean.float()[:, None], whitening.float(), values.log().mean(1, keepdim=True).float()


def principal(data: Data, layers: list[int]) -> list[Tensor]:
    """(A, COMPONENTS): coordinates of these layers, side by side, along the principal directions of training tokens."""
    rows = [normalised(answer.hidden[:, layers]).flatten(1) for answer in data.answers]
    total = Moments.of(torch.cat([rows[i] for i in data.where("train")])[:, None])
    _, vectors = torch.linalg.eigh(total.scatter[0])
    leading = vectors[:, -COMPONENTS:].float()
    mean = total.mean[0].float()
    return [(row - mean) @ leading for row in rows]


def _rows(data: Data) -> list[Tensor]:
    return [normalised(answer.hidden) for answer in data.answers]
