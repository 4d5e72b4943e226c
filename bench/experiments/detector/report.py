"""What all protocols share: loading a set, and writing a result."""

import platform
from pathlib import Path
from typing import Any

import torch

from bench.experiments.detector.data import SPLITS, Data, load
from bench.experiments.results import write_json
from bench.experiments.texts import ROOT
from eigentrack.loading import demo_model


def prepared(name: str, cache: Path | None = None) -> Data:
    """A cached set; everything that follows runs on one thread, so that it can be repeated."""
    torch.set_num_threads(1)
    return load(name, cache)


def result_path(name: str) -> Path:
    return ROOT / "bench" / "results" / f"detector-{name}.json"


def counts(data: Data) -> dict[str, dict[str, int]]:
    """Of answers, of the wrong among them, and of sources, per split."""
    return {
        split: {
            "answers": len(rows := data.where(split)),
            "label 1": int(data.labels[rows].sum()),
            "sources": len({data.groups[row] for row in rows}),
            "tokens": sum(len(data.answers[row]) for row in rows),
        }
        for split in SPLITS
    }


def write(path: Path, command: str, result: dict[str, Any]) -> None:
    head = {
        "made by": f"python -m bench.experiments.detector.{command}",
        "model": demo_model().name,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    write_json(path, head | result)
