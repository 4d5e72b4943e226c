"""Runs of RMT-KD that are killed at a point and called again, each in a process of its own; a program for the test.

    python killed_runs.py MODE FOLDER POINT...

prints JSON: {"": (digest, history) of a run that nobody killed, POINT: the same of one that was killed there, ...}.
Processes are forked, so that what takes longest, the imports, is done once.
"""

import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import tqdm.auto
from transformers import BertConfig, BertForSequenceClassification

from rmtkd import checkpoints, files
from rmtkd.config import Config
from rmtkd.stages import run

# What tqdm writes under is a semaphore that forked processes share: one that is killed with it stops all after it.
for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
    bar.set_lock(threading.RLock())

CONFIGS = {
    "width": Config(
        mode="width",
        learning_rate=1e-2,
        baseline=1.0,
        warm_up_epochs=1,
        stages=2,
        epochs=2,
        multiple=4,
        max_drop=1.0,
    ),
    "factor": Config(
        mode="factor",
        modules=("*intermediate.dense", "*output.dense"),
        quantile=0.7,
        min_ratio=0.0,
        learning_rate=1e-2,
        teacher="average",
        keep_slower=True,
        baseline=1.0,
        warm_up_epochs=1,
        stages=2,
        epochs=1,
        multiple=2,
        max_drop=1.0,
    ),
}


def model() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def rows() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 32, (48, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids[0] % 3} for ids in tokens]


def loader(own: bool) -> Any:
    """Shuffled by PyTorch's random state, or by a generator of its own."""
    generator = torch.Generator().manual_seed(3) if own else None
    return torch.utils.data.DataLoader(rows(), 8, shuffle=True, generator=generator)  # type: ignore[arg-type]


def accuracy(narrowed: Any) -> float:
    tokens = torch.stack([row["input_ids"] for row in rows()])
    labels = torch.stack([row["labels"] for row in rows()])
    return float((narrowed(tokens).logits.argmax(-1) == labels).float().mean())


def go(mode: str, folder: Path, then: Callable[[Any], None] | None = None) -> None:
    """Runs, and writes what came of it where the next process finds it."""
    torch.manual_seed(os.getpid())  # what the caller's random state is must not matter
    calibration = [{"input_ids": row["input_ids"][None]} for row in rows()]
    result = run(model(), calibration, loader(mode == "width"), accuracy, CONFIGS[mode], folder=folder, progress=False)
    history = [{**asdict(stage), "seconds": 0} for stage in result.history]
    found = [checkpoints.digest(result.model), history, result.reason]
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(found))


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trap(move: Callable[[Path, Path], Path], where: str, *, before: bool) -> Callable[[Path, Path], Path]:
    """The same move, that nobody survives if it is to this place."""

    def moved(self: Path, target: Path) -> Path:
        if before and target.name == where:
            die()
        found = move(self, target)
        if target.name == where:
            die()
        return found

    return moved


def arm(point: str) -> None:
    """Sets the trap: "step 7" is the optimiser's seventh step, "rename stage-1" the moment before that rename."""
    what, _, where = point.partition(" ")
    if what == "step":
        step, taken = torch.optim.AdamW.step, []

        def counted(self: Any, *arguments: Any, **more: Any) -> Any:
            taken.append(1)
            return die() if len(taken) == int(where) else step(self, *arguments, **more)

        torch.optim.AdamW.step = counted  # type: ignore[method-assign]
    elif what in ("rename", "renamed"):
        for name in ("rename", "replace"):
            setattr(Path, name, trap(getattr(Path, name), where, before=what == "rename"))
    elif what == "weights":  # half a file of weights, in a folder that is not renamed

        def torn(folder: Path) -> None:
            if where in str(folder):
                for path in folder.glob("*.safetensors"):
                    os.truncate(path, path.stat().st_size // 2)
                die()

        files._to_disk = torn
    else:
        raise ValueError(point)


def start(task: Callable[[], None]) -> int:
    """The number of a process that does the task."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return child


def fork(task: Callable[[], None]) -> int:
    """The status of a process that does the task."""
    return os.waitpid(start(task), 0)[1]


def killed(mode: str, folder: Path, point: str) -> None:
    arm(point)
    go(mode, folder)


def main(mode: str, place: str, *points: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()
    results = {}
    for point in ("", *points):
        folder = Path(place) / (point.replace(" ", "-") or "whole")
        if point:
            status = fork(lambda folder=folder, point=point: killed(mode, folder, point))  # type: ignore[misc]
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                raise RuntimeError(f"{point} was not reached")
        if fork(lambda folder=folder: go(mode, folder)) != 0:  # type: ignore[misc]
            raise RuntimeError(f"the run after {point or 'nothing'} failed")
        results[point] = json.loads((folder.parent / f"{folder.name}.json").read_text())
        results[point].append(sorted(path.name for path in folder.iterdir()))
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
