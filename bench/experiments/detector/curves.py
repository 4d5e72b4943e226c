"""`python -m bench.experiments.detector.curves`: figures on dialogue against window, layer, and false alarms.

On the test part, as descriptions: nothing is chosen from them. What is in the result already is not made again.
"""

import argparse
import json
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.experiments.detector.baselines import LAYERS, averaged, baselines
from bench.experiments.detector.data import Data
from bench.experiments.detector.metrics import auroc, auroc_with_interval, hits_at
from bench.experiments.detector.probes import Scored, probe
from bench.experiments.detector.recurrent import SEEDS, track
from bench.experiments.detector.report import prepared, result_path, write
from bench.experiments.detector.sampling import DIALOGUES
from bench.experiments.detector.tried import VARIANTS, only_layers

WINDOWS = (8, 16, 32, 64)
FALSE_ALARMS = [step / 100 for step in range(101)]
ROC_BASELINES = (
    "mean hidden state, all layers",
    "mean embedding (layer 0)",
    "logistic regression on averaged descriptors",
    "words that the prompt has",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    data, path = prepared("dialogue", arguments.cache), result_path("curves")
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part, name, make in parts(data):
        known = result.setdefault(part, {})
        if name not in known:
            known[name] = make()
            write(path, "curves", {part: result[part] for part in PARTS if part in result})
            print(part, name, {key: value for key, value in known[name].items() if key != "hits"}, flush=True)


PARTS = ("window, per layer", "window, joint", "layer", "roc")


def parts(data: Data) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """(part, name, what makes it), in the order in which they are made."""
    found: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for name in ROC_BASELINES:
        found.append(("roc", name, lambda name=name: roc(data, baselines(data)[name]())))  # type: ignore[misc]
    for name, variant in {
        "EigenTrack GRU": "24 descriptors, 10 layers, window 32",
        "EigenTrack GRU with vectors": "these, and the probe of means so far",
    }.items():
        make = VARIANTS[variant]
        found.append(("roc", name, lambda make=make: roc(data, track(data, make(data)))))  # type: ignore[misc]
    for window in WINDOWS:
        for part, setting in (("window, per layer", ""), ("window, joint", "joint")):
            sequences = settings(data, setting, window)
            found.append((part, str(window), lambda make=sequences: of_sequences(data, make())))  # type: ignore[misc]
    for index, layer in enumerate(LAYERS):
        found.append(("layer", layer, lambda index=index: of_layer(data, index)))  # type: ignore[misc]
    return found


def settings(data: Data, kind: str, window: int) -> Callable[[], list[Tensor]]:
    name = ", ".join(part for part in (kind, f"window {window}") if part)
    return lambda: data.with_descriptors("joint" if name == "joint, window 32" else name).descriptors


def of_sequences(data: Data, sequences: list[Tensor]) -> dict[str, Any]:
    """The first seed's AUROC with its interval, those of all, and a logistic regression's on averages."""
    tracked = [track(data, sequences, seed=seed) for seed in SEEDS]
    regression = probe(averaged(sequences), data.labels, data.where("train"), data.where("validation"))
    rows = data.where("test")
    return {
        "gru": area(data, tracked[0]),
        "seeds": [round(float(auroc(one.values[rows], data.labels[rows])), 3) for one in tracked],
        "logistic regression": area(data, regression),
    }


def of_layer(data: Data, layer: int) -> dict[str, Any]:
    """One layer's averaged descriptors (the embedding has none), and its mean hidden state; both regressions."""
    tables = {"mean hidden state": data.mean[:, layer].numpy()}
    if layer:
        tables["24 descriptors"] = averaged(only_layers(data, [layer]))
    train, validation = data.where("train"), data.where("validation")
    return {name: area(data, probe(table, data.labels, train, validation)) for name, table in tables.items()}


def area(data: Data, scored: Scored, wanted: Container[str] | None = None) -> list[float]:
    """On the test part, or on its items of these keys."""
    rows = [row for row in data.where("test") if wanted is None or data.keys[row] in wanted]
    return auroc_with_interval(scored.values[rows], data.labels[rows], [data.groups[row] for row in rows])


def roc(data: Data, scored: Scored) -> dict[str, Any]:
    """Share of wrong answers found at 0, 1, … 100 % false alarms; and the AUROC on what was sampled."""
    rows = data.where("test")
    hits = hits_at(scored.values[rows], data.labels[rows], FALSE_ALARMS)
    return {
        "auroc": area(data, scored),
        "auroc where sampled": area(data, scored, list(dict.fromkeys(data.keys[row] for row in rows))[:DIALOGUES]),
        "hits": [round(float(share), 4) for share in hits],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
