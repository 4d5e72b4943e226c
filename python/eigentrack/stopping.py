"""Ends sequences of `generate` by what the monitor sees. Imports transformers: to be imported when it is asked for."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

from eigentrack.errors import CallbackError, EigenTrackError, UnsupportedGenerationError
from eigentrack.history import History
from eigentrack.step import Step, read_step

if TYPE_CHECKING:
    from eigentrack.monitor import EigenTrack


class StopWhen(StoppingCriteria):
    """The stopping criterion of `EigenTrack.stop_when`: asks once per step watched after it was made;
    what has ended stays so until another turn."""

    def __init__(self, track: "EigenTrack", fn: Callable[[Step], bool | Tensor]) -> None:
        self.track, self.fn = track, fn
        self._request = -1
        self._asked = track.steps  # of a kept cache's earlier turns
        self._history: History | None = track._windows.history

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) bool on the device of `input_ids`: which sequences are over."""
        if not self.track._hooks:
            raise EigenTrackError("stop_when watches nothing here: call generate() inside the monitor's with block")
        if self._request != self.track._request.number:
            self._request = self.track._request.number
            self._ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        history = self.track._windows.history
        if history is not self._history:
            self._history, self._asked = history, 0
        alive = self.track._request.alive
        if history is not None and alive is not None:
            if len(alive) != len(self._ended):
                raise UnsupportedGenerationError(
                    f"stop_when watches a batch of {len(alive)}, but generate() asks about {len(self._ended)} "
                    "sequences: give the criterion to the model that the monitor is on, and no other"
                )
            self._ended &= ~alive.to(self._ended.device)  # in another turn all take part again
        while history is not None and self._asked < history.steps:
            step = read_step(history, self._asked, self.track._settings)
            self._asked += 1
            self._ended |= _verdict(self.fn(step), step).to(self._ended.device)
            self.track._request.end(self._ended)
            if self.track._windows.history is not history:  # the function called reset()
                break
        return self._ended.clone()


def _verdict(answer: object, step: Step) -> Tensor:
    """(B,) bool.

    Raises:
        CallbackError: if the function answered anything but a bool or one per sequence.
    """
    batch = len(step.watched)
    verdict = torch.tensor(answer) if isinstance(answer, bool | np.bool_) else answer
    if not isinstance(verdict, Tensor) or verdict.dtype != torch.bool or verdict.shape not in ((), (batch,)):
        got = f"{verdict.dtype} {tuple(verdict.shape)}" if isinstance(verdict, Tensor) else repr(answer)[:80]
        raise CallbackError(f"the function of stop_when must return a bool or a bool tensor ({batch},), got {got}")
    return verdict.expand(batch)
