"""What transformers says of a text that vLLM has generated."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmtkernels import spectrum_descriptors, window_gram

WINDOW = 32
LAYERS = tuple(range(2, 30, 3))  # of the detector that the package ships


@torch.no_grad()
def descriptors(model: Any, prompt: list[int], answer: list[int], layers: Sequence[int] = LAYERS) -> Tensor:
    """(T - 1, F): of the answer's tokens but the last, from one pass over the whole text."""
    rows: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda module, args, output: rows.__setitem__(layer, output[0] if isinstance(output, tuple) else output)

    blocks = model.model.layers
    hooks = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        model(torch.tensor([prompt + answer]))
    finally:
        for hook in hooks:
            hook.remove()
    steps = len(answer) - 1
    found = []
    for layer in layers:
        hidden = rows[layer][:, len(prompt) : len(prompt) + steps].contiguous()
        gram, seen = window_gram(hidden, WINDOW)
        found.append(spectrum_descriptors(gram, seen[0], hidden.shape[2], normalize="rms")[0][0])
    return torch.stack(found, 1).flatten(1)


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative where values are above one."""
    return float(((found - expected).abs() / expected.abs().clamp(min=1)).max()) if len(expected) else 0.0
