"""Rows of tokens that the model is asked to judge, as assisted decoding feeds them: watched once they are accepted."""

from typing import Any

from torch import Tensor

from eigentrack.windows import Snapshot


class Candidates:
    """The last M rows of a pass, until the cache's length says how many of them were kept.

    Attributes:
        cache: held until they are judged; after the last pass nobody else would.
        pushed: how many of them are in the windows.
        before, alive: windows and sequences as they were before, if any are.
    """

    def __init__(self, rows: list[Tensor], ids: Tensor | None, length: int) -> None:
        self._rows = [row.clone() for row in rows]  # a view would keep the whole prompt's
        self._count = rows[0].shape[1]
        self._ids = None if ids is None else ids[:, -self._count :].clone()
        self._length = length
        self.cache: Any = None
        self.pushed = 0
        self.before: Snapshot
        self.alive: Tensor

    def held(self) -> int:
        """Tokens in the cache now, or as many as there must be if only candidates were taken back."""
        length = self._length if self.cache is None else int(self.cache.get_seq_length())
        return max(min(length, self._length), self._length - self._count)

    def accepted(self) -> int:
        """How many of them are still in the cache."""
        return self._count - (self._length - self.held())

    def tokens(self, t: int) -> Tensor | None:
        """(B, 1) tokens of row t, or None."""
        return None if self._ids is None else self._ids[:, t : t + 1]

    def row(self, t: int) -> list[Tensor]:
        """Row t, (B, 1, D) per tap."""
        return [row[:, t : t + 1] for row in self._rows]
