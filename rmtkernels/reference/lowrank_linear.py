"""Float64 oracle of lowrank_linear."""

from torch import Tensor


def lowrank_linear_ref(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rmtkernels.lowrank_linear` in float64, its result included."""
    y = (x.double() @ down.double().T) @ up.double().T
    return y if bias is None else y + bias.double()
