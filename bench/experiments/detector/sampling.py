"""`python -m bench.experiments.detector.sampling passage dialogue`: ten sampled answers to each prompt of a test part.

For the methods that compare an answer with others to the same prompt. Cached beside what `extract` keeps, shard by
shard, so that a run that was stopped goes on where it was. A prompt's samples come from random numbers of its own, so
they do not depend on what else is in the batch, but for rounding.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AttentionInterface, DynamicCache

from bench.experiments.detector.extract import default_cache
from bench.experiments.detector.items import Item, draw, split_of
from bench.experiments.detector.reading import NEW_TOKENS, padded
from bench.experiments.detector.sets import SETS
from bench.experiments.detector.store import keys_of
from eigentrack.loading import demo_model, load_causal_lm
from eigentrack.taps import end_tokens_of, find_blocks

SAMPLES, SHARD, BATCH = 10, 24, 8


@dataclass(frozen=True)
class Way:
    """How tokens are drawn."""

    temperature: float
    top_k: int | None = None
    top_p: float = 1.0


WAYS = {"free": Way(1.0), "inside": Way(0.5, 5, 0.99)}  # SelfCheckGPT's, and INSIDE's (arXiv 2402.03744)
WANTED = {"passage": ("free", "inside"), "dialogue": ("free",)}  # twins share their prompt: INSIDE cannot differ
DIALOGUES = 50  # with the own and the matched questions of 100 passages, 300 answers


@dataclass(frozen=True)
class Sampled:
    """What was drawn for a prompt one way.

    Attributes:
        texts: SAMPLES of them.
        states: (SAMPLES, D) of the middle block behind the last token before the end.
    """

    texts: list[str]
    states: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=list(WANTED))
    parser.add_argument("--cache", type=Path, default=default_cache())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_causal_lm(demo_model())
    sampler = Sampler(model)
    for name in arguments.sets:
        items = chosen_items(name, SETS[name](tokenizer))
        sample_items(sampler, tokenizer, items, WANTED[name], arguments.cache / name / "samples", name)


def chosen_items(name: str, items: list[Item]) -> list[Item]:
    """Of the test part: the first dialogues; of all passages the own and the matched question, all own ones first."""
    tested = [item for item in items if item.strict and split_of(item.group) == "test"]
    if name == "dialogue":
        return tested[:DIALOGUES]
    return [item for kind in ("own", "matched") for item in tested if item.kind == kind]


def sample_items(
    sampler: "Sampler", tokenizer: Any, items: list[Item], ways: tuple[str, ...], folder: Path, what: str
) -> None:
    """Samples items that no shard holds yet."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = sorted(folder.glob("*.safetensors"))
    known = {key for shard in shards for key in keys_of(shard)}
    missing = [item for item in items if item.key not in known]
    for start in tqdm(range(0, len(missing), SHARD), desc=f"sampling {what}", unit="shard"):
        some = missing[start : start + SHARD]
        tokens, states = _of_shard(sampler, tokenizer, some, ways)
        texts = [[[tokenizer.decode(one) for one in group] for group in item] for item in tokens]
        header = {"keys": [item.key for item in some], "ways": ways, "texts": texts}
        path = folder / f"{len(known) + start:05d}.safetensors"
        partial = path.with_suffix(f".partial-{os.getpid()}")
        save_file({"states": states}, partial, {name: json.dumps(value) for name, value in header.items()})
        partial.rename(path)


def _of_shard(
    sampler: "Sampler", tokenizer: Any, items: list[Item], ways: tuple[str, ...]
) -> tuple[list[list[list[list[int]]]], Tensor]:
    """Tokens by item, way and sample, and (items, ways, SAMPLES, D) states. Batches are of like length."""
    prompts = [tokenizer(item.prompt, add_special_tokens=False).input_ids for item in items]
    order = sorted(range(len(items)), key=lambda index: len(prompts[index]))
    tokens: dict[int, list[list[list[int]]]] = {}
    states: dict[int, Tensor] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        chances = torch.stack([chances_of(items[index].key, len(ways)) for index in batch])
        drawn, seen = sampler.sample([prompts[index] for index in batch], [WAYS[way] for way in ways], chances)
        tokens.update(zip(batch, drawn, strict=True))
        states.update(zip(batch, seen, strict=True))
    places = range(len(items))
    return [tokens[index] for index in places], torch.stack([states[index] for index in places])


def chances_of(key: str, ways: int) -> Tensor:
    """(ways, SAMPLES, NEW_TOKENS) in [0, 1), that depend on the item alone."""
    generator = torch.Generator().manual_seed(int(draw(f"samples {key}") * 2**53))
    return torch.rand(ways, SAMPLES, NEW_TOKENS, generator=generator, dtype=torch.float64)


def read_samples(folder: Path) -> dict[str, dict[str, Sampled]]:
    """By the item's key and by way.

    Raises:
        FileNotFoundError: if there are none.
    """
    paths = sorted((folder / "samples").glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"no samples in {folder}: run python -m bench.experiments.detector.sampling {folder.name}"
        )
    found = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            header, states = file.metadata(), file.get_tensor("states")
        ways = json.loads(header["ways"])
        for key, texts, seen in zip(json.loads(header["keys"]), json.loads(header["texts"]), states, strict=True):
            found[key] = {way: Sampled(*both) for way, *both in zip(ways, texts, seen, strict=True)}
    return found


