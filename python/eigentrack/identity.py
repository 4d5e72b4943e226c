"""Which language model a detector was trained for: what must be the same, and a fingerprint of its weights."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 8  # values of each parameter


@dataclass(frozen=True)
class ModelIdentity:
    """A language model, as far as it matters to a detector.

    Attributes:
        architecture: the config's `model_type`, or the class of a module without one.
        width, depth, vocabulary: of its config: hidden size, blocks, token ids; 0 where it does not say.
        tokenizer: hash of which id means what; "" if no tokenizer was given.
        weights: fingerprint of the parameters, in bfloat16, so that a model is the same in float32 and bfloat16.
    """

    architecture: str
    width: int
    depth: int
    vocabulary: int
    tokenizer: str
    weights: str

    @staticmethod
    def of(model: nn.Module, tokenizer: Any = None) -> "ModelIdentity":
        """Takes some milliseconds, and on a GPU one copy to the host."""
        return ModelIdentity.of_config(
            getattr(model, "config", None),
            type(model).__name__,
            tokenizer="" if tokenizer is None else tokenizer_hash(tokenizer),
            weights=fingerprint(model),
        )

    @staticmethod
    def of_config(config: Any, name: str = "", *, tokenizer: str = "", weights: str = "") -> "ModelIdentity":
        """From a config alone; `name` stands for a `model_type` that it does not tell."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config

        def number(*names: str) -> int:
            return next((int(value) for name in names if (value := getattr(text, name, None))), 0)

        return ModelIdentity(
            architecture=str(getattr(config, "model_type", None) or name),
            width=number("hidden_size", "n_embd", "d_model"),
            depth=number("num_hidden_layers", "n_layer", "num_layers"),
            vocabulary=number("vocab_size"),
            tokenizer=tokenizer,
            weights=weights,
        )

    def differences(self, other: "ModelIdentity") -> list[str]:
        """What makes a detector for this model useless on the other, in words; weights apart."""
        names = ["architecture", "width", "depth", "vocabulary"]
        if self.tokenizer and other.tokenizer:
            names.append("tokenizer")
        return [
            f"{name} {getattr(self, name)} and {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]


def tokenizer_hash(tokenizer: Any) -> str:
    """Of the vocabulary: the same for two tokenizers if each id means the same text in both; "" if it has none."""
    if not hasattr(tokenizer, "get_vocab"):
        return ""
    pairs = sorted((int(index), str(token)) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Of a few values of each parameter, and of all shapes: other weights differ, though not for certain a single one.

    Parameters without values (on the meta device) count with their shapes.
    """
    digest = hashlib.sha256()
    picked: dict[torch.device, list[Tensor]] = {}
    for parameter in model.parameters():
        digest.update(str(tuple(parameter.shape)).encode())
        if parameter.numel() and parameter.device.type != "meta":
            picked.setdefault(parameter.device, []).append(_some(parameter))
    for values in picked.values():
        together = torch.cat(values).to("cpu", torch.float32)
        digest.update(json.dumps(together.tolist()).encode())
    return digest.hexdigest()[:16]


def _some(parameter: Tensor) -> Tensor:
    """Values spread over a parameter, in bfloat16, without a copy of it."""
    flat = parameter.detach()
    while flat.dim() > 2:
        flat = flat[:, 0]
    for dimension in range(flat.dim()):
        flat = flat[(slice(None),) * dimension + (slice(None, None, max(flat.shape[dimension] // 4, 1)),)]
    return flat.flatten()[:: max(flat.numel() // SAMPLED, 1)][:SAMPLED].to(torch.bfloat16)
