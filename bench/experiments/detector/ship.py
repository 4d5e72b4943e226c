"""`python -m bench.experiments.detector.ship`: trains the detector that the package brings, and writes its card.

On HaluEval QA's passages alone (HotpotQA, CC BY-SA 4.0), whose licence allows it. The same command gives the same file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.experiments.detector import early, metrics
from bench.experiments.detector.data import Data
from bench.experiments.detector.report import counts, prepared, result_path, write
from bench.experiments.texts import ROOT
from eigentrack import Detector, EigenTrack, ModelIdentity
from eigentrack.loading import demo_model, load_causal_lm

NAME = "smollm2-135m"
FOLDER = ROOT / "python" / "eigentrack" / "detectors" / NAME
CELL, SEED, FALSE_ALARMS = "gru", 0, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    data = prepared("passage", arguments.cache)
    detector = train(data)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    detector.save_pretrained(arguments.folder)
    result = {"counts": counts(data), "parameters": detector.parameters} | judged(data, detector)
    write(result_path("shipped"), "ship", result)
    (arguments.folder / "README.md").write_text(card(result), encoding="utf-8")
    print(json.dumps(result, indent=1))


def train(data: Data) -> Detector:
    """Own questions against both kinds of others; calibrated on as many of the one as of the other."""
    model, tokenizer = load_causal_lm(demo_model())
    settings = EigenTrack(model).settings
    detector = Detector(settings.names, settings=settings, model=ModelIdentity.of(model, tokenizer), cell=CELL)
    part = {split: given(data, data.where(split).tolist()) for split in ("train", "validation")}
    detector.fit(*part["train"], validation=part["validation"], seed=SEED, progress=False)
    detector.calibrate(*given(data, balanced(data, "validation")), false_alarms=FALSE_ALARMS)
    return detector


def given(data: Data, rows: list[int]) -> tuple[list[torch.Tensor], list[int]]:
    return [data.descriptors[row] for row in rows], data.labels[rows].astype(int).tolist()


def balanced(data: Data, split: str) -> list[int]:
    """Of each passage its own question, and one of the others in turn."""
    rows = data.where(split).tolist()
    sources = {source: place % 2 for place, source in enumerate(dict.fromkeys(data.groups[row] for row in rows))}
    other = ("random", "matched")
    return [row for row in rows if data.answers[row].item.kind in ("own", other[sources[data.groups[row]]])]


def judged(data: Data, detector: Detector) -> dict[str, Any]:
    """On the test part, own question against each kind of other one: a text's score is its last risk."""
    risks = detector.score(data.descriptors)
    found = {}
    for kind in ("random", "matched"):
        rows = [row for row in data.where("test").tolist() if data.answers[row].item.kind in ("own", kind)]
        last, labels = np.array([float(risks[row][-1]) for row in rows]), data.labels[rows]
        found[f"own against {kind}"] = {
            "auroc": metrics.auroc_with_interval(last, labels, [data.groups[row] for row in rows]),
            "calibration error": round(metrics.calibration_error(last, labels), 3),
            "stopping": early.stopping([risks[row] for row in rows], labels, detector.threshold),
        }
    return {"test": found, "threshold": detector.threshold}


def card(result: dict[str, Any]) -> str:
    """The detector's README."""
    lines = CARD.splitlines()
    place = lines.index("FIGURES")
    rows = [
        "| test | AUROC [95 %] | calibration error | right answers stopped | others stopped |",
        "|---|---|---|---|---|",
    ]
    for name, one in result["test"].items():
        value, low, high = one["auroc"]
        stopped = one["stopping"]
        rows.append(
            f"| {name} question | {value:.3f} [{low:.3f}, {high:.3f}] | {one['calibration error']:.3f} | "
            f"{stopped['right answers stopped']:.1%} | {stopped['wrong answers stopped']:.1%} |"
        )
    number = {split: one["answers"] for split, one in result["counts"].items()}
    text = "\n".join(lines[:place] + rows + lines[place + 1 :])
    return text.format(parameters=result["parameters"], threshold=result["threshold"], **number) + "\n"


CARD = """\
# A detector for SmolLM2-135M-Instruct

Made by `python -m bench.experiments.detector.ship`; `Detector.from_pretrained("smollm2-135m")` loads it.

**Task.** The model answers a question about a passage. Label 0: the question belongs to the passage. Label 1: it is
another passage's, so the passage does not hold the answer (EigenTrack's protocol, arXiv 2509.15735). The detector sees
24 descriptors of the spectra of the last 32 hidden states, answer tokens only, at ten layers of thirty, and gives a
probability after each token: a GRU of 16 units, {parameters} parameters.

**Data.** HaluEval QA (MIT), whose passages and questions are HotpotQA's (CC BY-SA 4.0); answers by the model, greedy,
at most 32 tokens, in its chat template. {train} answers trained it, {validation} stopped the training and calibrated it
(as many of label 1 as of label 0), {test} were left for the test; passages are in one part only. The model is
Apache-2.0.

**Figures**, on the test part:

FIGURES

"Stopped" is at the threshold {threshold:.3f}, which 5 % of right validation answers exceed at any of their tokens.
Where it stops next to nothing, the risk is for looking at, and a lower threshold costs more false alarms.

**What the probability means.** How often an answer that looks so was given to a question that the passage does not
answer, if half of all questions are such, and if passages, questions and prompt are like HaluEval's.

**What it does not mean.** It is no probability that the answer is false: more than half of the answers to the right
question are wrong too, and the detector was not trained to see it. It knows nothing of other models, other prompts,
long conversations or sampling at high temperature. The prompt alone, with one look at the last token's hidden state,
tells these labels better than any answer's spectra (docs/detector.md), so use it as an example, not as a safeguard.

**Licence.** Apache-2.0, as the package; the training data's licences are above.
"""


if __name__ == "__main__":
    main()
