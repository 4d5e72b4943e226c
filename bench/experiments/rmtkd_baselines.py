"""What RMT-KD is held against: plain SVD and whitened SVD, as factors of every weight, at a given number of parameters.

Whitened SVD is SVD-LLM's (arXiv 2403.07378) without its update afterwards: with the second moment G = XᵀX of a layer's
inputs and its Cholesky factor S Sᵀ = G in float64, the SVD of W S is cut and S is taken out of the right factor. It
minimises the error of the layer's outputs on the calibration rows. An embedding's inputs are one-hot, so its G is
the diagonal of the tokens' counts (plus one: a token that was not seen still counts).
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.experiments.rmtkd_units import parameters

Moments = dict[str, Tensor]  # by the module's name: (d_in, d_in) float64; of an embedding its tokens' counts (V,)
SHIFT = 1e-6


def factorable(
    model: nn.Module, heads: Iterable[str] = ("classifier", "lm_head")
) -> dict[str, nn.Linear | nn.Embedding]:
    """Linear layers and word embeddings by name, without the heads and without tables too short to be cut."""
    return {
        name: module
        for name, module in model.named_modules()
        if name not in heads
        and (
            isinstance(module, nn.Linear)
            or (isinstance(module, nn.Embedding) and module.num_embeddings > 4 * module.embedding_dim)
        )
    }


@torch.no_grad()
def moments(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], names: Iterable[str]) -> Moments:
    """Second moments of what the named modules read in eval mode, padding left out; the model stays as it was."""
    modules = dict(model.named_modules())
    found: Moments = {}
    mask = torch.empty(0)

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            rows = args[0] if args else next(iter(kwargs.values()))
            if isinstance(module, nn.Embedding):
                counted = rows[mask] if rows.shape == mask.shape else rows.flatten()
                found.setdefault(name, torch.zeros(module.num_embeddings, dtype=torch.float64))
                found[name] += torch.bincount(counted, minlength=module.num_embeddings)
                return
            kept = rows[mask] if rows.shape[:-1] == mask.shape else rows.flatten(0, -2)
            gram = (kept.T @ kept).double()
            found[name] = found[name] + gram if name in found else gram

        return add

    handles = [modules[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return found


def cholesky(gram: Tensor) -> Tensor:
    """S, lower, S Sᵀ = G in float64; G is shifted by its smallest eigenvalue where it is not positive definite."""
    gram = gram.double()
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        smallest = torch.linalg.eigvalsh(gram)[0]
        shift = (SHIFT * gram.diagonal().mean() - smallest).clamp_min(0)
        factor = torch.linalg.cholesky(gram + shift * torch.eye(len(gram), dtype=torch.float64))
    return factor


def factors(weight: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(down (rank, d_in), up (d_out, rank)) float64 whose product is the best weight of this rank.

    Best in the Frobenius norm, or with `gram` (d_in, d_in) in that of the outputs. Each half carries √Σ of the product:
    distillation, whose steps are of one size for all numbers, would break halves of different sizes, as those that the
    SVD of W S leaves are.
    """
    weight = weight.double()
    if gram is not None:
        root = cholesky(gram)
        left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
        right = torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)
        weight = (left[:, :rank] * values[:rank]) @ right
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    split = values[:rank].sqrt()
    return split[:, None] * right[:rank], left[:, :rank] * split


def embedding_factors(table: Tensor, rank: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(table (V, rank), up (d, rank)) whose product with the transpose is the best table of this rank.

    With `counts` (V,) rows weigh as often as their token was seen, plus one. Through the (d, d) moment: V is large.
    """
    table = table.double()
    weights = torch.ones(len(table), dtype=torch.float64) if counts is None else counts.double() + 1
    basis = torch.linalg.eigh(table.T @ (weights[:, None] * table)).eigenvectors.flip(1)[:, :rank]
    return table @ basis, basis


def factored(module: nn.Linear | nn.Embedding, rank: int, moment: Tensor | None = None) -> nn.Sequential:
    """The module as two thin ones; `moment` as in `Moments` makes it whitened SVD."""
    if isinstance(module, nn.Embedding):
        thin, up = embedding_factors(module.weight.detach(), rank, moment)
        first: nn.Module = nn.Embedding(module.num_embeddings, rank, padding_idx=module.padding_idx)
        second = nn.Linear(rank, module.embedding_dim, bias=False)
        pairs = ((first.weight, thin), (second.weight, up))
    else:
        down, up = factors(module.weight.detach(), rank, moment)
        first = nn.Linear(module.in_features, rank, bias=False)
        second = nn.Linear(rank, module.out_features, bias=module.bias is not None)
        pairs = ((first.weight, down), (second.weight, up))
        if module.bias is not None:
            pairs += ((second.bias, module.bias.detach()),)
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)
    return nn.Sequential(first, second)


def ranks_for(shapes: Mapping[str, tuple[int, int]], budget: int) -> dict[str, int]:
    """Ranks ⌊ρ m n / (m + n)⌋ with the largest ρ, the share kept of each weight, whose factors fit the budget.

    Raises ValueError if not even ranks of one fit.
    """

    def at(share: float) -> dict[str, int]:
        return {name: max(1, int(share * m * n / (m + n))) for name, (m, n) in shapes.items()}

    def cost(ranks: Mapping[str, int]) -> int:
        return sum(rank * sum(shapes[name]) for name, rank in ranks.items())

    low, high = 0.0, 1.0
    if cost(at(low)) > budget:
        raise ValueError(f"factors of rank one take {cost(at(low))} parameters, more than {budget}")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= budget else (low, middle)
    return at(low)


def svd(model: nn.Module, names: Iterable[str], total: int, found: Moments | None = None) -> nn.Module:
    """A copy whose named modules are factors, with at most `total` parameters in all; whitened with `found`."""
    student = copy.deepcopy(model)
    modules = dict(student.named_modules())
    chosen = {name: modules[name] for name in names}
    shapes = {name: tuple(module.weight.shape) for name, module in chosen.items()}
    rest = parameters(model) - sum(module.weight.numel() for module in chosen.values())
    for name, rank in ranks_for(shapes, total - rest).items():
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, factored(chosen[name], rank, None if found is None else found[name]))
    return student
