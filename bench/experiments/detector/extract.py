"""`python -m bench.experiments.detector.extract dialogue qa …`: runs the model on data sets and caches what it saw.

One safetensors shard for 32 items, written aside and renamed: a run that was stopped goes on where it was. Items come
in an order that depends on their keys alone, so the shards there are make a random sample.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from bench.experiments.detector.items import Item
from bench.experiments.detector.reading import Reader
from bench.experiments.detector.sets import SETS
from bench.experiments.detector.store import keys_of, write_items
from eigentrack.loading import cache_dir, demo_model, load_causal_lm

SHARD, BATCH = 32, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=list(SETS))
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--items", type=int, help="at most so many of each set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_causal_lm(demo_model())
    model.set_attn_implementation("eager")
    for name in arguments.sets:
        items, folder = SETS[name](tokenizer), arguments.cache / name
        folder.mkdir(parents=True, exist_ok=True)
        write_items(folder, items)
        extract(Reader(model), tokenizer, items[: arguments.items], folder, name)


def default_cache() -> Path:
    return cache_dir() / "detector"


def extract(reader: Reader, tokenizer: Any, items: list[Item], folder: Path, what: str) -> None:
    """Reads what has no shard yet; a shard of fewer items, from when there were no more, is read again."""
    for start in tqdm(range(0, len(items), SHARD), desc=what, unit="shard"):
        path = folder / f"{start:05d}.safetensors"
        some = items[start : start + SHARD]
        if not path.exists() or len(keys_of(path)) < len(some):
            tensors, texts = read_items(reader, tokenizer, some)
            partial = path.with_suffix(".partial")  # of a run that was killed, it is written over
            save_file(tensors, partial, {"keys": json.dumps([item.key for item in some]), "answers": json.dumps(texts)})
            partial.rename(path)


def read_items(reader: Reader, tokenizer: Any, items: list[Item]) -> tuple[dict[str, Tensor], list[list[str]]]:
    """The tensors of a shard, answers one after the other, and the answers as texts. Batches are of like length."""
    prompts = [tokenizer(item.prompt, add_special_tokens=False).input_ids for item in items]
    answers = [[tokenizer(text, add_special_tokens=False).input_ids for text in item.answers] for item in items]
    order = sorted(range(len(items)), key=lambda index: len(prompts[index]))
    found: dict[int, list[dict[str, Tensor]]] = {}
    for start in range(0, len(items), BATCH):
        batch = order[start : start + BATCH]
        seen = reader.read([prompts[index] for index in batch], [answers[index] for index in batch])
        found.update(zip(batch, seen, strict=True))
    flat = [answer for index in range(len(items)) for answer in found[index]]
    tensors = {name: torch.cat([one[name] for one in flat]) for name in ("hidden", "choice", "tokens", "attention")}
    tensors["laplacian"] = torch.stack([one["laplacian"] for one in flat])
    tensors["prompt"] = torch.cat([found[index][0]["prompt"] for index in range(len(items))])
    tensors["prompt_lengths"] = torch.tensor([len(prompt) for prompt in prompts])
    tensors["lengths"] = torch.tensor([len(one["tokens"]) for one in flat])
    tensors["answers"] = torch.tensor([len(found[index]) for index in range(len(items))])
    texts = [[tokenizer.decode(one["tokens"]) for one in found[index]] for index in range(len(items))]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, texts


if __name__ == "__main__":
    main()
