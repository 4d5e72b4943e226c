"""`python -m bench.experiments.detector.passages`: the paper's protocol, and the model's own errors.

A passage with its own question against the same passage with a question of another; the model answers both. The label
is a function of the prompt, so what the prompt alone gives comes first, and what the answer adds to it is the result.
Without --final the validation part stands in for the test part, and nothing is written.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.experiments.detector.baselines import LAYERS, averaged, hidden_probe
from bench.experiments.detector.comparison import compare, judged
from bench.experiments.detector.data import Data
from bench.experiments.detector.metrics import difference
from bench.experiments.detector.probes import Scored, probe
from bench.experiments.detector.probes import judged as scored_on
from bench.experiments.detector.report import counts, prepared, result_path, write
from bench.experiments.detector.sets import word_overlap
from bench.experiments.detector.store import Answer
from bench.experiments.detector.tried import VARIANTS

KINDS = ("random", "matched")
IMPROVED = {"EigenTrack GRU with vectors": "these, and the probe of means so far"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--final", action="store_true", help="judge on the test part, and write the result")
    arguments = parser.parse_args()
    everything = prepared("passage", arguments.cache)
    judge_on = "test" if arguments.final else "validation"
    result = {kind: paired(everything, kind, judge_on) for kind in KINDS}
    result["own errors"] = own_errors(everything, judge_on)
    if arguments.final:
        write(result_path("passage"), "passages --final", result)
    print(json.dumps(result, indent=1))


def paired(everything: Data, kind: str, judge_on: str) -> dict[str, Any]:
    """Own question against the other one."""
    data = everything.keep(lambda answer: answer.item.kind in ("own", kind))
    improved = {name: VARIANTS[variant] for name, variant in IMPROVED.items()}
    result = {"counts": counts(data)} | compare(data, improved, judge_on, prompts_differ=True)
    result["methods"]["word overlap of question and passage"] = judged(data, overlap(data), judge_on)
    return result | {"the answer's part": answer_adds(data, judge_on)}


def overlap(data: Data) -> Scored:
    """No model: the share of the question's words that the passage does not have."""
    values = np.array([1 - word_overlap(*reversed(asked(answer))) for answer in data.answers])
    return scored_on(values, data.labels, data.where("validation"))


def asked(answer: Answer) -> tuple[str, str]:
    """(passage, question) in a prompt."""
    text = answer.item.prompt.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    passage, question = text.rsplit("\n\n", 1)
    return passage, question


def answer_adds(data: Data, judge_on: str) -> dict[str, Any]:
    """The prompt's last token alone, and with descriptors or with the hidden states of the answer."""
    train, validation, rows = data.where("train"), data.where("validation"), data.where(judge_on)
    layer = LAYERS.index(hidden_probe(data, data.prompt).choice["layer"])
    prompt = data.prompt[:, layer].double().numpy()
    behind = data.mean[:, layer].double().numpy()
    tables = {
        "prompt alone": prompt,
        "prompt and averaged descriptors": np.hstack([prompt, averaged(data.descriptors)]),
        "prompt and mean hidden state": np.hstack([prompt, behind]),
    }
    scored = {name: probe(table, data.labels, train, validation) for name, table in tables.items()}
    groups = [data.groups[row] for row in rows]
    alone = scored["prompt alone"].values[rows]
    return {
        name: judged(data, one, judge_on)
        | {"minus prompt alone": difference(one.values[rows], alone, data.labels[rows], groups)}
        for name, one in scored.items()
    }


def own_errors(everything: Data, judge_on: str) -> dict[str, Any]:
    """The model's answers to the passages' own questions: label 1 where the right answer's words do not occur in it, in
    their order, after lower-casing and without punctuation and articles."""
    data = everything.keep(lambda answer: answer.item.kind == "own")
    data = replace(data, answers=[replace(answer, label=int(not holds_gold(answer))) for answer in data.answers])
    return {"counts": counts(data)} | compare(data, {}, judge_on, prompts_differ=True)


def holds_gold(answer: Answer) -> bool:
    return f" {plain(answer.item.gold)} " in f" {plain(answer.text)} "


def plain(text: str) -> str:
    return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))


if __name__ == "__main__":
    main()
