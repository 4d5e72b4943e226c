"""What the vectors add to the eigenvalues: where each hidden state lies, relative to a subspace that is known before.

The subspace is the prompt's own (context), or that of right answers seen in training (reference). Everything is per
token and layer, costs k products of D numbers, and needs no token that comes later.
"""

from functools import lru_cache
from pathlib import Path

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from bench.experiments.detector.data import Data
from bench.experiments.detector.windows import cached

RANK = 16


def context_features(folder: Path) -> list[Tensor]:
    """(A, layers * 5) of all answers of a set; the embedding is the first layer."""
    return cached(folder, "context", of_context)


def of_context(hidden: Tensor, prompt: Tensor) -> Tensor:
    """(A, layers * 5), per layer: the largest cosine to a token of the prompt; the share of the token's energy, about
    the prompt's mean, inside the prompt's RANK leading directions, and the logarithm of what is outside; the cosine to
    the mean; and the cosine to the token before."""
    rows = (hidden / hidden.square().mean(2, keepdim=True).sqrt()).transpose(0, 1)  # (layers, A, D)
    context, mean, directions = _basis(prompt)
    nearest = (rows @ context.mT).amax(2) / rows.shape[2]
    about = rows - mean
    energy = about.square().sum(2)
    inside = (about @ directions.mT).square().sum(2)
    centre = mean / mean.norm(dim=2, keepdim=True)
    along = (rows * centre).sum(2) / rows.shape[2] ** 0.5
    before = torch.cat([context[:, -1:], rows[:, :-1]], 1)
    step = (rows * before).sum(2) / rows.shape[2]
    outside = ((energy - inside).clamp(min=1e-6) / rows.shape[2]).log()
    found = torch.stack([nearest, inside / energy.clamp(min=1e-6), outside, along, step], 2)  # (layers, A, 5)
    return found.transpose(0, 1).flatten(1).contiguous()


@lru_cache(maxsize=1)  # twins follow each other
def _basis(prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (layers, P - 1, D), mean (layers, 1, D) and RANK leading directions of a prompt without its first token,
    which is like no other."""
    context = prompt[1:].float().transpose(0, 1)
    mean = context.mean(1, keepdim=True)
    _, _, directions = torch.linalg.svd(context - mean, full_matrices=False)
    return context, mean, directions[:, :RANK]


def reference_features(data: Data) -> list[Tensor]:
    """(A, layers * 3) about the tokens of right training answers: energy inside and outside their RANK leading
    directions, and the Mahalanobis distance."""
    right = [data.answers[i] for i in data.where("train") if data.answers[i].label == 0]
    known = torch.cat([normalised(answer.hidden) for answer in right]).transpose(0, 1)  # (layers, tokens, D)
    means, directions, whitening = [], [], []
    for layer in known.double():
        mean = layer.mean(0)
        covariance, _ = ledoit_wolf((layer - mean).numpy(), assume_centered=True)
        values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
        means.append(mean.float())
        directions.append(vectors[:, -RANK:].float())
        whitening.append((vectors / values.sqrt()).float())
    centre, leading, white = torch.stack(means)[:, None], torch.stack(directions), torch.stack(whitening)
    found = []
    for answer in data.answers:
        about = normalised(answer.hidden).transpose(0, 1) - centre
        energy = about.square().sum(2)
        inside = (about @ leading).square().sum(2)
        distance = (about @ white).square().mean(2).log()
        outside = ((energy - inside).clamp(min=1e-6) / about.shape[2]).log()
        found.append(torch.stack([inside / energy.clamp(min=1e-6), outside, distance], 2).transpose(0, 1).flatten(1))
    return found


def lookback(data: Data) -> list[Tensor]:
    """(A, blocks * heads): the share of a token's attention that goes to the prompt, without its first token, out of
    what goes to prompt and answer (Lookback Lens, arXiv 2407.07071)."""
    found = []
    for answer in data.answers:
        sink, prompt = answer.attention.unbind(3)
        found.append((prompt / (1 - sink).clamp(min=1e-6)).flatten(1))
    return found


def normalised(hidden: Tensor) -> Tensor:
    """Rows of root mean square 1."""
    return hidden / hidden.square().mean(-1, keepdim=True).sqrt()


def joined(*parts: list[Tensor]) -> list[Tensor]:
    """Side by side."""
    return [torch.cat(list(rows), 1) for rows in zip(*parts, strict=True)]
