"""What a projection makes of a dense layer: which layers it can be applied to, and the factors it gives."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rmtkd.errors import ModelError
from rmtkernels.errors import RangeError, ShapeError

Side = Literal["input", "output"]


def refusal(module: nn.Module) -> str:
    """Why a module cannot be replaced by a projected layer; empty if it can."""
    if parametrize.is_parametrized(module):
        return "it has parametrizations: torch.nn.utils.parametrize.remove_parametrizations makes them permanent"
    kind = kind_of(module)
    if not kind:
        return f"a {type(module).__name__} is not an nn.Linear, nn.Embedding, nn.Conv2d or transformers' Conv1D itself"
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return "its weight is not a parameter but computed, as by pruning or weight_norm: make that permanent first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not of a floating dtype"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"its {module.groups} groups of channels would be mixed by a projection"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"there is no projected convolution with padding_mode={module.padding_mode!r}"
    if isinstance(module, nn.Embedding):
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"there is no projected embedding with {option}={getattr(module, option)!r}"
    return ""


def kind_of(module: nn.Module) -> str:
    """The class's name if it is one that can be projected, else nothing: a subclass may compute something else."""
    cls = type(module)
    if cls in (nn.Linear, nn.Embedding, nn.Conv2d):
        return cls.__name__
    # Named, not imported: transformers takes seconds to import, and who has a Conv1D has done it.
    return "Conv1D" if (cls.__module__, cls.__qualname__) == ("transformers.pytorch_utils", "Conv1D") else ""


def refuse_others(module: nn.Module, *kinds: str) -> None:
    """Raises ModelError unless the module is of one of these kinds and can be projected."""
    if reason := refusal(module):
        raise ModelError(f"cannot project this {type(module).__name__}: {reason}")
    if kind_of(module) not in kinds:
        raise ModelError(f"this needs a layer of class {' or '.join(kinds)}, got {type(module).__name__}")


def project_weight(weight: Tensor, basis: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """The two factors whose product is W P Pᵀ (input side) or P Pᵀ W (output side), computed in float64.

    Args:
        weight: W (d_out, d_in, ...); what follows the widths is the window of a convolution.
        basis: P (d_in, k) or (d_out, k) by side.
        side: "input" or "output".

    Returns:
        (k, d_in, ...) and (d_out, k, ...) of the weight's dtype, on its device, in memory of their own.

    Raises:
        RangeError, ShapeError: on bad arguments.
    """
    if side not in ("input", "output"):
        raise RangeError(f'side must be "input" or "output", got {side!r}')
    width = weight.shape[side == "input"]
    if basis.dim() != 2 or len(basis) != width or not 0 < basis.shape[1] <= width:
        raise ShapeError(f"the basis of this {side} must be ({width}, 1 … {width}), got {tuple(basis.shape)}")
    wide, vectors = weight.to(_precise(weight)), basis.detach().to(weight.device, _precise(weight))
    window = (1,) * (weight.dim() - 2)
    if side == "input":
        first, second = vectors.T.reshape(-1, width, *window), torch.einsum("oc...,ck->ok...", wide, vectors)
    else:
        first, second = torch.einsum("oc...,ok->kc...", wide, vectors), vectors.reshape(width, -1, *window)
    return _own(first, weight.dtype), _own(second, weight.dtype)


def project_bias(bias: Tensor | None, basis: Tensor, side: Side) -> Tensor | None:
    """b on the input side, P Pᵀ b on the output side; in memory of its own."""
    if bias is None or side == "input":
        return None if bias is None else bias.detach().clone()
    vectors = basis.detach().to(bias.device, _precise(bias))
    return _own(vectors @ (vectors.T @ bias.detach().to(vectors.dtype)), bias.dtype)


def product(second: Tensor, first: Tensor) -> Tensor:
    """(d_out, k, ...) and (k, d_in, ...) -> (d_out, d_in, ...), computed in float64 and rounded once."""
    precise = _precise(second)
    found = torch.einsum("ok...,kc...->oc...", second.detach().to(precise), first.detach().to(precise))
    return _own(found, second.dtype)


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # Apple's devices have no float64
