"""What `extract` cached, answer by answer."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from bench.experiments.detector.items import Item, split_of
from eigentrack.files import write_whole


@dataclass
class Answer:
    """One answer that the model has read.

    Attributes:
        row: its number in the set's shards.
        item, place: the prompt, and which of its answers this is.
        label: 1 = hallucinated, strange, unrelated.
        split: of the item's source.
        text: the answer, decoded.
        hidden: (A, layers, D): the embedding, then the watched blocks.
        choice: (A, 4), see `reading.CHOICE`.
        tokens: (A,).
        laplacian: (blocks, heads, TOP).
        attention: (A, blocks, heads, 2) what each token pays to the first token, and to the rest of the prompt.
        prompt: (layers, D) of the prompt's last token, of root mean square 1.
    """

    row: int
    item: Item
    place: int
    label: int
    split: str
    text: str
    hidden: Tensor = field(repr=False)
    choice: Tensor = field(repr=False)
    tokens: Tensor = field(repr=False)
    laplacian: Tensor = field(repr=False)
    attention: Tensor = field(repr=False)
    prompt: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.tokens)


def write_items(folder: Path, items: list[Item]) -> None:
    """So that the cache can be read without the data set and the tokenizer."""
    write_whole(folder / "items.json", json.dumps([asdict(item) for item in items]).encode())


def keys_of(shard: Path) -> list[str]:
    """Of the items that a shard holds."""
    with safe_open(shard, "pt") as file:
        keys: list[str] = json.loads(file.metadata()["keys"])
    return keys


def read_answers(folder: Path) -> Iterator[Answer]:
    """All answers there are shards of.

    Raises:
        FileNotFoundError: if there are none.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"nothing in {folder}: run python -m bench.experiments.detector.extract {folder.name}")
    fields = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    items = [Item(**{**one, "answers": tuple(one["answers"]), "labels": tuple(one["labels"])}) for one in fields]
    known = {item.key: item for item in items}
    row = 0
    for path in paths:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata()
        yield from _of_shard(tensors, header, known, row)
        row += len(tensors["lengths"])


def _of_shard(
    tensors: dict[str, Tensor], header: dict[str, str], known: dict[str, Item], first: int
) -> Iterator[Answer]:
    keys, texts = json.loads(header["keys"]), json.loads(header["answers"])
    lengths = tensors["lengths"].tolist()
    rows: dict[str, Any] = {name: tensors[name].split(lengths) for name in ("hidden", "choice", "tokens", "attention")}
    prompts = tensors["prompt"][tensors["prompt_lengths"].cumsum(0) - 1].float()
    index = 0
    for key, some, prompt in zip(keys, texts, prompts, strict=True):
        for place, text in enumerate(some):
            if key in known:
                item = known[key]
                yield Answer(
                    first + index,
                    item,
                    place,
                    item.labels[place],
                    split_of(item.group),
                    text,
                    rows["hidden"][index],
                    rows["choice"][index],
                    rows["tokens"][index],
                    tensors["laplacian"][index],
                    rows["attention"][index],
                    prompt,
                )
            index += 1
