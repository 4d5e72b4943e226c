"""The staged loop: warm up, then calibrate, plan, project and distil until a rule says stop."""

import copy
import glob
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from rmtkd import calibration as calibrating
from rmtkd import factor, processes, width
from rmtkd.checkpoints import Checkpoints, Stage, State
from rmtkd.compression import compress
from rmtkd.config import Config
from rmtkd.errors import CalibrationError, ModelError
from rmtkd.planning import Plan, parameters, plan
from rmtkd.table import aligned, change, count
from rmtkd.training import fit, scored, seeded

AVERAGE_DECAY = 0.99  # of `teacher="average"`: over about the last hundred steps
Evaluate = Callable[[nn.Module], float]
Batches = Iterable[Mapping[str, Any]] | Dataset[Any]


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
        model: the smaller model, in eval mode.
        history: every stage, beginning with number 0, the model before any projection.
        reason: why the run stopped.
    """

    model: nn.Module
    history: tuple[Stage, ...]
    reason: str

    def table(self) -> str:
        """A line per stage, and the reason."""
        return f"{aligned(stage_rows(self.history))}\n{self.reason}"


def stage_rows(history: Sequence[Stage]) -> list[list[str]]:
    """Cells of a table of stages, its head first."""
    head = ["stage", "parameters", "change", "before", "projected", "distilled", "seconds", ""]
    rows = [
        [
            str(stage.number),
            count(stage.parameters),
            change(1, stage.kept),
            f"{stage.before:.4f}" if stage.number else "",
            f"{stage.projected:.4f}" if stage.number else "",
            f"{stage.score:.4f}",
            f"{stage.seconds:.0f}",
            "undone" if stage.undone else "" if stage.ranks or not stage.number else "no rank shrinks",
        ]
        for stage in history
    ]
    return [head, *rows]


def run(
    model: nn.Module,
    calibration: Iterable[calibrating.Batch],
    train: Batches,
    evaluate: Evaluate,
    config: Config,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Narrows a model in stages (arXiv 2509.15724; thesis 5.1 to 5.3): the paper's loop.

    If `config.baseline` is given, the model is first trained on its labels until its score reaches `warm_up` times the
    baseline. Each stage calibrates on the model as it is then, plans, projects, and distils from the model before
    the stage, or from the moving average of that model's training. In width mode every stage narrows the whole
    network; in factor mode stage i of n takes the i-th n-th of the layers, in the order in which they run.

    It stops after the stage that reaches `target_parameters`, or in which a rank would have fallen below `min_ratio`;
    when, in width mode, no rank shrinks; after `stages`; or when the score falls by more than `max_drop` below that of
    stage 0, in which case the model is that of the stage before.

    With a folder, every whole stage is written to it, and a run that was killed goes on from the last one when it is
    called again with the same arguments: on one thread, with the same bits in the end. That holds for what
    this function can seed: a loader's order may depend on PyTorch's, NumPy's and Python's random states and on its own
    generators, but not on how often it was read before. In factor mode `keep_slower` makes it hold, for otherwise
    the layers that stay dense are chosen by a measurement of time.

    Under torchrun every process calls this with the same arguments, and all end with the same model: of a batch to
    train on each takes an equal part, of the batches to calibrate on every n-th. All must see the folder. Without
    dropout and BatchNorm, and with all batches calibrated on (`calibration_rows`), the result is that of one process
    but for rounding.

    Args:
        model: a model with a head. It stays as it is.
        calibration: batches as for `rmtkd.plan`, readable several times.
        train: batches with labels, or a data set, as for `rmtkd.distill`.
        evaluate: score of a model, the higher the better; called in eval mode, without gradients.
        config: everything else.
        folder: of the checkpoints, "stage-0", "stage-1", ..., each a model that `rmtkd.load` reads; nothing is written
            without it.
        progress: whether to show bars, and the plan and a line per stage.

    Raises:
        ResumeError: if the folder holds a run of another model or other settings.
        FileFormatError: if its last stage cannot be read.
        CalibrationError, ModelError, TrainingError: as `rmtkd.plan` and `rmtkd.distill`. What `evaluate` raises goes
            through; the checkpoints stay whole.
    """
    if isinstance(calibration, Iterator):
        raise CalibrationError(
            "calibration must be readable several times, as a list or a DataLoader is; got an iterator"
        )
    progress = progress and processes.first()
    stages = _stages(model, calibration, config)
    checkpoints = None if folder is None else Checkpoints(folder, model, config)
    state = None if checkpoints is None else checkpoints.last()
    while state is None or not state.reason:
        with seeded(config.seed + (0 if state is None else len(state.history)), calibration):
            if state is None:
                state = _start(model, train, evaluate, config, progress)
            else:
                state = _next(state, stages, calibration, train, evaluate, progress)
        if progress:
            tqdm.write(str(state.history[-1]), file=sys.stderr)
        if checkpoints is not None:
            state = checkpoints.write(state)
    return Result(state.model, state.history, state.reason)


def _stages(model: nn.Module, calibration: Iterable[calibrating.Batch], config: Config) -> list[Config]:
    """The settings of each stage: in factor mode, each has its share of the layers."""
    if config.mode == "width":
        width.groups(model)  # refuses what it does not know
        return [config] * config.stages
    names = [group.taps[0].module for group in factor.groups(model, config)]
    names = _in_order(model, names, calibration)
    if not names:
        raise ModelError(f"no layer that {', '.join(config.modules)} names runs on a calibration batch")
    stages = min(config.stages, len(names))
    ends = [round(stage * len(names) / stages) for stage in range(stages + 1)]
    return [replace(config, modules=tuple(map(glob.escape, names[ends[i] : ends[i + 1]]))) for i in range(stages)]