class Sampler:
    """Reads each prompt once, and draws all its answers behind one copy of its keys and values."""

    def __init__(self, model: Any) -> None:
        AttentionInterface.register("shared prompt", shared_prompt_attention)
        self.model = model
        blocks = find_blocks(model)
        self._block = blocks[len(blocks) // 2]
        self._ends = torch.tensor(sorted(end_tokens_of(model)))

    @torch.inference_mode()
    def sample(
        self, prompts: list[list[int]], ways: list[Way], chances: Tensor
    ) -> tuple[list[list[list[list[int]]]], Tensor]:
        """Tokens by prompt, way and sample, without the end token, and the middle block's (P, ways, samples, D) hidden
        states behind the last of them (behind the prompt, where there is none). `chances` (P, ways, samples, steps)."""
        seen: list[Tensor] = []
        attention = self.model.config._attn_implementation
        hook = self._block.register_forward_hook(lambda module, args, output: seen.append(_tensor(output)[:, -1]))
        try:
            return self._sample(prompts, ways, chances, seen)
        finally:
            hook.remove()
            self.model.set_attn_implementation(attention)

    def _sample(
        self, prompts: list[list[int]], ways: list[Way], chances: Tensor, seen: list[Tensor]
    ) -> tuple[list[list[list[list[int]]]], Tensor]:
        shape, steps = chances.shape[:3], chances.shape[3]
        ids, mask = padded([torch.tensor(prompt) for prompt in prompts], left=True)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.model.set_attn_implementation("sdpa")
        output = self.model.model(ids, mask, position_ids=positions, use_cache=True)
        shared = SharedPrompt.of(output.past_key_values, mask)
        owner = torch.arange(len(prompts)).repeat_interleave(shape[1] * shape[2])
        next_position = mask.sum(1)[owner]
        last, middle = output.last_hidden_state[owner, -1], seen[-1][owner]
        self.model.set_attn_implementation("shared prompt")
        cache, alive = DynamicCache(), torch.ones(len(owner), dtype=torch.bool)
        tokens: list[list[int]] = [[] for _ in owner]
        for step in range(steps):
            chosen = self._choose(self.model.lm_head(last), ways, chances[..., step])
            alive &= ~torch.isin(chosen, self._ends)
            if not alive.any():
                break
            for row in alive.nonzero()[:, 0].tolist():
                tokens[row].append(int(chosen[row]))
            output = self.model.model(
                chosen[:, None],
                position_ids=(next_position + step)[:, None],
                past_key_values=cache,
                use_cache=True,
                shared_prompt=shared,
            )
            last = output.last_hidden_state[:, 0]
            middle = torch.where(alive[:, None], seen[-1], middle)
        rows = iter(tokens)
        grouped = [[[next(rows) for _ in range(shape[2])] for _ in range(shape[1])] for _ in range(shape[0])]
        return grouped, middle.view(*shape, -1)

    @staticmethod
    def _choose(logits: Tensor, ways: list[Way], chances: Tensor) -> Tensor:
        """(rows,) for logits (rows, V), which are prompts by ways by samples, and chances (P, ways, samples)."""
        by_way = logits.view(*chances.shape, -1)
        chosen = [chosen_token(by_way[:, index], way, chances[:, index]) for index, way in enumerate(ways)]
        return torch.stack(chosen, 1).flatten()


def chosen_token(logits: Tensor, way: Way, chance: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `chance`; logits (..., V), chance (...) in [0, 1)."""
    ids = None
    if way.top_k:
        logits, ids = logits.topk(way.top_k)  # likeliest first
    probabilities = (logits.double() / way.temperature).softmax(-1)
    if way.top_p < 1:
        probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < way.top_p)
    total = probabilities.cumsum(-1)
    place = (total <= chance[..., None] * total[..., -1:]).sum(-1)
    return place if ids is None else ids.gather(-1, place[..., None]).squeeze(-1)


@dataclass(frozen=True)
class SharedPrompt:
    """Of each layer, keys and values (P, heads, L, d) of the prompts; `hidden` (P, 1, 1, L) is −inf at padding."""

    layers: list[tuple[Tensor, Tensor]]
    hidden: Tensor

    @staticmethod
    def of(cache: Any, mask: Tensor) -> "SharedPrompt":
        hidden = torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)
        return SharedPrompt([(layer.keys, layer.values) for layer in cache.layers], hidden[:, None, None])


def shared_prompt_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    shared_prompt: SharedPrompt,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one token per row to its prompt and to what was drawn behind it, key and value (R, kv, S, d).

    Rows of one prompt follow each other, so the prompt's keys are multiplied once for all of them, and never copied.
    """
    keys, values = shared_prompt.layers[module.layer_idx]
    rows, heads, _, width = query.shape
    prompts, kv = keys.shape[:2]
    samples, group = rows // prompts, heads // kv

    def together(by_row: Tensor) -> Tensor:  # (R, kv, group, …) to (P, kv, samples · group, …)
        return by_row.view(prompts, samples, kv, group, -1).transpose(1, 2).flatten(2, 3)

    def apart(by_prompt: Tensor) -> Tensor:
        return by_prompt.unflatten(2, (samples, group)).transpose(1, 2).reshape(rows, kv, group, -1)

    own = query.view(rows, kv, group, width) * scaling
    before = apart(together(own) @ keys.mT + shared_prompt.hidden)
    weights = torch.cat([before, own @ key.mT], 3).softmax(3)
    length = keys.shape[2]
    mixed = apart(together(weights[..., :length].contiguous()) @ values) + weights[..., length:] @ value
    return mixed.reshape(rows, 1, heads, width), None


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


if __name__ == "__main__":
    main()
