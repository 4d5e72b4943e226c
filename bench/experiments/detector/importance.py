"""`python -m bench.experiments.detector.importance dialogue qa`: what each of the 24 descriptors gives, on test parts.

Permuted: an answer gets the course of one descriptor, at all layers, from another answer (its last value is held where
the other is shorter); how much AUROC is lost. Left out: trained without a group of descriptors. A descriptor that
others stand in for loses little when permuted in a network that spread its weights, and nothing when left out: neither
tells what a descriptor is worth alone.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from torch import Tensor

from bench.experiments.detector.baselines import averaged
from bench.experiments.detector.data import Data
from bench.experiments.detector.metrics import auroc, interval, resampled
from bench.experiments.detector.probes import logistic, probe
from bench.experiments.detector.recurrent import SEEDS, TAKEN, Tracked, track
from bench.experiments.detector.report import prepared, result_path, write
from rmtkernels import DESCRIPTORS

Array = NDArray[np.float64]
Score = Callable[[list[Tensor]], Array]
REPEATS = 5
GROUPS = {
    "leading shares": ("share_1", "share_2", "share_3", "share_4", "share_5", "share_top5"),
    "ratios of neighbours": ("ratio_1", "ratio_2", "ratio_3", "ratio_4"),
    "scale and mean": ("log_trace", "mean_share", "log_median"),
    "shape of the spectrum": ("entropy", "participation", "variance", "skewness", "early_enrichment"),
    "distance to the law of noise": (
        "mp_kl",
        "mp_wasserstein",
        "tracy_widom",
        "tracy_widom_log_survival",
        "above_edge",
    ),
    "overlap with the step before": ("overlap",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=["dialogue", "qa"])
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    path = result_path("importance")
    result: dict[str, Any] = json.loads(path.read_text())["sets"] if path.exists() else {}
    for name in arguments.sets:
        result[name] = of_set(prepared(name, arguments.cache))
        write(path, f"importance {' '.join(result)}", {"repeats": REPEATS, "groups": GROUPS, "sets": result})
    print(json.dumps(result, indent=1))


def of_set(data: Data) -> dict[str, Any]:
    """Differences in AUROC [value, low, high]: what is lost. The GRU's are means of the seeds."""
    rows, sequences = data.where("test"), data.descriptors
    labels, groups = data.labels[rows], [data.groups[row] for row in rows]
    runs = [track(data, sequences, seed=seed) for seed in SEEDS]
    regression = fitted(data, sequences)
    methods: dict[str, list[Score]] = {
        "GRU": [scores_of(run) for run in runs],
        "logistic regression": [lambda some: decision(regression, some)],
    }
    test = [sequences[row] for row in rows]
    whole = {name: [score(test) for score in some] for name, some in methods.items()}
    print({name: [round(float(auroc(one, labels)), 3) for one in some] for name, some in whole.items()}, flush=True)
    permuted: dict[str, dict[str, list[float]]] = {}
    for index, name in enumerate(DESCRIPTORS):
        changed = [exchanged(test, index, repeat) for repeat in range(REPEATS)]
        permuted[name] = {
            method: lost(whole[method], [[score(some) for some in changed] for score in scores], labels, groups)
            for method, scores in methods.items()
        }
        print(name, permuted[name], flush=True)
    left_out: dict[str, dict[str, list[float]]] = {}
    for name, members in GROUPS.items():
        less = without(sequences, members)
        scores = {
            "GRU": [track(data, less, seed=seed).values[rows] for seed in SEEDS],
            "logistic regression": [decision(fitted(data, less), [less[row] for row in rows])],
        }
        left_out[name] = {
            method: lost(whole[method], [[one] for one in some], labels, groups) for method, some in scores.items()
        }
        print(name, left_out[name], flush=True)
    return {
        "auroc": {name: round(float(np.mean([auroc(one, labels) for one in some])), 3) for name, some in whole.items()},
        "permuted": permuted,
        "left out": left_out,
    }


def scores_of(run: Tracked) -> Score:
    """Of texts, as `track` made them: the risk that was chosen on validation."""
    take = TAKEN[run.choice["taken"]]

    def score(sequences: list[Tensor]) -> Array:
        logits = [risk.double().logit(eps=1e-7).numpy() for risk in run.detector.score(sequences)]
        return np.array([float(take(row)) for row in logits])

    return score


def fitted(data: Data, sequences: list[Tensor]) -> Pipeline:
    """The regression on averages, with the strength that is best on validation."""
    features, train = np.nan_to_num(averaged(sequences)), data.where("train")
    strength = probe(features, data.labels, train, data.where("validation")).choice["strength"]
    return logistic(strength).fit(features[train], data.labels[train])


def decision(regression: Pipeline, sequences: list[Tensor]) -> Array:
    values: Array = regression.decision_function(np.nan_to_num(averaged(sequences)))
    return values


def exchanged(sequences: list[Tensor], descriptor: int, seed: int) -> list[Tensor]:
    """The descriptor's columns from other sequences, in an order that depends on the seed alone."""
    columns = range(descriptor, sequences[0].shape[1], len(DESCRIPTORS))
    donors = np.random.default_rng(seed).permutation(len(sequences))
    found = []
    for own, donor in zip(sequences, donors, strict=True):
        changed, other = own.clone(), sequences[donor]
        places = torch.arange(len(own)).clamp(max=len(other) - 1)
        changed[:, columns] = other[places][:, columns]
        found.append(changed)
    return found


def without(sequences: list[Tensor], names: tuple[str, ...]) -> list[Tensor]:
    """Without these descriptors, at all layers."""
    width = sequences[0].shape[1]
    kept = [column for column in range(width) if DESCRIPTORS[column % len(DESCRIPTORS)] not in names]
    return [rows[:, kept] for rows in sequences]


def lost(whole: list[Array], changed: list[list[Array]], labels: Array, groups: list[str]) -> list[float]:
    """[value, low, high]: AUROC of the whole minus that of what was changed, means over seeds and repeats; sources are
    drawn together."""
    weights = resampled(groups)
    values, draws = [], []
    for before, after in zip(whole, changed, strict=True):
        values.append(auroc(before, labels) - np.mean([auroc(one, labels) for one in after]))
        draws.append(auroc(before, labels, weights) - np.mean([auroc(one, labels, weights) for one in after], axis=0))
    return [round(float(np.mean(values)), 3), *interval(np.mean(draws, axis=0))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
