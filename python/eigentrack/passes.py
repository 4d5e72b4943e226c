"""What a forward pass is given, as far as the monitor asks."""

from typing import Any, NamedTuple

from torch import Tensor


class Pass(NamedTuple):
    """Of one forward pass. `cache` is None inside a compiled graph; the other fields are known there too."""

    cache: Any
    fed: Tensor | None  # (B, T) tokens or (B, T, D) embeddings; None if the model takes neither
    has_ids: bool
    mask: Tensor | None  # (B, T) attention mask, or the (B, 1, T, K) one made of it
    keys: Tensor | None  # of the cache's first layer
    length: int  # tokens in the cache, -1 if `on_device` holds it
    on_device: Tensor | None
    candidates: int  # how many of the tokens, the last ones, the model is asked to judge
    cached: bool  # whether the model was to keep a cache