def _in_order(model: nn.Module, names: Sequence[str], batches: Iterable[calibrating.Batch]) -> list[str]:
    """The modules that run on the first batch, in the order in which they first do."""
    seen: dict[str, None] = {}
    with ExitStack() as hooks, calibrating.as_it_was(model):
        batch = next(iter(batches), None)
        if batch is None:
            raise CalibrationError("there are no calibration batches")
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.setdefault(name))
            hooks.callback(handle.remove)
        calibrating.run(model, batch)
    return list(seen)


def _start(model: nn.Module, train: Batches, evaluate: Evaluate, config: Config, progress: bool) -> State:
    """A copy of the model, warmed up where the config asks for it."""
    begun = time.perf_counter()
    model = copy.deepcopy(model).eval()
    average = None
    score = scored(model, evaluate)
    enough = config.warm_up * config.baseline
    if config.baseline and score < enough:
        average = _average(model, config)
        fit(
            model,
            None,
            train,
            config,
            epochs=config.warm_up_epochs,
            label="warm up",
            evaluate=evaluate,
            enough=enough,
            after_step=None if average is None else average.update_parameters,
            progress=progress,
        )
        score = scored(model, evaluate)
    seconds = time.perf_counter() - begun
    start = Stage(0, {}, parameters(model), 1.0, score, score, score, seconds=seconds)
    return State(model, _averaged(average), (start,))


def _next(
    state: State,
    stages: Sequence[Config],
    calibration: Iterable[calibrating.Batch],
    train: Batches,
    evaluate: Evaluate,
    progress: bool,
) -> State:
    """The state after one more stage."""
    begun = time.perf_counter()
    number = len(state.history)
    first, last, config = state.history[0], state.history[-1], stages[number - 1]
    planned = plan(state.model, calibration, config, progress=progress)
    if progress:
        tqdm.write(planned.table(), file=sys.stderr)
    student = compress(state.model, planned, calibration)
    size = parameters(student)
    if size >= last.parameters:
        stage = replace(last, number=number, ranks={}, before=last.score, projected=last.score)
        stage = replace(stage, seconds=time.perf_counter() - begun)
        stop = config.mode == "width"
        reason = "no rank shrinks any more" if stop else _over(number, stages)
        return replace(state, history=(*state.history, stage), reason=reason, plan=None)
    projected = scored(student, evaluate)
    average = _average(student, config)
    fit(
        student,
        state.average or state.model,
        train,
        replace(config, seed=config.seed + number),
        epochs=config.epochs,
        label=f"stage {number}",
        after_step=None if average is None else average.update_parameters,
        progress=progress,
    )
    score = scored(student, evaluate)
    undone = score < first.score - config.max_drop
    stage = Stage(
        number,
        _ranks(planned),
        size,
        size / first.parameters,
        last.score,
        projected,
        score,
        undone,
        time.perf_counter() - begun,
    )
    reason = _reason(stage, first, planned) or _over(number, stages)
    history = (*state.history, stage)
    if undone:
        return replace(state, history=history, reason=reason, plan=None)
    return State(student, _averaged(average), history, reason, planned)


def _reason(stage: Stage, first: Stage, planned: Plan) -> str:
    """Why the run stops after this stage, other than that it was the last; "" if it does not."""
    config = planned.config
    if stage.undone:
        return (
            f"stage {stage.number} is undone: the score fell from {first.score:.4g} to {stage.score:.4g}, by more than "
            f"max_drop = {config.max_drop:g}"
        )
    if stage.kept <= config.target_parameters:
        return (
            f"the target is met: {stage.kept:.1%} of the parameters, target_parameters = {config.target_parameters:.1%}"
        )
    if less := _below(planned):
        return (
            f"stage {stage.number} reached min_ratio = {config.min_ratio:g}: {', '.join(less[:3])}"
            f"{' and others' if len(less) > 3 else ''} asked for less"
        )
    return ""


def _below(planned: Plan) -> list[str]:
    """What asked for less than `min_ratio`: layers, or settings that several groups share, by their mean share."""
    sharing = defaultdict(list)
    for layer in planned.layers:
        if not layer.keep_dense:
            sharing[layer.width or layer.name].append(layer.choice)
    return [
        name
        for name, choices in sharing.items()
        if fmean(choice.raw_rank / choice.dim for choice in choices)
        < planned.config.min_ratio * max(choice.support / choice.dim for choice in choices)
    ]


def _over(number: int, stages: Sequence[Config]) -> str:
    return f"all {len(stages)} stages are done" if number == len(stages) else ""


def _ranks(planned: Plan) -> dict[str, int]:
    if planned.config.mode == "width":
        shrunk = {layer.width for layer in planned.layers if layer.rank < layer.dim}
        return {name: width for name, width in planned.widths.items() if name in shrunk}
    return {layer.name: layer.rank for layer in planned.layers if not layer.keep_dense}


def _average(model: nn.Module, config: Config) -> AveragedModel | None:
    if config.teacher != "average":
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))


def _averaged(average: AveragedModel | None) -> nn.Module | None:
    return None if average is None else average.module.eval()
