"""The windows of all running requests on the engine's device, allocated once, and one step of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigentrack.vllm.config import Watch
from eigentrack.vllm.slots import Push
from rmtkernels import DESCRIPTORS, SlidingWindow, spectrum_descriptors_

_TURNS = 4  # steps that may be under way at once, and one more


class Plan:
    """Where a step's rows come from and where they go, side by side in `packed`: one copy brings them to the device.

    Attributes:
        rows, slots: (S,) int64, of a push.
        takes_part, emptied: (S,) bool, by slot.
    """

    def __init__(self, slots: int, device: torch.device, pinned: bool = False) -> None:
        self.packed = torch.zeros(18 * slots, dtype=torch.uint8, device=device, pin_memory=pinned)
        rows, chosen, takes_part, emptied = self.packed.split([8 * slots, 8 * slots, slots, slots])
        self.rows, self.slots = rows.view(torch.int64), chosen.view(torch.int64)
        self.takes_part, self.emptied = takes_part.view(torch.bool), emptied.view(torch.bool)

    def write(self, push: Push) -> None:
        """On the host."""
        count = len(push.rows)
        self.rows.numpy()[:count] = push.rows
        self.slots.numpy()[:count] = push.slots
        for mask, marked in ((self.takes_part.numpy(), push.slots), (self.emptied.numpy(), push.emptied)):
            mask[:] = False
            mask[marked] = True


@dataclass(eq=False)
class Turn:
    """Host memory of one step: what goes to the device, what comes back, and when it has come."""

    plan: Plan
    values: Tensor  # (S, V) float32
    ready: "torch.cuda.Event | None"

    def read(self, slots: list[int]) -> list[list[float]]:
        """The values of these slots, once they are there."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.values.numpy()[slots].tolist()  # type: ignore[no-any-return]


class State:
    """S windows for each watched layer, the detector's memory of each, and room for one step.

    A step is of fixed shape: all slots are offered, a mask tells who takes part. The windows of slots that nobody holds
    are empty, so that they cost no spectrum. Nothing is allocated but what the detector's step returns, and nothing
    waits for the device. While the same requests go on, nothing is planned anew.
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
        self._flat = torch.zeros(slots, spectra * len(DESCRIPTORS), device=device)
        self._descriptors = self._flat.view(slots, spectra, len(DESCRIPTORS)).transpose(0, 1)
        self._eigenvalues = torch.zeros(spectra, slots, settings.window, device=device)
        self._stepper = None if watch.detector is None else watch.detector.stepper(device, settings)
        self._memory = None if self._stepper is None else self._stepper.start(slots)
        self._newest = self.windows.seen[:, 2:]
        self._skipped = torch.zeros(slots, 1, dtype=torch.bool, device=device)
        self._nan = torch.tensor(float("nan"), device=device)
        self._described = spectra * len(DESCRIPTORS) if watch.descriptors else 0
        self._plan = Plan(slots, device)
        self._values = torch.zeros(slots, 1 + self._described, device=device)
        self._turns = [self._turn(slots, device) for _ in range(_TURNS)]
        self._steps = 0
        self._planned: tuple[list[int], ...] = ()

    def _turn(self, slots: int, device: torch.device) -> Turn:
        if device.type != "cuda":
            return Turn(self._plan, torch.zeros_like(self._values), None)
        values = torch.zeros(self._values.shape, pin_memory=True)
        return Turn(Plan(slots, torch.device("cpu"), pinned=True), values, torch.cuda.Event())

    @property
    def nbytes(self) -> int:
        """What it takes on the device."""
        held = [self.windows.ring, self.windows.gram, self.windows.seen, self._gathered, self._residual, self._offered]
        held += [self._plan.packed, self._flat, self._eigenvalues, self._values]
        held += [] if self._memory is None else [self._memory]
        return sum(tensor.nbytes for tensor in held)

    def begin(self, push: Push) -> None:
        """A pass that brings these rows is about to run."""
        if (push.rows, push.slots, push.emptied) != self._planned:
            self._follow(push)

    def _follow(self, push: Push) -> None:
        """Brings the plan to the device, and looks up where the rows are copied to."""
        plan, count = self._turns[self._steps % _TURNS].plan, len(push.rows)
        plan.write(push)
        if plan is not self._plan:
            self._plan.packed.copy_(plan.packed, non_blocking=True)
        self._planned, self._count = (push.rows, push.slots, push.emptied), count
        in_order = list(range(count))  # of rows where all requests decode; of slots while none has changed hands
        self._rows = None if push.rows == in_order else self._plan.rows[:count]
        self._slots = None if push.slots == in_order else self._plan.slots[:count]
        self._staged = (self._offered if self._slots is None else self._gathered)[:, :count]
        self._staged_rows = self._staged.unbind()

    def collect(self, layer: int, parts: Sequence[Tensor]) -> None:
        """Copies the wanted rows of a block's output, whose sum is the residual stream; later they are overwritten."""
        count, staged = self._count, self._staged_rows[layer]
        if self._rows is not None:
            torch.index_select(parts[0], 0, self._rows, out=staged)
            for part in parts[1:]:
                staged.add_(torch.index_select(part, 0, self._rows, out=self._residual[:count]))
            return
        if len(parts[0]) > count:
            parts = [part[:count] for part in parts]
        if len(parts) > 1:
            torch.add(parts[0], parts[1], out=staged)
        else:
            staged.copy_(parts[0])

    @torch.inference_mode()
    def finish(self) -> Turn:
        """One push, one call for the descriptors and one step of the detector for all rows collected.

        It may run in another thread, as long as nothing else is asked of this object meanwhile.
        """
        windows, plan = self.windows, self._plan
        if self._slots is not None:
            self._offered.index_copy_(1, self._slots, self._staged)
        if self._planned[2]:
            windows.reset(plan.emptied)
            if self._memory is not None:
                self._memory.masked_fill_(plan.emptied[:, None], 0)
        windows.update(self._offered_rows, plan.takes_part)
        spectrum_descriptors_(
            self._descriptors,
            self._eigenvalues,
            windows.gram,
            windows.rows,
            self._width,
            joint=self._joint,
            **self._how,  # type: ignore[arg-type]
        )
        torch.lt(self._newest, 0, out=self._skipped)  # who takes no part, and rows that were not finite
        turn = self._turns[self._steps % _TURNS]
        values = turn.values if turn.ready is None else self._values
        if self._stepper is not None:
            assert self._memory is not None
            risk, self._memory = self._stepper(self._flat, self._memory, self._skipped)
            torch.where(self._skipped, self._nan, risk, out=values[:, :1])
        if self._described:
            torch.where(self._skipped, self._nan, self._flat, out=values[:, 1:])
        if turn.ready is not None:
            turn.values.copy_(values, non_blocking=True)
            turn.ready.record()
        self._steps += 1
        return turn
