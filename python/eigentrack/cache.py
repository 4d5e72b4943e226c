"""Which text a forward pass continues, told from its key-value cache. The cache is looked at, never touched."""

import weakref
from typing import Any

from torch import Tensor

from eigentrack.errors import UnsupportedGenerationError


class CacheThread:
    """The cache of the running request, and how many tokens it should hold by the next pass."""

    def __init__(self, cache: Any, length: int, batch: int) -> None:
        self.cache = None if cache is None else weakref.ref(cache)
        self.length = length
        self.batch = batch
        self.keys: weakref.ref[Tensor] | None = None

    def remember(self) -> None:
        """After a pass: takes note of the tensor that holds the keys. Only a pass may replace it."""
        keys = None if self.cache is None else _keys(self.cache())
        self.keys = None if keys is None else weakref.ref(keys)

    def follows(self, cache: Any, length: int, batch: int) -> bool:
        """Whether a pass with this cache continues the request.

        Raises:
            UnsupportedGenerationError: if somebody moved the cache's sequences or took tokens back since the last pass.
        """
        if batch != self.batch or (self.cache is not None and self.cache() is not cache):
            return False
        if self.keys is not None and self.keys() is not _keys(cache):
            raise UnsupportedGenerationError(
                "the key-value cache was changed between two steps, as beam search, assisted decoding and crop() do; "
                "EigenTrack does not follow that: generate with num_beams=1 and no assistant, or with a fresh cache"
            )
        return length == self.length


def _keys(cache: Any) -> Tensor | None:
    """The first tensor of keys in a transformers cache."""
    found = (getattr(layer, "keys", None) for layer in getattr(cache, "layers", ()))
    return next((keys for keys in found if isinstance(keys, Tensor)), None)
