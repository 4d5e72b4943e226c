"""Real activations for the benchmarks: hidden states of the demo's model on WikiText-2, kept beside its weights."""

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.experiments.texts import wikitext
from eigentrack.loading import cache_dir, demo_model, load_causal_lm

TOKENS, LENGTH, EVERY = 8192, 256, 4


def activations(width: int) -> Tensor:
    """(8160, width) float32: states of every fourth layer side by side, without the first token of each 256.

    Raises:
        FileNotFoundError: if the data sets are not there (RMTKERNELS_DATA).
    """
    file = cache_dir() / f"bench-activations-{TOKENS}-{LENGTH}-{EVERY}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"states": _forward()}, file)
    states = load_file(file)["states"]
    if states.shape[1] < width:
        raise ValueError(f"there are {states.shape[1]} activations, not {width}")
    return states[:, :width].contiguous()


@torch.no_grad()
def _forward() -> Tensor:
    model, tokenizer = load_causal_lm(demo_model())
    text = "\n".join(wikitext())[: 8 * TOKENS]
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, :TOKENS].view(-1, LENGTH)
    rows = []
    for part in tokens.split(4):
        states = model(part, output_hidden_states=True).hidden_states[1::EVERY]
        rows.append(torch.cat([state[:, 1:].flatten(0, 1) for state in states], dim=1).float())
    return torch.cat(rows)
