"""All methods on one set with one split: fitted on training, chosen on validation, judged on test."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.experiments.detector import early
from bench.experiments.detector.baselines import LAYERS, baselines
from bench.experiments.detector.data import Data
from bench.experiments.detector.metrics import auroc, difference, summary
from bench.experiments.detector.probes import Scored, logistic
from bench.experiments.detector.recurrent import CELLS, SEEDS, Tracked, shuffled_in_time, track

Sequences = Callable[[Data], list[Tensor]]
PROBE = "mean hidden state, best layer"


def compare(data: Data, improved: dict[str, Sequences], judge_on: str = "test", **options: bool) -> dict[str, Any]:
    """Figures by method, differences to the best probe of hidden states, and what is known how early.

    `judge_on="validation"` is for trying out: the test part stays untouched. Options go to `baselines`.
    """
    methods = {name: told(name, make()) for name, make in baselines(data, **options).items()}
    runs = eigentrack_runs(data, improved)
    methods |= {name: seeds[0] for name, seeds in runs.items()}
    rows = data.where(judge_on)
    found = {name: judged(data, scored, judge_on) for name, scored in methods.items()}
    for name, seeds in runs.items():
        areas = [float(auroc(one.values[rows], data.labels[rows])) for one in seeds]
        found[name] |= {"seeds": [round(area, 3) for area in areas], "parameters": seeds[0].detector.parameters}
    probe = best_probe(methods)
    groups = [data.groups[row] for row in rows]
    against = {
        name: difference(methods[name].values[rows], methods[probe].values[rows], data.labels[rows], groups)
        for name in runs
    }
    return {
        "methods": found,
        "best probe of hidden states": probe,
        "minus best probe": against,
        "early": {
            name: known_early(data, seeds[0].risks, judge_on) for name, seeds in runs.items() if "random" not in name
        }
        | {PROBE: known_early(data, probe_risks(data, methods[PROBE]), judge_on)},
    }


def eigentrack_runs(data: Data, improved: dict[str, Sequences]) -> dict[str, list[Tracked]]:
    """A run for each seed."""
    sequences: dict[str, tuple[Sequences, str]] = {
        f"EigenTrack {cell.upper()}": (lambda data: data.descriptors, cell) for cell in CELLS
    }
    sequences["EigenTrack GRU, tokens in random order"] = (lambda data: shuffled_in_time(data.descriptors), "gru")
    sequences |= {name: (make, "gru") for name, make in improved.items()}
    found = {}
    for name, (make, cell) in sequences.items():
        rows = make(data)
        found[name] = [told(name, track(data, rows, cell, seed)) for seed in SEEDS]
    return found


def told(name: str, scored: Any) -> Any:
    """The same; progress for who waits."""
    print(f"{name}: {scored.validation:.3f} on validation", file=sys.stderr, flush=True)
    return scored


def judged(data: Data, scored: Scored, judge_on: str = "test") -> dict[str, Any]:
    """Its figures, and what was chosen on validation."""
    parts = {"validation": data.where("validation"), "test": data.where(judge_on)}
    figures = summary(
        {split: scored.values[rows] for split, rows in parts.items()},
        {split: data.labels[rows] for split, rows in parts.items()},
        [data.groups[row] for row in parts["test"]],
        [data.keys[row] for row in parts["test"]],
    )
    return figures | ({"chosen": scored.choice} if scored.choice else {})


def best_probe(methods: dict[str, Scored]) -> str:
    """Of hidden states, by validation."""
    names = [name for name in methods if "hidden state" in name]
    return max(names, key=lambda name: methods[name].validation)


def probe_risks(data: Data, scored: Scored) -> list[Tensor]:
    """The probe of mean hidden states after every token, on the mean of the tokens so far."""
    layer = LAYERS.index(scored.choice["layer"])
    train = data.where("train")
    fitted = logistic(scored.choice["strength"]).fit(data.mean[train, layer].double().numpy(), data.labels[train])
    risks = []
    for answer in data.answers:
        means = answer.hidden[:, layer].double().cumsum(0) / torch.arange(1, len(answer) + 1)[:, None]
        risks.append(torch.from_numpy(fitted.predict_proba(means.numpy())[:, 1]))
    return risks


def known_early(data: Data, risks: list[Tensor], judge_on: str) -> dict[str, Any]:
    """With the threshold that 5 % of right validation answers exceed."""

    def of(rows: NDArray[np.intp]) -> tuple[list[Tensor], NDArray[np.float64]]:
        return [risks[row] for row in rows], data.labels[rows]

    level = early.threshold(*of(data.where("validation")))
    part = of(data.where(judge_on))
    return early.stopping(*part, level) | {"auroc after tokens": early.against_tokens(*part)}
