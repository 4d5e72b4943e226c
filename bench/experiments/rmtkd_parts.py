"""`python -m bench.experiments.rmtkd_parts`: which part of the narrowing costs what, task by task.

Accuracy, without any distillation, of the models of `rmtkd_text` with one part narrowed: the heads alone, to several
widths (inside a stock BERT theirs follows from the stream's); fewer heads, whole; the inner neurons alone, the stream
with the heads, and everything, as RMT-KD's plan has it. Nothing is trained but the dense models, unless `rmtkd_text`
has left them behind.
"""

import argparse
import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.experiments import rmtkd_text, texts
from bench.experiments.data_text import TASKS, calibration
from bench.experiments.rmtkd_units import Units, shown
from rmtkd import width
from rmtkd.config import Config
from rmtkd.heads import narrow_scores, narrow_values
from rmtkd.planning import plan
from rmtkernels import StreamingCovariance

DENSE_EPOCHS = {"sst2": 1, "qnli": 3, "ag_news": 3}  # as in docs/rmtkd-results.md
HEADS = {f"heads of {width}": width for width in (28, 24, 20, 16)}  # 32 are the encoder's
WHOLE = {f"{count} heads of 32": count for count in (9, 6, 5)}  # of 12
PARTS = ("nothing", *HEADS, *WHOLE, "neurons", "stream and heads", "everything")


def rank_of_heads(model: nn.Module, moment: torch.Tensor, rank: int) -> Any:
    """A copy in which every head's scores and values have this rank, as narrowed heads have; no shape changes."""
    new: Any = copy.deepcopy(model)
    for layer in new.base_model.encoder.layer:
        attention, output = layer.attention.self, layer.attention.output.dense
        h = attention.attention_head_size
        weights = {name: getattr(attention, name).weight.double() for name in ("query", "key", "value")}
        bias = attention.query.bias.double()
        for head in range(0, output.weight.shape[1], h):
            own = slice(head, head + h)
            q, k, v = (weight[own] for weight in weights.values())
            queries = q @ moment @ q.T + torch.outer(bias[own], bias[own])
            b, d = narrow_scores(queries, k @ moment @ k.T, rank)
            attention.key.weight[own] = b @ d.T @ k
            b, d = narrow_values(v @ moment @ v.T, output.weight[:, own], rank)
            # The values' bias passes any attention whole: it goes to the output layer, as in rmtkd.width_bert.
            output.bias += (output.weight[:, own].double() @ attention.value.bias[own].double()).float()
            attention.value.weight[own], attention.value.bias[own] = b @ d.T @ v, 0
    return new


@torch.no_grad()
def fewer_heads(model: nn.Module, batches: Iterable[Any], count: int) -> Any:
    """A copy in which the output layer of every attention reads so many heads and no other; no shape changes.

    What the heads pass to it, a, has the covariance C and the mean m. Heads go one by one, always the one without which
    the others give the least E‖W (a − m) − A (a_S − m_S)‖², A = W C_{·S} C_SS⁻¹.
    """
    new: Any = copy.deepcopy(model)
    for layer, (covariance, mean) in zip(new.base_model.encoder.layer, passed_on(model, batches), strict=True):
        h, output = layer.attention.self.attention_head_size, layer.attention.output.dense
        weight = output.weight.double()
        kept = list(range(len(mean) // h))
        while len(kept) > count:
            without = {head: [other for other in kept if other != head] for head in kept}
            kept = min(without.values(), key=lambda heads: refitted(weight, covariance, columns(heads, h))[1])
        chosen = columns(kept, h)
        fitted = refitted(weight, covariance, chosen)[0]
        output.bias += (weight @ mean - fitted @ mean[chosen]).float()
        output.weight.zero_()
        output.weight[:, chosen] = fitted.float()
    return new


def columns(heads: list[int], width: int) -> torch.Tensor:
    return torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])


def refitted(weight: torch.Tensor, covariance: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A, and what it explains of the output's variance, negated."""
    crossed = weight @ covariance[:, chosen]
    own = covariance[chosen][:, chosen]
    own = own + 1e-6 * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
    fitted = torch.linalg.solve(own, crossed.T).T
    return fitted, -float((fitted * crossed).sum())


def passed_on(model: Any, batches: Iterable[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Covariance and mean of the rows that each attention's output layer reads."""
    states = [
        StreamingCovariance(model.config.hidden_size, dtype=torch.float64) for _ in model.base_model.encoder.layer
    ]
    hooks = [
        layer.attention.output.dense.register_forward_pre_hook(
            lambda module, args, state=state: state.update(args[0].flatten(0, -2).double())
        )
        for layer, state in zip(model.base_model.encoder.layer, states, strict=True)
    ]
    try:
        for batch in batches:
            model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for hook in hooks:
            hook.remove()
    return [(state.covariance(), state.mean) for state in states]


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
            return rank_of_heads(self.model, self.plan.covariances["residual"].double(), HEADS[part])  # type: ignore[no-any-return]
        if part in WHOLE:
            return fewer_heads(self.model, self.batches(), WHOLE[part])  # type: ignore[no-any-return]
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
