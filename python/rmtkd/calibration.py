"""Calibration: second moments of a model's activations, from forward passes that leave the model as it was."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from rmtkd import processes
from rmtkd.errors import CalibrationError, ModelError
from rmtkd.groups import Group, Tap
from rmtkd.progress import PATIENCE
from rmtkernels import StreamingCovariance
from rmtkernels.errors import RmtkernelsError

Batch: TypeAlias = Mapping[str, Any] | Sequence[Any] | Tensor  # Mapping has kin (BatchEncoding) that are no dict

T = TypeVar("T")


def calibrate(
    model: nn.Module, batches: Iterable[Batch], groups: Sequence[Group], *, rows: int, progress: bool = True
) -> dict[str, StreamingCovariance]:
    """Mean and scatter of each group's activations; the paper's moment is `covariance(center=False)` of a result.

    A row is a token, an image position or an element of a batch: of a (B, C, H, W) activation, unless a Linear made or
    takes it, every position is a row of C; else the last dimension is the row. Where a batch has an `attention_mask`
    of an activation's leading shape, what it masks out does not count.

    Groups have different numbers of rows in a batch (several taps, image sizes). Each takes the same share of its rows,
    drawn at random from fixed seeds, of as many batches as the slowest group needs, so that none is calibrated on the
    first few texts alone. For that the first batch runs twice.

    Args:
        model: in any mode; it runs in eval mode without gradients. Its weights, modes and hooks and the random state
            are the same afterwards, whatever happens.
        batches: mappings (the model's keyword arguments), tuples or lists (its arguments) or tensors (its argument), on
            any device. Read until every group has enough rows.
        groups: what to tap, see `Group`.
        rows: wanted per group. A group gets fewer if the batches end, and at most one batch more.
        progress: whether to show a bar if it takes longer than two seconds.

    Returns:
        A float64 state per `Group.name`, on the device of the activations.

    Raises:
        ModelError: if a group taps a module that the model does not have.
        CalibrationError: if there are no batches, the model does not take one, a tapped module did not run or gave no
            activations, the taps of a group differ in width, or activations are not finite.
    """
    if not groups:
        raise CalibrationError("there is nothing to calibrate: no groups were given")
    recorders = {group.name: _Recorder(group) for group in groups}
    with as_it_was(model), ExitStack() as hooks:
        iterator = iter(batches)
        first = next(iterator, None)
        if first is None:
            raise CalibrationError("there are no calibration batches")
        counting = _Pass()
        for group in groups:
            for tap in group.taps:
                hooks.enter_context(_hook(model, tap, recorders[group.name], counting))
        run(model, first, counting)
        _share_out(recorders.values(), rows)
        mine = processes.every(enumerate(chain([first], iterator)))
        wanted = math.ceil(rows / processes.count())
        for number, batch in _with_bar(mine, recorders.values(), wanted, progress and processes.first()):
            for recorder in recorders.values():
                recorder.draw_for(number)
            run(model, batch, counting)
            for recorder in recorders.values():
                recorder.full = recorder.rows >= wanted
            if all(recorder.full for recorder in recorders.values()):
                break
    return {name: recorder.result() for name, recorder in recorders.items()}


def run(model: nn.Module, batch: Batch, running: "_Pass | None" = None) -> Any:
    """What the model returns for a batch moved to its device.

    Raises:
        CalibrationError: if the model does not take it.
    """
    parameter = next(chain(model.parameters(), model.buffers()), None)
    batch = move_to(batch, torch.device("cpu") if parameter is None else parameter.device)
    if running is not None:
        running.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except (RmtkernelsError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CalibrationError(
            f"the model does not take this batch: {error}. A batch is a mapping of the model's keyword arguments, a "
            "tuple of its arguments (without labels, if it takes none), or a tensor"
        ) from error


def move_to(batch: Any, device: torch.device | str) -> Any:
    """The batch with its tensors on the device: mappings as dict, tuples and lists as such, the rest as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: move_to(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)([move_to(value, device) for value in batch])
    return batch


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every module's mode and PyTorch's random state as before."""
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng(range(torch.cuda.device_count())), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


class _Pass:
    """What hooks know of the running pass: the batch's attention mask, if it has one."""

    mask: Tensor | None = None


class _Recorder:
    """Collects the rows of a group; first it only counts them, to learn what share of a batch to take."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.per_batch = 0
        self.share = 0.0  # 0 while counting
        self.full = False
        self.state: StreamingCovariance | None = None
        self._generator = torch.Generator()

    def draw_for(self, number: int) -> None:
        """The rows drawn of a batch depend on its number alone, so they are the same whoever gets the batch."""
        self._generator.manual_seed(number)

    def take(self, tap: Tap, rows: Tensor, mask: Tensor | None) -> None:
        if self.full:
            return
        valid = len(rows) if mask is None else int(mask.sum())
        if self.share == 0:
            self.per_batch += valid
            if self.state is None:
                self.state = StreamingCovariance(rows.shape[1], dtype=torch.float64, device=rows.device)
            return
        if self.share < 1 and valid:
            kept = torch.arange(len(rows)) if mask is None else mask.cpu().nonzero().flatten()
            chosen = torch.randperm(valid, generator=self._generator)[: max(1, round(self.share * valid))]
            rows, mask = rows[kept[chosen.sort().values].to(rows.device)], None
        if self.group.scaled:
            rows = rows.double()
            rows = rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        if self.state is None:  # a tap that did not run in the first batch
            self.state = StreamingCovariance(rows.shape[1], dtype=torch.float64, device=rows.device)
        if rows.shape[1] != len(self.state.mean):
            raise CalibrationError(
                f"the taps of {self.group.name} differ in width: {rows.shape[1]} at {tap.module}, "
                f"{len(self.state.mean)} before"
            )
        self.state.update(rows, mask=mask)
        if self.state.rejected:
            raise CalibrationError(f"activations at {tap.module} are not finite; is the model in half precision?")

    @property
    def rows(self) -> int:
        return 0 if self.state is None else self.state.rows

    def result(self) -> StreamingCovariance:
        """Of all processes."""
        if self.state is not None and processes.count() > 1:
            self.state.all_reduce()
        if self.state is None or not self.state.rows:  # every batch after the first look was masked out
            raise CalibrationError(f"no activations reached {self.group.name}")
        return self.state


def _share_out(recorders: Iterable[_Recorder], rows: int) -> None:
    """Sets the share of its rows that each group takes of a batch: all of them for the group that has fewest."""
    fewest = min(recorders, key=lambda recorder: recorder.per_batch)
    if fewest.per_batch == 0:
        taps = ", ".join(tap.module for tap in fewest.group.taps[:3])
        raise CalibrationError(
            f"no activations of {fewest.group.name} in the first batch: did {taps} run, and is the mask not all zeros?"
        )
    for recorder in recorders:
        recorder.share = fewest.per_batch / recorder.per_batch


@contextmanager
def _hook(model: nn.Module, tap: Tap, recorder: _Recorder, running: _Pass) -> Iterator[None]:
    try:
        module = model.get_submodule(tap.module)
    except AttributeError as error:
        raise ModelError(f"the model has no module {tap.module!r}") from error

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        recorder.take(tap, *_rows(module, tap, given[0] if given else None, running.mask))

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        recorder.take(tap, *_rows(module, tap, result, running.mask))

    if tap.side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _rows(module: nn.Module, tap: Tap, found: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(n, d) activations of a tap, and which of them count (None: all)."""
    activation = found
    if not isinstance(activation, Tensor) and found is not None:
        activation = found[0]  # of a tuple, or of a ModelOutput
    if not isinstance(activation, Tensor) or not activation.is_floating_point() or activation.dim() < 2:
        kind = (
            f"{activation.dtype} of shape {tuple(activation.shape)}" if isinstance(activation, Tensor) else type(found)
        )
        raise CalibrationError(f"the {tap.side} of {tap.module} is no activation: {kind}")
    if activation.dim() == 4 and not isinstance(module, nn.Linear):
        activation = activation.movedim(1, -1)
    leading = activation.shape[:-1]
    rows = activation.reshape(-1, activation.shape[-1])
    if mask is None or leading not in (mask.shape, (mask.numel(),)):
        return rows, None
    return rows, mask.reshape(-1) != 0


def _with_bar(batches: Iterable[T], recorders: Iterable[_Recorder], rows: int, progress: bool) -> Iterator[T]:
    """The batches, and a bar of the rows that the slowest group has so far."""
    from tqdm.auto import tqdm

    with tqdm(total=rows, desc="calibrating", unit="row", delay=PATIENCE, disable=not progress) as bar:
        for batch in batches:
            yield batch
            least = min(recorder.rows for recorder in recorders)
            bar.update(min(least, rows) - bar.n)
