"""`python -m bench.experiments.detector.strangers`: ordinary sentences against strange ones.

All are single sentences in lower case without a closing mark, read as a user's message and cut to their first eight
tokens (shorter ones are left out): length says nothing. One-class methods know ordinary
training texts only; supervised ones know both. Without --final the validation part stands in for the test part.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import IsolationForest

from bench.experiments.detector.baselines import (
    CHOICE_SCORES,
    averaged,
    choice_score,
    cosine,
    distance,
    hidden_probe,
    length,
    mahalanobis,
    single_descriptor,
)
from bench.experiments.detector.comparison import judged
from bench.experiments.detector.data import Data
from bench.experiments.detector.metrics import auroc
from bench.experiments.detector.probes import Scored, probe
from bench.experiments.detector.probes import judged as scored_on
from bench.experiments.detector.recurrent import CELLS, SEEDS, shuffled_in_time, track
from bench.experiments.detector.report import counts, prepared, result_path, write

TOKENS = 8
COMPARISONS = (
    ("WebQuestions", "EU law"),
    ("WebQuestions", "HaluEval questions"),
    ("WebQuestions", "GSM8K"),
    ("CLINC150 in scope", "CLINC150 oos"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--final", action="store_true", help="judge on the test part, and write the result")
    arguments = parser.parse_args()
    everything = prepared("strange", arguments.cache)
    judge_on = "test" if arguments.final else "validation"
    result = {f"{one} against {other}": compare(everything, one, other, judge_on) for one, other in COMPARISONS}
    if arguments.final:
        write(result_path("strange"), "strangers --final", result)
    print(json.dumps(result, indent=1))


def compare(everything: Data, ordinary: str, strange: str, judge_on: str) -> dict[str, Any]:
    data = cut(everything, ordinary, strange)
    methods = {"length": length(data)} | {name: choice_score(data, name) for name in CHOICE_SCORES}
    methods["cosine distance"] = distance(data, cosine)
    methods["Mahalanobis distance"] = distance(data, mahalanobis)
    methods["descriptors, isolation forest"] = isolation(data)
    methods["mean embedding (layer 0)"] = table(data, data.mean[:, 0].numpy())
    methods["mean hidden state, best layer"] = hidden_probe(data, data.mean)
    methods["best single descriptor"] = single_descriptor(data)
    methods["logistic regression on averaged descriptors"] = table(data, averaged(data.descriptors))
    found = {name: judged(data, scored, judge_on) for name, scored in methods.items()}
    rows = data.where(judge_on)
    runs = {f"EigenTrack {cell.upper()}": (data.descriptors, cell) for cell in CELLS}
    runs["EigenTrack GRU, tokens in random order"] = (shuffled_in_time(data.descriptors), "gru")
    for name, (sequences, cell) in runs.items():
        seeds = [track(data, sequences, cell, seed) for seed in SEEDS]
        areas = [round(float(auroc(one.values[rows], data.labels[rows])), 3) for one in seeds]
        found[name] = judged(data, seeds[0], judge_on) | {"seeds": areas}
    return {"counts": counts(data), "methods": found}


def cut(everything: Data, ordinary: str, strange: str) -> Data:
    """The first TOKENS tokens of the texts that have so many; their hidden states do not depend on what follows."""
    data = everything.keep(lambda answer: answer.item.kind in (ordinary, strange) and len(answer) >= TOKENS)
    answers = [
        replace(
            one,
            label=int(one.item.kind == strange),
            hidden=one.hidden[:TOKENS],
            choice=one.choice[:TOKENS],
            tokens=one.tokens[:TOKENS],
        )
        for one in data.answers
    ]
    return replace(
        data,
        answers=answers,
        descriptors=[rows[:TOKENS] for rows in data.descriptors],
        mean=torch.stack([one.hidden.mean(0) for one in answers]),
        last=torch.stack([one.hidden[-1] for one in answers]),
    )


def isolation(data: Data) -> Scored:
    """One-class: an isolation forest on averaged descriptors of ordinary training texts."""
    features = averaged(data.descriptors)
    train = data.where("train")
    forest = IsolationForest(n_estimators=300, random_state=0).fit(features[train[data.labels[train] == 0]])
    return scored_on(-forest.score_samples(features), data.labels, data.where("validation"))


def table(data: Data, features: "np.ndarray[Any, Any]") -> Scored:
    return probe(features, data.labels, data.where("train"), data.where("validation"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
