"""`python -m bench.experiments.rmtkd_language`: factor mode on SmolLM2-135M without training, against equal budgets.

Perplexity on windows of WikiText-2 after a compression that saw other windows of it. RMT-KD's quantile is the smallest
whose ranks fit the budget (on the eigenvalues alone, before any perplexity is known); the others are given exactly the
number of parameters its output side took. Projected are the linear layers of every third block, for time's sake;
slicing cuts the residual stream of the whole model instead, the tied embedding with it.
"""

import argparse
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.experiments import rmtkd_baselines, rmtkd_slicing, texts
from bench.experiments.rmtkd_units import Units, parameters
from eigentrack.loading import demo_model, load_causal_lm
from rmtkd import factor
from rmtkd.compression import compress
from rmtkd.config import Config
from rmtkd.planning import Plan, plan
from rmtkd.rank import choose

RESULT = texts.ROOT / "bench" / "results" / "rmtkd-language.json"
LENGTH, CALIBRATION, TEST = 512, 16, 6
BLOCKS = tuple(f"model.layers.{i}.*" for i in range(1, 30, 3))
BUDGETS = (0.95, 0.9)
ABOUT = {"text": f"WikiText-2 valid, windows of {LENGTH} tokens: first {CALIBRATION} to calibrate, last {TEST} to test"}
SIDES = {"RMT-KD, outputs": "output", "RMT-KD, inputs": "input"}
METHODS = (*SIDES, "whitened SVD", "plain SVD", "slicing", "slicing, one rotation")


def load() -> tuple[Any, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The model, and windows of token ids to calibrate and to test."""
    model, tokenizer = load_causal_lm(demo_model())
    ids = tokenizer("\n".join(texts.wikitext()), return_tensors="pt").input_ids[0]
    windows = [{"input_ids": window[None]} for window in ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)]
    return model, windows[:CALIBRATION], windows[-TEST:]


@torch.no_grad()
def perplexity(model: Any, windows: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Over all windows, and the negative log-likelihood per token (nats) of each."""
    per_window = []
    for window in windows:
        found = model(**window).logits[0, :-1]
        per_window.append(float(functional.cross_entropy(found, window["input_ids"][0, 1:])))
    mean = sum(per_window) / len(per_window)
    return {
        "perplexity": round(math.exp(mean), 3),
        "nats per token": [round(value, 4) for value in per_window],
        "parameters": parameters(model),
    }


class Experiment:
    def __init__(self) -> None:
        self.model, self.windows, self.test = load()
        self.names = [
            name
            for name in rmtkd_baselines.factorable(self.model)
            if any(fnmatchcase(name, pattern) for pattern in BLOCKS)
        ]
        self.found: dict[str, Any] = {}

    def once(self, what: str, make: Callable[[], Any]) -> Any:
        if what not in self.found:
            self.found[what] = make()
        return self.found[what]

    def plan(self, side: str) -> Plan:
        config = Config(mode="factor", side=side, modules=BLOCKS, multiple=1, min_ratio=0.0, keep_slower=True)
        return self.once(side, lambda: plan(self.model, self.windows, config))  # type: ignore[no-any-return]

    def at(self, made: Plan, quantile: float) -> Plan:
        """The plan as it would be with another quantile: the spectra are the same."""
        config = replace(made.config, quantile=quantile)
        modules = dict(self.model.named_modules())
        layers, saved = [], 0
        for layer in made.layers:
            choice = choose(layer.eigenvalues, layer.choice.rows, config)
            dense, projected = factor.parameters(modules[layer.name], choice.rank, config.side)
            saved += max(0, dense - projected)
            layers.append(replace(layer, choice=choice, rank=choice.rank, keep_dense=""))
        before = parameters(self.model)
        return replace(made, config=config, layers=tuple(layers), model_parameters=(before, before - saved))

    def rmtkd(self, side: str, share: float) -> dict[str, Any]:
        """With the smallest quantile of 0.01, 0.02, … that keeps at most this share of the parameters."""
        made = self.plan(side)
        quantiles = [step / 100 for step in range(1, 100)]
        most = share * parameters(self.model)
        place = bisect_left(quantiles, -most, key=lambda quantile: -self.at(made, quantile).model_parameters[1])
        if place == len(quantiles):
            raise ValueError(f"no quantile cuts to {share:.0%}")
        found = self.at(made, quantiles[place])
        return {"quantile": quantiles[place], **perplexity(compress(self.model, found), self.test)}

    def student(self, method: str, total: int) -> nn.Module:
        if method == "plain SVD":
            return rmtkd_baselines.svd(self.model, self.names, total)
        if method == "whitened SVD":
            found = self.once("moments", lambda: rmtkd_baselines.moments(self.model, self.windows, self.names))
            return rmtkd_baselines.svd(self.model, self.names, total, found)
        shared = method != "slicing"
        positions = self.once(method, lambda: rmtkd_slicing.llama_rotations(self.model, self.windows, shared))

        def build(width: int) -> nn.Module:
            return rmtkd_slicing.slice_llama(self.model, width, positions)  # type: ignore[no-any-return]

        return build(rmtkd_slicing.width_for(build, len(positions[0]), total))

    def measure(self, method: str, total: int) -> dict[str, Any]:
        return perplexity(self.student(method, total), self.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {**ABOUT, "projected": BLOCKS, "budgets": BUDGETS}
    units = Units(arguments.json, "python -m bench.experiments.rmtkd_language", settings)
    experiment = Experiment()
    units.once(lambda: perplexity(experiment.model, experiment.test), method="dense", share=1.0)
    for share in BUDGETS:
        run(units, experiment, share)


def run(units: Units, experiment: Experiment, share: float) -> None:
    """All methods with as many parameters as RMT-KD's output side takes."""
    for method, side in SIDES.items():
        units.once(lambda side=side: experiment.rmtkd(side, share), method=method, share=share)  # type: ignore[misc]
    ours = units.get(method="RMT-KD, outputs", share=share)
    assert ours is not None
    for method in METHODS[len(SIDES) :]:
        units.once(
            lambda method=method: experiment.measure(method, ours["parameters"]),  # type: ignore[misc]
            method=method,
            share=share,
        )


if __name__ == "__main__":
    main()
