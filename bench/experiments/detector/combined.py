"""`python -m bench.experiments.detector.combined dialogue`: the GRU with vectors and the best probe, averaged.

Both scores in deviations over validation. What was tried on dialogue's validation part put this first (`tried`); here
the test part judges it, and what was put first is not changed by what it says. Without --final the validation part
stands in for the test part, and nothing is written.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.experiments.detector.baselines import baselines
from bench.experiments.detector.comparison import best_probe, judged
from bench.experiments.detector.data import Data
from bench.experiments.detector.metrics import auroc, difference
from bench.experiments.detector.probes import together
from bench.experiments.detector.recurrent import SEEDS, track
from bench.experiments.detector.report import prepared, result_path, write
from bench.experiments.detector.tried import VARIANTS

PROBES = ("last hidden state, best layer", "mean hidden state, best layer", "mean hidden state, all layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=["dialogue", "qa", "facts"])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--final", action="store_true", help="judge on the test part, and write the result")
    arguments = parser.parse_args()
    judge_on = "test" if arguments.final else "validation"
    result = {name: of_set(prepared(name, arguments.cache), judge_on) for name in arguments.sets}
    if arguments.final:
        write(result_path("combined"), f"combined {' '.join(arguments.sets)} --final", {"sets": result})
    print(json.dumps(result, indent=1))


def of_set(data: Data, judge_on: str) -> dict[str, Any]:
    probes = {name: baselines(data)[name]() for name in PROBES}
    name = best_probe(probes)
    sequences = VARIANTS["these, and the probe of means so far"](data)
    runs = [track(data, sequences, seed=seed) for seed in SEEDS]
    both = [together(run, probes[name], data.labels, data.where("validation")) for run in runs]
    rows = data.where(judge_on)
    labels, groups = data.labels[rows], [data.groups[row] for row in rows]
    beside = probes[name].values[rows]
    return {
        "best probe": name,
        "probe": judged(data, probes[name], judge_on),
        "with it": judged(data, both[0], judge_on),
        "seeds": [round(float(auroc(one.values[rows], labels)), 3) for one in both],
        "minus best probe": [difference(one.values[rows], beside, labels, groups) for one in both],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
