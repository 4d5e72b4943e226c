"""The windows of all running requests on the engine's device, allocated once, and one step of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigentrack.vllm.config import Watch
from eigentrack.vllm.slots import Push
from rmtkernels import DESCRIPTORS, SlidingWindow, spectrum_descriptors_

_ROWS, _SLOTS, _TAKES_PART, _FRESH = range(4)
_TURNS = 4  # steps that may be under way at once, and one more


@dataclass(eq=False)
class Turn:
    """Host memory of one step: what goes to the device, what comes back, and when it has come."""

    plan: Tensor  # (4, S) int64
    values: Tensor  # (S, V) float32
    ready: "torch.cuda.Event | None"

    def wait(self) -> Tensor:
        """The values, once they are there."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.values


class State:
    """S windows for each watched layer, the detector's memory of each, and room for one step.

    A step is of fixed shape: all slots are offered, a mask tells who takes part. Nothing is allocated but what the
    detector's step returns, and nothing waits for the device.
    """

    @torch.inference_mode(False)  # it outlives the pass that it is made in
    def __init__(self, watch: Watch, device: torch.device) -> None:
        settings = watch.settings
        slots, layers, width = watch.slots, len(settings.taps), watch.width
        self._joint = settings.layer_scale if settings.spectra == "joint" else None
        self._how = {"center": settings.center, "normalize": settings.normalize, "noise": settings.noise}
        self._width = width
        self.windows = SlidingWindow(layers, slots, settings.window, width, dtype=watch.dtype, device=device)
        spectra = layers if self._joint is None else 1
        self._gathered = torch.zeros(layers, slots, width, dtype=watch.dtype, device=device)
        self._residual = torch.zeros(slots, width, dtype=watch.dtype, device=device)
        self._offered = torch.zeros(layers, slots, width, dtype=watch.dtype, device=device)
        self._offered_rows = list(self._offered.unbind())
        self._plan = torch.zeros(4, slots, dtype=torch.int64, device=device)
        self._takes_part, self._fresh, self._skipped = torch.zeros(3, slots, dtype=torch.bool, device=device)
        self._active = torch.zeros(slots, dtype=torch.int64, device=device)
        self._descriptors = torch.zeros(spectra, slots, len(DESCRIPTORS), device=device)
        self._flat = torch.zeros(slots, spectra, len(DESCRIPTORS), device=device)
        self._eigenvalues = torch.zeros(spectra, slots, settings.window, device=device)
        self._stepper = None if watch.detector is None else watch.detector.stepper(device, settings)
        self._memory = None if self._stepper is None else self._stepper.start(slots)
        self._described = spectra * len(DESCRIPTORS) if watch.descriptors else 0
        self._values = torch.zeros(slots, 1 + self._described, device=device)
        self._turns = [self._turn(slots, device) for _ in range(_TURNS)]
        self._steps = 0
        self._count, self._in_order = 0, False

    def _turn(self, slots: int, device: torch.device) -> Turn:
        pinned = device.type == "cuda"
        return Turn(
            torch.zeros(4, slots, dtype=torch.int64, pin_memory=pinned),
            torch.zeros(slots, self._values.shape[1], pin_memory=pinned),
            torch.cuda.Event() if pinned else None,
        )

    @property
    def nbytes(self) -> int:
        """What it takes on the device."""
        held = [self.windows.ring, self.windows.gram, self.windows.seen, self._gathered, self._residual, self._offered]
        held += [self._plan, self._active, self._descriptors, self._flat, self._eigenvalues, self._values]
        held += [] if self._memory is None else [self._memory]
        return sum(tensor.nbytes for tensor in held)

    def begin(self, push: Push) -> None:
        """A pass that brings these rows is about to run."""
        turn = self._turns[self._steps % _TURNS]
        plan, self._count = turn.plan.numpy(), len(push.rows)
        self._in_order = push.rows == list(range(self._count))  # as where all requests decode
        plan[_TAKES_PART:] = 0
        plan[_ROWS, : self._count] = push.rows
        plan[_SLOTS, : self._count] = push.slots
        plan[_TAKES_PART, push.slots] = 1
        plan[_FRESH, push.fresh] = 1
        self._plan.copy_(turn.plan, non_blocking=True)

    def collect(self, layer: int, parts: Sequence[Tensor]) -> None:
        """Copies the wanted rows of a block's output, whose sum is the residual stream; later they are overwritten."""
        count, kept = self._count, self._gathered[layer, : self._count]
        if self._in_order:
            torch.add(parts[0][:count], parts[1][:count] if len(parts) > 1 else 0, out=kept)
            return
        rows = self._plan[_ROWS, :count]
        torch.index_select(parts[0], 0, rows, out=kept)
        for part in parts[1:]:
            kept.add_(torch.index_select(part, 0, rows, out=self._residual[:count]))

    def finish(self) -> Turn:
        """One push, one call for the descriptors and one step of the detector for all rows collected."""
        windows, plan, count = self.windows, self._plan, self._count
        self._offered.index_copy_(1, plan[_SLOTS, :count], self._gathered[:, :count])
        torch.ne(plan[_TAKES_PART], 0, out=self._takes_part)
        torch.ne(plan[_FRESH], 0, out=self._fresh)
        windows.reset(self._fresh)
        windows.update(self._offered_rows, self._takes_part)
        torch.mul(windows.rows, plan[_TAKES_PART], out=self._active)  # the others' windows count as empty: no spectrum
        spectrum_descriptors_(
            self._descriptors,
            self._eigenvalues,
            windows.gram,
            self._active,
            self._width,
            joint=self._joint,
            **self._how,  # type: ignore[arg-type]
        )
        self._flat.copy_(self._descriptors.transpose(0, 1))
        torch.lt(windows.seen[:, 2], 0, out=self._skipped)  # of those that take part: rows that were not finite
        skipped = self._skipped[:, None]
        if self._stepper is not None:
            assert self._memory is not None
            self._memory.masked_fill_(self._fresh[:, None], 0)
            risk, memory = self._stepper(self._flat.flatten(1), self._memory, skipped)
            self._memory.copy_(memory)
            self._values[:, :1].copy_(risk)
        if self._described:
            self._values[:, 1:].copy_(self._flat.flatten(1))
        self._values.masked_fill_(skipped, float("nan"))
        turn = self._turns[self._steps % _TURNS]
        turn.values.copy_(self._values, non_blocking=True)
        if turn.ready is not None:
            turn.ready.record()
        self._steps += 1
        return turn
