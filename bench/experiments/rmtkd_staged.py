"""`python -m bench.experiments.rmtkd_staged`: `rmtkd.run` in stages on SST-2, against one stage of as many steps.

The trained encoder of `rmtkd_text sst2` is narrowed by a low quantile in each of three stages, with distillation after
each (the paper's loop); or by the quantile of 0.45 at once, distilled for as many steps. What differs is when to cut.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rmtkd
from bench.experiments import data_text, texts
from bench.experiments.rmtkd_text import Experiment, encoder
from bench.experiments.rmtkd_units import Units, parameters, shown, work_folder
from rmtkd.config import Config

STAGED = {"three stages": (3, 0.1), "one stage": (1, 0.45)}  # stages, quantile


def staged(experiment: Experiment, name: str, epochs: int) -> dict[str, Any]:
    """What `rmtkd.run` makes of the trained encoder in this many stages, with `epochs` of distillation in all."""
    stages, quantile = STAGED[name]
    task, seed = experiment.task, experiment.seed
    config = replace(experiment.config, stages=stages, quantile=quantile, epochs=epochs // stages, max_drop=1.0)

    def evaluate(model: nn.Module) -> float:
        hits = data_text.correct(model, task.dev)
        return sum(hits) / len(hits)

    dense = experiment.dense().to(experiment.device)
    batches = data_text.calibration(task.train, seed)
    folder = work_folder() / f"staged-{name.replace(' ', '-')}-{seed}"
    result = rmtkd.run(
        dense, batches, data_text.loader(task.train, seed + 100), evaluate, config, folder=folder, progress=False
    )
    print(result.table(), flush=True)
    return {
        **experiment.score(result.model),
        "kept": round(parameters(result.model) / parameters(dense), 5),
        "stages": [asdict(stage) for stage in result.history],
        "reason": result.reason,
    }


def main() -> None:
    from transformers import AutoTokenizer, logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="SEED")
    parser.add_argument("--dense-epochs", type=int, default=1, help="of training the dense model")
    parser.add_argument("--epochs", type=int, default=3, help="of distillation, over all stages")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=texts.ROOT / "bench" / "results" / "rmtkd-staged.json")
    arguments = parser.parse_args()
    arguments.scratch, arguments.train = False, 0
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    task = data_text.sst2(AutoTokenizer.from_pretrained(encoder()))
    config = Config(mode="width")
    settings = {"task": task.name, "rows": task.about, "epochs": arguments.epochs, "quantiles": STAGED, **shown(config)}
    units = Units(arguments.json, "python -m bench.experiments.rmtkd_staged", settings)
    for seed in arguments.seeds:
        experiment = Experiment(arguments, task, config, seed)
        for name in STAGED:
            units.once(lambda at=experiment, name=name: staged(at, name, arguments.epochs), method=name, seed=seed)


if __name__ == "__main__":
    main()
