"""Which text a forward pass continues, told from its key-value cache. The cache is looked at, never touched."""

import weakref
from typing import Any, NamedTuple

from torch import Tensor

from eigentrack.errors import UnsupportedGenerationError


class CacheView(NamedTuple):
    """What is seen of a cache at one moment."""

    cache: Any = None  # the object itself; None inside a compiled graph, which knows tensors only
    keys: Tensor | None = None  # of the first layer that has any
    length: int | None = 0  # tokens in it; None if only the device knows


class CacheThread:
    """The cache of the running request, and how many tokens it should hold by the next pass."""

    def __init__(self, length: int | None = 0, batch: int = 0) -> None:
        self.length = length
        self.batch = batch
        self.cache: weakref.ref[Any] | None = None
        self._address = 0
        self._left: int | None = None  # tokens that the last pass left in the cache, if the host knows

    def remember(self, view: CacheView) -> None:
        """After a pass: takes note of the cache and of the memory that holds its keys. Only a pass may replace it."""
        self._left = _known_length(view.cache)
        self.cache = None if view.cache is None else weakref.ref(view.cache)
        self._address = _address(view.keys)

    def has_grown(self) -> bool:
        """Whether there are tokens in the cache that no pass since has put there, as far as the host knows."""
        length = _known_length(self.cache()) if self.cache is not None else None
        return length is not None and self._left is not None and length > self._left

    def follows(self, view: CacheView, batch: int) -> bool:
        """Whether a pass with this cache continues the request.

        Raises:
            UnsupportedGenerationError: if somebody moved the cache's sequences or took tokens back since the last pass.
        """
        if batch != self.batch or self.length == 0 or view.length == 0:
            return False
        both = self.cache is not None and view.cache is not None
        if both and self.cache() is not view.cache:  # type: ignore[misc]
            return False
        if self.cache is None and not self._address:  # the pass before did not show its cache
            return view.length == self.length
        in_place = _address(view.keys) == self._address
        unread = self.length is None or view.length is None
        if (both or in_place) and not unread and view.length < self.length:  # type: ignore[operator]
            raise _changed()
        if not in_place and (both or view.length == self.length):
            raise _changed()
        return in_place and (unread or view.length == self.length)


def cache_of(output: Any) -> Any:
    """The key-value cache in a model's output, or None."""
    found = getattr(output, "past_key_values", None)
    if found is None and isinstance(output, tuple):
        for part in output:
            if hasattr(part, "get_seq_length"):
                return part
    return found


def keys_of(cache: Any) -> Tensor | None:
    """Keys of the cache's first layer that has any. torch.compile traces it."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor):
            return keys
    return None


def length_of(cache: Any) -> tuple[int, Tensor | None]:
    """Tokens in the cache: as a number, or -1 and the tensor that holds it. torch.compile traces it."""
    if cache is None:
        return 0, None
    length = cache.get_seq_length()
    return (-1, length) if isinstance(length, Tensor) else (length, None)


def read_length(length: int, on_device: Tensor | None, may_wait: bool) -> int | None:
    """The length as a number; None if it lies on a device that the host would have to wait for."""
    if on_device is None:
        return length
    return int(on_device) if may_wait or on_device.device.type == "cpu" else None


def _known_length(cache: Any) -> int | None:
    """Tokens in the cache; None if there is none, or if the host would have to wait for the number."""
    return read_length(*length_of(cache), may_wait=False) if hasattr(cache, "get_seq_length") else None


def _address(keys: Tensor | None) -> int:
    """Where the keys lie; crop() leaves them there, reordering does not. 0 for what has no memory of its own."""
    return keys.untyped_storage().data_ptr() if type(keys) is Tensor else 0


def _changed() -> UnsupportedGenerationError:
    return UnsupportedGenerationError(
        "the key-value cache was changed between two steps, as beam search and crop() do, and assisted decoding of a "
        "model whose forward takes no logits_to_keep; EigenTrack does not follow that: generate with num_beams=1 and "
        "no assistant, or with a fresh cache"
    )
