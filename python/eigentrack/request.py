"""The text that the model is working on: which passes continue it, and which of their rows are watched."""

import torch
from torch import Tensor

from eigentrack.cache import CacheThread, CacheView
from eigentrack.errors import TapError, UnsupportedGenerationError, UnsupportedModelError
from eigentrack.passes import Pass


class Request:
    """Follows one request after the other, pass by pass.

    Attributes:
        number: how many requests have begun.
        decoding: whether the running pass feeds one token behind the request's cache (and candidates behind that).
        candidates: how many rows of the running pass are candidates.
        ids: (B, T) tokens of the running pass, or None.
    """

    def __init__(self, end_tokens: list[int], prompt_too: bool) -> None:
        self.number = 0
        self.decoding = False
        self.candidates = 0
        self.ids: Tensor | None = None
        self.alive: Tensor | None = None  # (B,) bool: not over yet
        self._end_tokens = end_tokens
        self._prompt_too = prompt_too
        self._thread = CacheThread()
        self._mask: Tensor | None = None
        self._shape: tuple[int, int] = (0, 0)

    def begin_pass(self, given: Pass, view: CacheView) -> bool:
        """Whether the pass begins another request.

        Raises:
            UnsupportedGenerationError: if the pass cannot be followed.
        """
        batch, steps = self._shape = (0, 0) if given.fed is None else (given.fed.shape[0], given.fed.shape[1])
        self.candidates = given.candidates if given.candidates < steps else 0
        self.ids = given.fed if given.has_ids else None
        certain = steps - self.candidates
        follows = self._thread.follows(view, batch)
        self.decoding = follows and certain == 1
        if not (self.decoding or self._prompt_too or given.cached):
            raise UnsupportedGenerationError(
                "without a key-value cache every step feeds the whole text again: generate with use_cache=True, "
                'or watch single passes with start="prompt"'
            )
        begins = not follows or not (self.decoding or self._prompt_too)
        if begins:
            self.alive = None
            if given.fed is not None:
                self._begin(batch, given.fed.device)
        if not self.decoding:
            if not begins:
                self.alive.fill_(True)  # type: ignore[union-attr]  # a new turn: everybody takes part again
            self._mask = self._prompt_mask(given.mask, view.length, batch, steps) if self._prompt_too else None
        self._thread = CacheThread(None if view.length is None else view.length + steps, batch)
        return begins

    @torch.inference_mode(False)  # what outlives a pass must not be an inference tensor
    def _begin(self, batch: int, device: torch.device) -> None:
        self.number += 1
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self._column = self.alive[:, None]
        self._ends = torch.tensor(self._end_tokens, dtype=torch.int64, device=device)
        self._ending = frozenset(self._end_tokens)
        # Scratch of row_mask, so that a decode step allocates nothing.
        self._differs = torch.empty(batch, len(self._end_tokens), dtype=torch.bool, device=device)
        self._goes_on = torch.empty(batch, dtype=torch.bool, device=device)

    def end_pass(self, view: CacheView) -> None:
        """Takes note of the cache as the pass left it.

        Raises:
            UnsupportedModelError: if the answer was to be watched and the model keeps no cache.
            UnsupportedGenerationError: if candidates were fed in a compiled graph.
        """
        if view.cache is None and view.keys is None and not self._prompt_too:
            raise UnsupportedModelError(
                "the model returned no key-value cache, as encoders do, so its answer cannot be told from its prompt: "
                'use start="prompt"'
            )
        if self.candidates and view.cache is None and view.keys is not None:
            raise UnsupportedGenerationError(
                "assisted decoding of a compiled model cannot be followed: its graph does not show the cache that "
                "rejected tokens are taken from; generate without an assistant, or without torch.compile"
            )
        self._thread.remember(view)

    @property
    def length(self) -> int:
        """Tokens in the cache after the running pass."""
        assert self._thread.length is not None
        return self._thread.length

    def cache_holds(self, length: int) -> None:
        """So many tokens are left in the cache after candidates have been judged."""
        self._thread.length = length

    def missed_passes(self) -> bool:
        """Whether the cache has grown since the last pass that was seen; False where only a device knows."""
        thread = self._thread
        return thread.has_grown() and thread is self._thread  # else another thread's pass is running by now

    def forget(self) -> None:
        """The next pass begins a request."""
        self._thread, self.ids, self._mask = CacheThread(), None, None

    def end(self, ended: Tensor) -> None:
        """Sequences that are over: what is fed to them from now on is not watched."""
        assert self.alive is not None
        self.alive.logical_and_(~ended.to(self.alive.device))

    def split(self, rows: Tensor) -> tuple[int, int]:
        """How many of the rows are certain, and how many are candidates behind them.

        Raises:
            TapError: if the rows are not those of the tokens that the model was fed.
        """
        if self.alive is None:  # the model takes neither tokens nor embeddings: the rows say how many there are
            self._begin(rows.shape[0], rows.device)
        elif rows.shape[:2] != self._shape:
            raise TapError(
                f"a watched module returned rows {tuple(rows.shape[:2])}, but the model was fed {tuple(self._shape)} "
                "tokens: watch modules that return a row per token"
            )
        return rows.shape[1] - self.candidates, self.candidates

    def tokens(self, t: int) -> Tensor | None:
        """(B, 1) tokens of row t, or None."""
        return self.ids if self.ids is None or self._shape[1] == 1 else self.ids[:, t : t + 1]

    def row_mask(self, t: int) -> Tensor | None:
        """(B, 1) bool: sequences whose row t is watched; None for all. Neither padding is, nor what follows an end."""
        if self.decoding:
            return self.go_on(self.tokens(t))
        return None if self._mask is None else self._mask[:, t : t + 1]

    def go_on(self, ids: Tensor | None) -> Tensor:
        """(B, 1) bool: sequences that go on with these (B, 1) tokens of the answer."""
        assert self.alive is not None
        # On the CPU one look at the tokens, most often none of them an end, spares three operators on cold caches.
        if ids is not None and not (ids.is_cpu and self._ending.isdisjoint(token for (token,) in ids.tolist())):
            torch.ne(ids, self._ends, out=self._differs)
            torch.all(self._differs, 1, out=self._goes_on)
            self.alive.logical_and_(self._goes_on)
        return self._column

    def _prompt_mask(self, mask: Tensor | None, past: int | None, batch: int, steps: int) -> Tensor | None:
        """(B, T) bool: no padding. From the mask of tokens, or from where each token may look at itself.

        Raises:
            UnsupportedGenerationError: if there is a mask that does not show it, and more than one sequence.
        """
        if mask is None:
            return None
        if not steps:  # neither tokens nor embeddings are known: the mask is as long as the rows will be
            return mask.bool() if mask.dim() == 2 else None
        if mask.dim() == 2:
            behind = past is not None and mask.shape[1] > past + steps  # columns for tokens that are yet to come
            return (mask[:, past : past + steps] if behind else mask[:, -steps:]).bool()  # type: ignore[operator]
        if mask.dim() == 4 and past is not None and mask.shape[2] == steps and mask.shape[3] >= past + steps:
            own = mask.diagonal(past, 2, 3)[:, 0]
            return own if own.dtype == torch.bool else own == 0
        if batch > 1:
            raise UnsupportedGenerationError(
                f'start="prompt" cannot tell padding from an attention mask of shape {tuple(mask.shape)}: use '
                'start="answer", or one sequence at a time'
            )
        return None
