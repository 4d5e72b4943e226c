"""What the narrowing of every family is made of: a smaller stock model, and layers written into it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rmtkd.errors import PlanError

# Linear and norm layers, whose weights and biases `nn.Module` types as tensors or modules; or a stock model.
Layer: TypeAlias = Any


@dataclass(frozen=True)
class Norm:
    """A norm layer of the wide model, the one that stands for it, and what it should give.

    Attributes:
        module: qualified name, the same in both models.
        projection: (d, k): the narrow norm's output should be the wide one's times this.
    """

    module: str
    projection: Tensor


@dataclass(frozen=True)
class Narrowed:
    """A narrower model, and its norm layers in the order of execution, which can be fitted."""

    model: Layer
    norms: tuple[Norm, ...]


def smaller(model: Layer, **settings: Any) -> Layer:
    """A model of the same class, dtype, device and flags, with other settings; its weights are to be overwritten."""
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        new = type(model)(config).to(device=model.device, dtype=model.dtype)
    new.train(model.training)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trained[name])
    if hasattr(model, "generation_config"):
        new.generation_config = copy.deepcopy(model.generation_config)
    return new


def write(layer: Layer, weight: Tensor, bias: Tensor | None = None) -> None:
    """Sets a layer's weight and, if it has one, its bias."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(bias)


def weight_of(layer: Layer) -> Tensor:
    return layer.weight.detach().double()  # type: ignore[no-any-return]


def bias_of(layer: Layer) -> Tensor:
    """The bias, or zeros where the layer has none."""
    if layer.bias is None:
        return torch.zeros(len(layer.weight), dtype=torch.float64, device=layer.weight.device)
    return layer.bias.detach().double()  # type: ignore[no-any-return]


def width_of(widths: Mapping[str, int], name: str, full: int, multiple: int = 1) -> int:
    """The width a plan gives a setting of the model's config, the full one if it gives none.

    Raises:
        PlanError: if the model cannot have it.
    """
    width = widths.get(name, full)
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= full:
        raise PlanError(f"{name} must be a whole number from 1 to {full}, what it is now, got {width!r}")
    if width % multiple:
        raise PlanError(f"{name} must be a multiple of {multiple}, got {width}: round the ranks to it")
    return width


def moment_of(covariances: Mapping[str, Tensor], name: str, dim: int) -> Tensor:
    """The float64 second moment of a group.

    Raises:
        PlanError: if there is none of this width.
    """
    moment = covariances.get(name)
    if moment is None or moment.shape != (dim, dim):
        found = "none" if moment is None else f"one of shape {tuple(moment.shape)}"
        raise PlanError(f"the group {name} needs a ({dim}, {dim}) second moment, got {found}: plan for this model")
    if not moment.isfinite().all():
        raise PlanError(f"the second moment of {name} is not finite: calibrate anew")
    return moment.double()


def name_prefix(model: nn.Module, base: nn.Module) -> str:
    """What stands before the names of the base model's modules: "bert.", or nothing for a model without a head."""
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
