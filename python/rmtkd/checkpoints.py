"""Checkpoints of a run: a folder per whole stage, and what run it is of."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtkd import files, processes
from rmtkd.config import Config
from rmtkd.errors import FileFormatError, ResumeError
from rmtkd.planning import Plan
from rmtkd.table import change, count

VERSION = 1
_KIND = "rmtkd run"
_RUN, _STAGE, _AVERAGE = "run.json", "stage.json", "average"


@dataclass(frozen=True)
class Stage:
    """What a stage did.

    Attributes:
        number: 0 is the model that the others start from, warmed up where the config asks for it.
        ranks: what was cut, and to what: in width mode settings of the model's config, in factor mode layers. Empty if
            no rank shrinks; the model is then the one before.
        parameters: of the model after the stage, also if that was undone.
        kept: `parameters` as a share of the first model's.
        before, projected, score: what `evaluate` said before the stage, after projection, and after distillation.
        undone: whether the model was put back to what it was before, because the score had fallen too far.
        seconds: that it took; not compared.
    """

    number: int
    ranks: dict[str, int]
    parameters: int
    kept: float
    before: float
    projected: float
    score: float
    undone: bool = False
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        if self.number == 0:
            return f"start: {count(self.parameters)} parameters, score {self.score:.4g}"
        if not self.ranks:
            return f"stage {self.number}: no rank shrinks"
        text = (
            f"stage {self.number}: {count(self.parameters)} parameters ({change(1, self.kept)}), score "
            f"{self.before:.4g}, projected {self.projected:.4g}, distilled {self.score:.4g}"
        )
        return text + ("; undone" if self.undone else "")


@dataclass(frozen=True)
class State:
    """Where a run stands after a whole stage.

    Attributes:
        model: in eval mode.
        average: its moving average over the stage's training; None if the run does without, or there was no training.
        history: the stages so far.
        reason: why the run has ended; "" while it goes on.
        plan: of the last stage, to be looked up; None before the first.
    """

    model: nn.Module
    average: nn.Module | None
    history: tuple[Stage, ...]
    reason: str = ""
    plan: Plan | None = None


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    A stage is written beside its place and renamed when it is whole, so that a process killed at any point leaves the
    stages before as they were. The state that the run goes on with is always the one read back: a run that was
    interrupted continues from the very same bits as one that was not.

    Args:
        folder: made if it is not there.
        model, config: as given to the run.

    Raises:
        ResumeError: if the folder holds a run of another model or other settings.
        FileFormatError: if what it holds is damaged or of a newer version.
    """

    def __init__(self, folder: str | Path, model: nn.Module, config: Config) -> None:
        self.folder, self.model, self.config = Path(folder), model, config
        mine = {"format": _KIND, "version": VERSION, "model": digest(model), "config": json.loads(config.to_json())}
        if processes.first() and not (self.folder / _RUN).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_whole(self.folder / _RUN, json.dumps(mine, indent=2))
        processes.wait()
        _refuse_another(self.folder, _read(self.folder / _RUN), mine)

    def last(self) -> State | None:
        """The state after the last whole stage.

        Raises:
            FileFormatError: if it cannot be read; with its folder deleted, the run goes on from the stage before.
        """
        numbers = [
            int(path.name.removeprefix("stage-"))
            for path in self.folder.glob("stage-*")
            if path.name.removeprefix("stage-").isdecimal()
        ]
        processes.wait()  # nobody writes a stage before all have looked
        return self._state(self.folder / f"stage-{max(numbers)}") if numbers else None

    def write(self, state: State) -> State:
        """Process 0 writes the state; all get it as it is read back."""
        whole = self.folder / f"stage-{state.history[-1].number}"
        if processes.first():
            self._write(state, whole)
        processes.wait()
        return self._state(whole)

    def _write(self, state: State, whole: Path) -> None:
        aside = self.folder / f".{whole.name}.partial"
        for left in self.folder.glob(".*stage-*"):  # by a process that was killed
            shutil.rmtree(left)
        files.save(state.model, aside, plan=state.plan, config=self.config)
        if state.average is not None:
            files.save(state.average, aside / _AVERAGE, plan=state.plan, config=self.config)
        frozen = [name for name, parameter in state.model.named_parameters() if not parameter.requires_grad]
        history = [asdict(stage) for stage in state.history]
        found = {"history": history, "reason": state.reason, "frozen": frozen}
        files.write_whole(aside / _STAGE, json.dumps(found, indent=2))
        aside.rename(whole)
        _sync(self.folder)

    def _state(self, folder: Path) -> State:
        found = _read(folder / _STAGE)
        try:
            history, reason = _history(found)
            frozen = set(found["frozen"])
        except (KeyError, TypeError) as error:
            raise FileFormatError(
                f"{folder / _STAGE} describes no stage ({error!r}): delete {folder} to go on from the stage before"
            ) from error
        average = self._load(folder / _AVERAGE, frozen) if (folder / _AVERAGE).exists() else None
        return State(self._load(folder, frozen), average, history, reason)

    def _load(self, folder: Path, frozen: set[str]) -> nn.Module:
        model = files.load(folder, model=self.model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.clone()  # safetensors maps the file: whoever wrote to it would write to the model
        device = next(self.model.parameters()).device
        return model.to(device).eval()


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's class and of the names, types, shapes and bits of its state."""
    found = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _refuse_another(folder: Path, found: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    if found.get("format") != _KIND:
        raise FileFormatError(f"{folder / _RUN} does not describe a run of rmtkd: give another folder")
    if found.get("version") != VERSION:
        raise FileFormatError(
            f"{folder} was written by version {found.get('version')!r:.20} of this format, this rmtkd goes on with "
            f"version {VERSION}: give another folder"
        )
    if found.get("model") != mine["model"]:
        raise ResumeError(f"{folder} holds a run that started from another model: give another folder")
    settings, others = mine["config"], found.get("config")
    if not isinstance(others, dict):
        raise FileFormatError(f"{folder / _RUN} is damaged: it holds no settings; give another folder")
    names = sorted({*settings, *others})
    if changed := [name for name in names if settings.get(name) != others.get(name)]:
        told = ", ".join(f"{name} was {others.get(name)}, is {settings.get(name)}" for name in changed)
        raise ResumeError(f"{folder} holds a run with other settings ({told:.300}): give another folder")


def read_result(path: Path) -> tuple[tuple[Stage, ...], str]:
    """The stages of a run and why it ended, from the file that the command leaves.

    Raises:
        FileFormatError: if the file is damaged.
    """
    try:
        return _history(_read(path))
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{path} describes no run ({error!r:.100}): run it again") from error


def _history(found: Mapping[str, Any]) -> tuple[tuple[Stage, ...], str]:
    """Raises KeyError or TypeError if there is none."""
    history = tuple(_stage(stage) for stage in found["history"])
    if not history:
        raise TypeError("no history")
    return history, str(found["reason"])


def _stage(found: Any) -> Stage:
    """Raises TypeError if a setting is missing, unknown or of the wrong type."""
    stage = Stage(**found)
    kinds = {"number": int, "ranks": dict, "parameters": int, "undone": bool}
    for each in fields(Stage):
        value, kind = getattr(stage, each.name), kinds.get(each.name, float)
        if type(value) is not kind:
            raise TypeError(f"{each.name} is {value!r:.60}")
    return stage


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > files.MAX_DESCRIPTION:
            raise ValueError(f"it is longer than {files.MAX_DESCRIPTION} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} is missing: delete {path.parent} to go on from the stage before") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged ({error!s:.100})") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} is damaged: it holds no JSON object")
    return found


def _sync(folder: Path) -> None:
    """Puts a rename on disk, where directories can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
