"""Recordings and tokenizers made by hand, for what shows them."""

from typing import Any

import torch

from eigentrack import Recording, Settings
from rmtkernels import DESCRIPTORS


class Vocabulary:
    """A tokenizer whose token i is the text i."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(self.texts[int(token)] for token in ids)


def recording(steps: int, *, layers: int = 3, window: int = 4, batch: int = 1, risk: bool = True) -> Recording:
    """Random values; a window fills in its first steps, and what is not there yet is 0."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    eigenvalues = (10 * random(batch, steps, layers, window)).sort(dim=-1, descending=True).values
    there = torch.arange(window) <= torch.arange(steps)[:, None]
    settings = Settings(
        model="TinyForCausalLM",
        names=tuple(f"layer{3 * layer}.{name}" for layer in range(layers) for name in DESCRIPTORS),
        taps=tuple(f"layer{3 * layer}" for layer in range(layers)),
        layers=tuple(3 * layer for layer in range(layers)),
        window=window,
        spectra="per_layer",
        start="answer",
        normalize="rms",
        center=True,
        noise="median",
        layer_scale="trace",
        end_tokens=(),
    )
    tokens = torch.arange(steps).expand(batch, steps).clone()
    return Recording(
        random(batch, steps, layers * len(DESCRIPTORS)),
        eigenvalues * there[:, None, :],
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        settings,
        {"rmtkernels": "0", "torch": "0"},
        random(batch, steps) if risk else None,
    )
