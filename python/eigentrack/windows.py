"""The windows of one request, and the history of what they showed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigentrack.detector import Detector
from eigentrack.files import Settings
from eigentrack.history import History
from eigentrack.network import Stepper
from rmtkernels import DESCRIPTORS, SlidingWindow, spectrum_descriptors_


class Snapshot(NamedTuple):
    """Where windows, history and the detector stood; without a history, they were empty."""

    history: History | None
    steps: int
    state: dict[str, Tensor]
    memory: Tensor | None = None


class Windows:
    """One window per tap and sequence, as large as the first row says.

    Args:
        taps: how many rows make a step.
        settings: of the monitor.
        detector: gives each step a risk.
        options: `center`, `joint`, `normalize` and `noise` of `rmtkernels.spectrum_descriptors`.
    """

    def __init__(self, taps: int, settings: Settings, detector: Detector | None, **options: Any) -> None:
        self.history: History | None = None
        self._taps = taps
        self._settings = settings
        self._detector = detector
        self._options = options
        self._stepper: Stepper | None = None
        self._memory: Tensor | None = None  # the detector's state
        self._state: SlidingWindow | None = None

    @property
    def steps(self) -> int:
        """Steps since the windows were empty."""
        return 0 if self.history is None else self.history.steps

    def push(self, rows: list[Tensor], tokens: Tensor | None, mask: Tensor | None) -> None:
        """One step: a (B, 1, D) hidden state per tap, (B, 1) tokens, and (B, 1) which sequences take part."""
        if self.history is None:
            self._allocate(rows[0])
        state, history = self._state, self.history
        assert state is not None and history is not None
        step = history.next_step()
        state.update(rows, mask)
        spectrum_descriptors_(
            history.descriptors[step],
            history.eigenvalues[step],
            state.gram,
            state.rows,
            rows[0].shape[2],
            **self._options,
        )
        history.seen[step].copy_(state.seen)
        if self._stepper is not None:
            flat = history.descriptors[step].transpose(0, 1).flatten(1)  # (S, B, F) -> (B, S * F)
            assert self._memory is not None
            risk, self._memory = self._stepper(flat, self._memory, state.seen[:, 2:] < 0)
            history.risk[step].copy_(risk[:, 0])
        if tokens is None:
            history.tokens[step].fill_(-1)
        else:
            history.tokens[step].copy_(tokens.select(1, 0))
        history.steps = step + 1

    def reset(self) -> None:
        """Empty windows, no history."""
        self.history = None
        if self._state is not None:
            self._state.reset()

    def release(self) -> None:
        """Gives back the windows' memory; the history stays, to be read."""
        self._state = None

    def snapshot(self) -> Snapshot:
        """To come back to with `restore`."""
        if self.history is None or self._state is None:
            return Snapshot(None, 0, {})
        return Snapshot(self.history, self.history.steps, self._state.state_dict(), self._memory)

    def restore(self, snapshot: Snapshot) -> None:
        """Forgets the steps since the snapshot."""
        self.reset()
        if snapshot.history is not None and self._state is not None:
            self.history = snapshot.history
            self.history.steps = snapshot.steps
            self._state.load_state_dict(snapshot.state)
            self._memory = snapshot.memory

    @torch.inference_mode(False)  # what outlives a pass must not be an inference tensor
    def _allocate(self, rows: Tensor) -> None:
        batch, window, device = rows.shape[0], self._settings.window, rows.device
        shape = (self._taps, batch, window, rows.shape[2])
        state = self._state
        known = None if state is None else (state.ring.shape, state.ring.dtype, state.ring.device)
        if known != (shape, rows.dtype, rows.device):
            self._state = SlidingWindow(*shape, dtype=rows.dtype, device=rows.device)
        spectra = self._taps if self._options["joint"] is None else 1
        if self._detector is not None:
            self._stepper = self._detector.stepper(device, self._settings)
            self._memory = self._stepper.start(batch)
        self.history = History(batch, spectra, len(DESCRIPTORS), window, device, risk=self._detector is not None)
