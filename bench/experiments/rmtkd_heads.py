"""Attention heads made narrower from within, with the least error in what they compute: not what width mode does."""

import torch
from torch import Tensor


def narrow_scores(queries: Tensor, keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How queries and keys of one head shrink so that their products change least.

    qᵀ k ≈ (Bᵀ q)ᵀ (Dᵀ k), where B Dᵀ of rank r makes E (qᵀ k − qᵀ B Dᵀ k)² least for independent q and k of the given
    second moments: the truncated SVD of M_q^{1/2} M_k^{1/2} in the metric of both, shared evenly between the two
    (balanced truncation). No inverse of a moment is taken, so they may be singular.

    A shift of all keys changes all scores of a query alike, which softmax does not see: give the keys' covariance.

    Args:
        queries: (h, h) second moment of the queries, bias included.
        keys: (h, h) covariance of the keys.
        width: r, 1 to h.

    Returns:
        B and D, (h, r) float64, with Dᵀ B = I on the directions that carry anything.
    """
    query_root, key_root = _root(queries), _root(keys)
    left, values, right = torch.linalg.svd(query_root @ key_root)
    scale = _inverse_root(values[:width])
    return key_root @ right[:width].T * scale, query_root @ left[:, :width] * scale


def narrow_values(values: Tensor, output: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How the values of one head shrink so that what the head adds to the stream changes least.

    O v ≈ O B (Dᵀ v) of rank r with the least E‖O v − O B Dᵀ v‖²: balanced truncation of the values' moment and OᵀO.

    Args:
        values: (h, h) second moment of the values that the head passes on.
        output: (d, h) the head's columns of the output layer.
        width: r, 1 to h.

    Returns:
        B and D, (h, r) float64: the head's output columns become O B, its value rows Dᵀ V.
    """
    output = output.double()
    return narrow_scores(output.T @ output, values, width)


def _root(moment: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(moment.double())
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _inverse_root(values: Tensor) -> Tensor:
    """values^{-1/2}, and 0 for what is rounding of 0."""
    negligible = values <= 1e-12 * values.max().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(negligible, 0, values.clamp(min=torch.finfo(values.dtype).tiny) ** -0.5)
