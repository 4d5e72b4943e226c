"""`python -m bench.experiments.detector.tried dialogue`: what was tried, and what it gave on validation.

No test figures. Each row is a way to describe a token. Judged twice: a GRU over the sequence (mean of three seeds),
and a logistic regression on the mean over the tokens and the last token's.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.experiments.detector import directions, vectors
from bench.experiments.detector.baselines import LAYERS, averaged
from bench.experiments.detector.data import Data
from bench.experiments.detector.metrics import auroc
from bench.experiments.detector.probes import Scored, probe, together
from bench.experiments.detector.recurrent import SEEDS, shuffled_in_time, track
from bench.experiments.detector.report import prepared, result_path, write
from bench.experiments.detector.windows import SETTINGS
from rmtkernels import DESCRIPTORS

ALL_LAYERS = list(range(len(LAYERS)))
MIDDLE = [LAYERS.index(f"layer{index}") for index in (11, 14, 17, 20)]


def context(data: Data) -> list[Tensor]:
    rows = vectors.context_features(data.folder)
    return [rows[answer.row] for answer in data.answers]


def choice(data: Data) -> list[Tensor]:
    return [answer.choice for answer in data.answers]


def only_layers(data: Data, wanted: list[int]) -> list[Tensor]:
    """Descriptors of some layers, numbered with the embedding as 0."""
    width = len(DESCRIPTORS)
    columns = [column for layer in wanted for column in range((layer - 1) * width, layer * width)]
    return [rows[:, columns] for rows in data.descriptors]


def of_tokens_and_means(data: Data) -> list[Tensor]:
    """Directions per layer, of the token and of the mean so far."""
    return vectors.joined(
        directions.of_hidden(data, ALL_LAYERS), directions.of_hidden(data, ALL_LAYERS, cumulative=True)
    )


def summed_up(data: Data) -> list[Tensor]:
    """One direction each for descriptors, prompt's subspace, and the subspace of right answers."""
    parts = (data.descriptors, context(data), vectors.reference_features(data))
    return vectors.joined(*(directions.of_features(data, part) for part in parts))


def with_vectors(data: Data) -> list[Tensor]:
    return vectors.joined(of_tokens_and_means(data), summed_up(data))


def with_probe(data: Data) -> list[Tensor]:
    """Everything that costs some inner products per token, and no attention weights."""
    return vectors.joined(with_vectors(data), directions.probe_so_far(data))


def with_attention(data: Data) -> list[Tensor]:
    return vectors.joined(with_vectors(data), directions.of_features(data, vectors.lookback(data)))


VARIANTS: dict[str, Callable[[Data], list[Tensor]]] = {
    "24 descriptors, 10 layers, window 32": lambda data: data.descriptors,
    **{name: lambda data, name=name: data.with_descriptors(name).descriptors for name in list(SETTINGS)[1:]},
    "middle layers only (11, 14, 17, 20)": lambda data: only_layers(data, MIDDLE),
    "tokens in random order": lambda data: shuffled_in_time(data.descriptors),
    "logits only": choice,
    "descriptors and logits": lambda data: vectors.joined(data.descriptors, choice(data)),
    "subspace of right answers": vectors.reference_features,
    "descriptors and subspace of right answers": lambda data: vectors.joined(
        data.descriptors, vectors.reference_features(data)
    ),
    "subspace of the prompt": context,
    "descriptors and subspace of the prompt": lambda data: vectors.joined(data.descriptors, context(data)),
    "a direction per layer, per token": lambda data: directions.of_hidden(data, ALL_LAYERS),
    "… from tokens in which twins differ": lambda data: directions.of_hidden(data, ALL_LAYERS, differing=True),
    "… of means so far": lambda data: directions.of_hidden(data, ALL_LAYERS, cumulative=True),
    "… of both": of_tokens_and_means,
    "one direction for layers 11 to 20": lambda data: directions.of_hidden_together(data, MIDDLE),
    "descriptors, and directions of both": lambda data: vectors.joined(data.descriptors, of_tokens_and_means(data)),
    "directions of both, and one each for descriptors and subspaces": with_vectors,
    "probe of means so far, all layers": directions.probe_so_far,
    "these, and the probe of means so far": with_probe,
    "64 principal directions of layers 11 to 20, without labels": lambda data: directions.principal(data, MIDDLE),
    "lookback ratios (attention)": vectors.lookback,
    "directions, subspaces, and one direction for lookback ratios": with_attention,
    "all of these and the probe": lambda data: vectors.joined(with_attention(data), directions.probe_so_far(data)),
}


def with_best_probe(data: Data) -> dict[str, Any]:
    """Everything in a GRU, and the best probe beside it."""
    train, validation = data.where("train"), data.where("validation")
    beside = probe(data.mean.flatten(1).numpy(), data.labels, train, validation)
    sequences = with_probe(data)
    runs = [together(track(data, sequences, seed=seed), beside, data.labels, validation).values for seed in SEEDS]
    return row(data, sequences[0].shape[1], runs, None)


RUNS: dict[str, Callable[[Data], dict[str, Any]]] = {
    "the mean of the GRU with 26 numbers and the best probe": with_best_probe,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["dialogue", "qa", "passage"])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--only", nargs="*", help="names of variants; the others' rows stay as they are")
    arguments = parser.parse_args()
    data = prepared(arguments.set, arguments.cache)
    path = result_path(f"tried-{arguments.set}")
    rows: dict[str, Any] = json.loads(path.read_text())["validation"] if arguments.only and path.exists() else {}
    answers = {split: len(data.where(split)) for split in ("train", "validation")}
    runs = {name: lambda data, make=make: judge(data, make(data)) for name, make in VARIANTS.items()} | RUNS
    for name, run in runs.items():
        if not arguments.only or name in arguments.only:
            rows[name] = run(data)
            ordered = {variant: rows[variant] for variant in runs if variant in rows}
            write(path, f"tried {arguments.set}", {"answers": answers, "validation": ordered})
            print(name, rows[name], flush=True)


def judge(data: Data, sequences: list[Tensor]) -> dict[str, Any]:
    """AUROC on validation."""
    tracked = [track(data, sequences, seed=seed) for seed in SEEDS]
    regression = probe(averaged(sequences), data.labels, data.where("train"), data.where("validation"))
    return row(data, sequences[0].shape[1], [one.values for one in tracked], regression)


def row(data: Data, features: int, runs: list[Any], regression: Scored | None) -> dict[str, Any]:
    """Scores (n,) of three trainings, and their mean."""
    validation = data.where("validation")
    areas = [float(auroc(one[validation], data.labels[validation])) for one in runs]
    mean = float(auroc(np.mean(runs, 0)[validation], data.labels[validation]))
    return {
        "features": features,
        "gru": round(float(np.mean(areas)), 3),
        "seeds": [round(area, 3) for area in areas],
        "seeds together": round(mean, 3),
        "logistic regression": round(regression.validation, 3) if regression else None,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
