"""What every data set is turned into: a prompt, answers under it, a label for each, and a split by source."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}


@dataclass(frozen=True)
class Item:
    """One prompt.

    Attributes:
        key: unique within the set.
        group: the source; items of one group are in one split.
        prompt: the rendered prompt, without answer.
        answers: texts forced behind it; empty if the model is to answer by itself.
        labels: one for each answer: 1 = hallucinated, strange, unrelated.
        kind: which part of the set it is.
        gold: the answer that counts as right, for the model's own answers.
        strict: whether it may be in validation or test; the others only ever train.
    """

    key: str
    group: str
    prompt: str
    answers: tuple[str, ...]
    labels: tuple[int, ...]
    kind: str = ""
    gold: str = ""
    strict: bool = True


def draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(group: str) -> str:
    """Which split the source belongs to, for all time: half trains, a fifth validates, the rest tests."""
    point = draw(f"split {group}")
    for name, share in SHARES.items():
        point -= share
        if point < 0:
            return name
    return "test"


def shuffled(items: Iterable[Item]) -> list[Item]:
    """In an order that depends on the keys alone, so that any first part is a random sample."""
    return sorted(items, key=lambda item: draw(f"order {item.group} {item.key}"))


def merge_groups(links: list[tuple[str, ...]]) -> list[str]:
    """A name for each row, the same for rows that share any of their links, directly or through others."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for names in links:
        for name in names[1:]:
            parent[root(name)] = root(names[0])
    return [root(names[0]) for names in links]
