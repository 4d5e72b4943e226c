"""Factor mode: linear layers, embeddings and convolutions of any model replaced by projected ones."""

import copy
from collections import defaultdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rmtkd.config import Config
from rmtkd.errors import ModelError, PlanError
from rmtkd.groups import Group, Tap
from rmtkd.modules import Projected, ProjectedConv2d, ProjectedEmbedding, ProjectedLinear
from rmtkd.projection import Side, kind_of, refusal
from rmtkd.rank import leading_eigenvectors

if TYPE_CHECKING:
    from rmtkd.plans import Plan


def groups(model: nn.Module, config: Config) -> list[Group]:
    """A group for each layer that `config.modules` names and that can be projected, in the model's order.

    Its one tap is on `config.side`; an embedding has only outputs. A module used under several names is one group.

    Raises:
        ModelError: if a pattern names no layer, or no layer that is named can be projected.
    """
    named = _named(model, config)
    reasons = _reasons(model)
    fit = [name for name in named if name not in reasons]
    if not fit:
        shown = "".join(f"\n  {name}: {reasons[name]}" for name in named[:5])
        raise ModelError(f"none of the {len(named)} layers that `modules` names can be projected:{shown}")
    modules = dict(model.named_modules())
    return [Group(name, (Tap(name, side_of(modules[name], config)),)) for name in fit]


def skipped(model: nn.Module, config: Config) -> dict[str, str]:
    """Why `groups` leaves out layers that `config.modules` names: the reason of each, by its qualified name."""
    reasons = _reasons(model)
    return {name: reasons[name] for name in _named(model, config) if name in reasons}


def side_of(module: nn.Module, config: Config) -> Side:
    """Which side of a layer is projected."""
    return "output" if kind_of(module) == "Embedding" or config.side == "output" else "input"


def parameters(module: nn.Module, rank: int, side: Side) -> tuple[int, int]:
    """How many the layer has, bias included, and how many it would have if it were projected to `rank`."""
    weight = module.get_parameter("weight")
    dense = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    first, second = (weight.shape[1], weight.shape[0])
    if kind_of(module) == "Conv2d":
        window = weight[0, 0].numel()
        first, second = (first, second * window) if side == "input" else (first * window, second)
    return dense, dense - weight.numel() + rank * (first + second)


def layer(model: nn.Module, name: str, basis: Tensor, side: Side, *, trainable: bool = False) -> Projected:
    """The projected form of one of the model's layers, in memory of its own; the model is not changed.

    Args:
        model: any.
        name: the layer's qualified name.
        basis: (width of that side, k), orthonormal columns.
        side: "input" or "output", see `Projected`; "output" of an embedding.
        trainable: whether the projection is trained as well.

    Raises:
        ModelError: if there is no such layer, or it cannot be projected.
        ShapeError, RangeError: if the basis or the side does not fit it.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the model has no module {name!r}") from error
    first = next(known for known, other in model.named_modules() if other is module)  # it may have several names
    if reason := _reasons(model).get(first):
        raise ModelError(f"{name or 'the model'} cannot be projected: {reason}")
    return _projected(module, basis, side, trainable)


def compress(model: nn.Module, plan: "Plan") -> nn.Module:
    """A new model with the plan's layers projected, and all else copied; the model given is not changed.

    A layer stays dense where the plan gives a reason to keep it, and where the two factors would have no fewer
    parameters than the weight: k (d_in + d_out) >= d_in d_out.

    Raises:
        PlanError: if the plan is for another mode or another model, or has lost its covariances.
    """
    if plan.config.mode != "factor":
        raise PlanError(f"this plan is for mode {plan.config.mode!r}, not 'factor'")
    found = dict(model.named_modules())
    reasons = _reasons(model)
    chosen = {entry.name: entry.rank for entry in plan.layers if not entry.keep_dense}
    for name, rank in chosen.items():
        _check_entry(found.get(name), name, rank, plan, reasons)
    replacements: dict[int, Any] = {}  # what deepcopy puts in a module's place, wherever the module is referred to
    for name, rank in chosen.items():
        module = found[name]
        side = side_of(module, plan.config)
        dense, projected = parameters(module, rank, side)
        if projected < dense:
            basis = leading_eigenvectors(plan.covariances[name], rank)
            replacements[id(module)] = _projected(module, basis, side, plan.config.trainable)
    return copy.deepcopy(model, replacements)


def _check_entry(module: nn.Module | None, name: str, rank: int, plan: "Plan", reasons: dict[str, str]) -> None:
    if module is None:
        raise PlanError(f"the plan has a layer {name!r} that the model does not have: it was made for another model")
    if reason := reasons.get(name) or refusal(module):
        raise PlanError(f"{name} cannot be projected: {reason}")
    if name not in plan.covariances:
        raise PlanError(f"the plan has no covariance of {name}: a plan read from JSON has none, make it anew")
    width, wanted = plan.covariances[name].shape[-1], _width(module, side_of(module, plan.config))
    if width != wanted or not 0 < rank <= wanted:
        raise PlanError(f"the plan has rank {rank} of {width} for {name}, whose width is {wanted}")


def _projected(module: nn.Module, basis: Tensor, side: Side, trainable: bool) -> Projected:
    kind = kind_of(module)
    if kind == "Embedding":
        return ProjectedEmbedding.from_dense(module, basis, side, trainable=trainable)
    if kind == "Conv2d":
        return ProjectedConv2d.from_dense(module, basis, side, trainable=trainable)
    return ProjectedLinear.from_dense(module, basis, side, trainable=trainable)


def _width(module: nn.Module, side: Side) -> int:
    """Of a layer's input or output."""
    weight = module.get_parameter("weight")
    transposed = kind_of(module) in ("Conv1D", "Embedding")
    return weight.shape[(side == "input") != transposed]


def _named(model: nn.Module, config: Config) -> list[str]:
    """Names of the layers that the patterns choose; patterns that only exclude choose from all."""
    layers = [name for name, module in model.named_modules() if _is_layer(module)]
    excluded = [pattern[1:] for pattern in config.modules if pattern.startswith("!")]
    wanted = [pattern for pattern in config.modules if not pattern.startswith("!")] or ["*"]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in layers):
            some = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
            raise ModelError(f"no layer of {type(model).__name__} matches {pattern!r}; its layers: {some or 'none'}")
    return [
        name
        for name in layers
        if any(fnmatchcase(name, pattern) for pattern in wanted)
        and not any(fnmatchcase(name, pattern) for pattern in excluded)
    ]


def _reasons(model: nn.Module) -> dict[str, str]:
    """Why layers cannot be replaced, by name; whatever is not here can."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    found = {}
    for name, module in model.named_modules():
        if _is_layer(module):
            others = {other for own in module.parameters(recurse=False) for other in owners[id(own)]} - {name}
            if reason := _reason(module, sorted(others)):
                found[name] = reason
    return found


def _is_layer(module: nn.Module) -> bool:
    """Whether it is one that factor mode is about, be it one that cannot be projected."""
    return isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d, Projected)) or kind_of(module) != ""


def _reason(module: nn.Module, tied: list[str]) -> str:
    if isinstance(module, Projected):
        return "it is projected already"
    if reason := refusal(module):
        return reason
    if tied:
        return f"it shares its parameters with {', '.join(tied)}: to project one would untie them, and save nothing"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
        return "it has hooks or a forward of its own, which would be lost: remove them first"
    return ""
