"""Results of an experiment, unit by unit: each is in the file as soon as it is done, and is not done again."""

import fcntl
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.experiments.results import write_json
from eigentrack.loading import cache_dir

SETTINGS = (
    *("noise", "quantile", "multiple", "min_ratio", "neurons", "calibration_rows"),
    *("epochs", "alpha", "temperature", "learning_rate", "final_learning_rate", "weight_decay"),
)


class Units:
    """Units of a JSON file, each a `key` that says what it is of and the `figures` found.

    Raises ValueError if the file holds another experiment, or one that was made with other `settings`.
    """

    def __init__(self, file: Path, made_by: str, settings: Mapping[str, Any]) -> None:
        self.file = file
        self.report: dict[str, Any] = {
            "made by": made_by,
            "settings": json.loads(json.dumps(settings)),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "units": [],
        }
        self.read()

    def read(self) -> None:
        """The units that are in the file by now: several processes may each do some of them."""
        if not self.file.is_file():
            return
        found = json.loads(self.file.read_text(encoding="utf-8"))
        for what in ("made by", "settings"):
            if found[what] != self.report[what]:
                raise ValueError(f"{self.file} was made with other {what}: move it away, or give another --json")
        self.report["units"] = found["units"]

    @property
    def units(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.report["units"]
        return found

    def get(self, **key: Any) -> dict[str, Any] | None:
        """The figures of the unit of this key."""
        return next((unit["figures"] for unit in self.units if unit["key"] == key), None)

    def once(self, work: Callable[[], Mapping[str, Any]], **key: Any) -> dict[str, Any]:
        """The figures of this key's unit, from the file or by doing the work, which is then written down."""
        if (known := self.get(**key)) is not None:
            return known
        print(time.strftime("%H:%M:%S"), *key.values(), "…", flush=True)
        began = time.perf_counter()
        figures = {**work(), "seconds": round(time.perf_counter() - began, 1)}
        with locked(self.file.parent):
            self.read()
            self.units.append({"key": key, "figures": figures})
            write_json(self.file, self.report)
        brief = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
        print(time.strftime("%H:%M:%S"), *key.values(), brief, flush=True)
        return figures


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes waiting that would write in the folder, too."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def work_folder() -> Path:
    """Where models between units are kept: they can be made again."""
    return cache_dir() / "rmtkd-experiments"


def kept(folder: Path, make: Callable[[], Any], load: Callable[[Path], Any]) -> Any:
    """A transformers model from its folder, or made and saved there, whole or not at all."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as aside:
            make().save_pretrained(Path(aside) / "model")
            (Path(aside) / "model").rename(folder)
    return load(folder)


def shown(config: Any) -> dict[str, Any]:
    """The settings of rmtkd.Config that an experiment in width mode depends on."""
    return {name: getattr(config, name) for name in SETTINGS}


def parameters(model: torch.nn.Module) -> int:
    """Tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
