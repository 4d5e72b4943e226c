"""Descriptors of cached answers, as EigenTrack computes them, with the settings of the day; cached shard by shard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from rmtkernels import DESCRIPTORS, spectrum_descriptors, window_gram

LONGEST = 96  # of a window that is to hold the whole answer
SETTINGS: dict[str, dict[str, Any]] = {
    "window 32": {},
    "window 16": {"window": 16},
    "window 8": {"window": 8},
    "window 64": {"window": 64},
    "whole answer": {"window": LONGEST},
    "not centred": {"center": False},
    "rows as they are": {"normalize": None},
    "noise from the trace": {"noise": "trace"},
    "joint": {"joint": "trace"},
    "joint, window 16": {"joint": "trace", "window": 16},
    "joint, window 8": {"joint": "trace", "window": 8},
    "joint, window 64": {"joint": "trace", "window": 64},
}


def descriptors(hidden: Tensor, window: int = 32, normalize: str | None = "rms", **options: Any) -> Tensor:
    """(A, layers * F) of one answer's (A, layers, D) hidden states; (A, F) if joint. A column is layer by layer."""
    gram, seen = window_gram(hidden.transpose(0, 1), window)
    values, _ = spectrum_descriptors(gram, seen[0], hidden.shape[2], normalize=normalize, **options)
    return values.transpose(0, 1).flatten(1)


def names(layers: list[int], joint: bool = False) -> list[str]:
    """As `EigenTrack.names`."""
    return [
        f"{place}.{name}" for place in (["joint"] if joint else [f"layer{i}" for i in layers]) for name in DESCRIPTORS
    ]


def cached_descriptors(folder: Path, setting: str) -> list[Tensor]:
    """Of all answers of a set, in the order of its shards; without the embedding."""
    return cached(folder, setting, lambda hidden, _: descriptors(hidden[:, 1:], **SETTINGS[setting]))


def cached(folder: Path, name: str, make: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """`make(hidden, prompt)` of all answers of a set, in the order of its shards, kept beside them."""
    kept = folder / name.replace(" ", "-")
    kept.mkdir(parents=True, exist_ok=True)
    found: list[Tensor] = []
    for shard in tqdm(sorted(folder.glob("*.safetensors")), desc=name, unit="shard", leave=False):
        path = kept / shard.name
        if not path.exists() or path.stat().st_mtime < shard.stat().st_mtime:  # the shard was read again
            partial = path.with_suffix(".partial")
            save_file(_made(load_file(shard), make), partial)
            partial.rename(path)
        tensors = load_file(path)
        found += tensors["rows"].split(tensors["lengths"].tolist())
    return found


def _made(tensors: dict[str, Tensor], make: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    prompts = tensors["prompt"].split(tensors["prompt_lengths"].tolist())
    owners = torch.arange(len(prompts)).repeat_interleave(tensors["answers"]).tolist()
    answers = tensors["hidden"].split(tensors["lengths"].tolist())
    rows = [make(hidden, prompts[owner]) for hidden, owner in zip(answers, owners, strict=True)]
    return {"rows": torch.cat(rows), "lengths": tensors["lengths"]}
