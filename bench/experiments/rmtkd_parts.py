"""`python -m bench.experiments.rmtkd_parts`: which part of the narrowing costs what, task by task.

Accuracy, without any distillation, of the models of `rmtkd_text` with one part narrowed: every head, to several widths,
or fewer heads, whole (the output layer is fitted to what either passes on); the inner neurons alone; the stream with
its heads; and everything, as RMT-KD's plan has it. Nothing is trained but the dense models, unless `rmtkd_text` has
left them behind.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.experiments import rmtkd_text, texts
from bench.experiments.data_text import TASKS, calibration
from bench.experiments.rmtkd_heads import narrow_scores, narrow_values
from bench.experiments.rmtkd_units import Units, shown
from rmtkd import width
from rmtkd.config import Config
from rmtkd.heads import choose_heads
from rmtkd.neurons import interpolation, regression
from rmtkd.planning import plan

DENSE_EPOCHS = {"sst2": 1, "qnli": 3, "ag_news": 3}  # as in docs/rmtkd-results.md
HEADS = {f"12 heads of {width}": width for width in (28, 24, 20, 16)}  # the encoder's are of 32
WHOLE = {f"{count} heads of 32": count for count in (9, 6, 5)}  # of 12
PARTS = ("nothing", *HEADS, *WHOLE, "neurons", "stream and heads", "everything")


def narrower_heads(model: nn.Module, moments: Mapping[str, torch.Tensor], rank: int) -> Any:
    """A copy in which every head's scores and values have this rank, as heads of this width have; no shape changes."""
    new: Any = copy.deepcopy(model)
    stream = moments["residual"].double()
    for index, layer in enumerate(new.base_model.encoder.layer):
        attention, output = layer.attention.self, layer.attention.output.dense
        moment, written, values = moments[f"layer.{index}.context"], output.weight.double(), []
        for own in torch.arange(len(moment)).chunk(attention.num_attention_heads):
            q, k = attention.query.weight[own].double(), attention.key.weight[own].double()
            bias = attention.query.bias[own].double()
            b, d = narrow_scores(q @ stream @ q.T + torch.outer(bias, bias), k @ stream @ k.T, rank)
            attention.key.weight[own] = (b @ d.T @ k).float()
            values.append(narrow_values(moment[own][:, own], written[:, own], rank)[1])
        read = torch.block_diag(*values)
        crossed = moment @ read
        output.weight.copy_(written @ regression(crossed, read.T @ crossed) @ read.T)
    return new


def fewer_heads(model: nn.Module, moments: Mapping[str, torch.Tensor], count: int) -> Any:
    """A copy in which the output layer of every attention reads so many heads and no other; no shape changes."""
    new: Any = copy.deepcopy(model)
    for index, layer in enumerate(new.base_model.encoder.layer):
        output, heads = layer.attention.output.dense, layer.attention.self.num_attention_heads
        moment, weight = moments[f"layer.{index}.context"], output.weight.double()
        kept = choose_heads(moment, weight, heads, count)
        rows = torch.arange(len(moment)).view(heads, -1)[kept].flatten()
        output.weight.zero_()
        output.weight[:, rows] = (weight @ interpolation(moment, rows)).float()
    return new


class Parts:
    """One task and seed: the dense model, RMT-KD's plan for it, and models narrowed in part."""

    def __init__(self, experiment: rmtkd_text.Experiment) -> None:
        self.experiment, self.model = experiment, experiment.dense()
        self.plan = plan(self.model, self.batches(), experiment.config)

    def batches(self) -> Any:
        return calibration(self.experiment.task.train, self.experiment.seed)

    @torch.no_grad()
    def narrowed(self, part: str) -> nn.Module:
        widths = self.plan.widths
        if part == "nothing":
            return self.model  # type: ignore[no-any-return]
        if part in HEADS:
            return narrower_heads(self.model, self.plan.covariances, HEADS[part])  # type: ignore[no-any-return]
        if part in WHOLE:
            return fewer_heads(self.model, self.plan.covariances, WHOLE[part])  # type: ignore[no-any-return]
        names = {"neurons": ["intermediate_size"], "stream and heads": ["hidden_size"], "everything": list(widths)}
        chosen = {name: widths[name] for name in names[part]}
        return width.narrow(  # type: ignore[no-any-return]
            self.model, chosen, self.plan.covariances, self.experiment.config, self.batches()
        )

    def measure(self, part: str) -> dict[str, Any]:
        return {"widths": dict(self.plan.widths), **self.experiment.score(self.narrowed(part))}


def main() -> None:
    from transformers import AutoTokenizer, logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="SEED")
    parser.add_argument("--json", type=Path, default=texts.ROOT / "bench" / "results" / "rmtkd-parts.json")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    config = Config(mode="width")
    settings = {"dense epochs": DENSE_EPOCHS, "config": shown(config)}
    units = Units(arguments.json, "python -m bench.experiments.rmtkd_parts", settings)
    for name, epochs in DENSE_EPOCHS.items():
        task = TASKS[name](AutoTokenizer.from_pretrained(rmtkd_text.encoder()))
        dense = argparse.Namespace(scratch=False, device="cpu", train=0, dense_epochs=epochs)
        for seed in arguments.seeds:
            parts = Parts(rmtkd_text.Experiment(dense, task, config, seed))
            for part in PARTS:
                units.once(work(parts, part), task=task.name, part=part, seed=seed)


def work(parts: Parts, part: str) -> Callable[[], dict[str, Any]]:
    return lambda: parts.measure(part)


if __name__ == "__main__":
    main()
