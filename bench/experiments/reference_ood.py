"""`python -m bench.experiments.reference_ood [--json FILE]`: does the reference score tell strange text from ordinary?

Per text the mean of a score over its tokens; AUROC against held-out ordinary text, higher = stranger fixed in advance.
Beside it what anybody would try first: log_trace alone (the size of the activations' deviations); the number of words
(as distance from the ordinary number); perplexity (one-sided, and as distance); and the same robust distance taken on
mean input embeddings and mean hidden states.
"""

import argparse
import platform
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from bench.experiments import texts
from bench.experiments.results import write_json
from eigentrack import EigenTrack, Recording, Reference
from eigentrack.loading import demo_model, load_causal_lm
from eigentrack.reference import CLIP, FLOOR
from rmtkernels import DESCRIPTORS

BATCH, SEED, DRAWS = 8, 0, 1000
RESULT = texts.ROOT / "bench" / "results" / "reference-ood.json"


class Setting(NamedTuple):
    """One comparison: texts of `tokens` tokens at least, cut to so many, so that length says nothing."""

    tokens: int
    ordinary: tuple[str, Callable[[], list[str]]]
    strange: dict[str, Callable[[], list[str]]]


SETTINGS = {
    "passages": Setting(
        64,
        ("HaluEval QA passages", texts.passages),
        {
            "WikiText-2 paragraphs": texts.wikitext,
            "AG News": texts.news,
            "ChatGPT's answers": texts.assistant,
            "EU law": texts.law,
            "GSM8K problems": texts.arithmetic,
            "Python functions": texts.code,
            "the passages, words shuffled": texts.shuffled(texts.passages),
        },
    ),
    "questions": Setting(
        8,
        ("WebQuestions", texts.web_questions),
        {
            "HaluEval QA questions": texts.hotpot_questions,
            "CLINC150 requests": texts.requests,
            "GSM8K problems": texts.arithmetic,
            "the questions, words shuffled": texts.shuffled(texts.web_questions),
        },
    ),
}


class Seen(NamedTuple):
    """What was measured of one set of texts."""

    recordings: list[Recording]
    words: Tensor  # (texts,)
    nll: Tensor  # (texts,) mean negative log-likelihood per token, nats
    embedding: Tensor  # (texts, D) means over tokens
    hidden: Tensor  # (texts, layers * D) of the watched layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--texts", type=int, default=100, help="per set; the reference has twice as many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_causal_lm(demo_model())
    track = EigenTrack(model, start="prompt", window=32)
    results = {name: run(track, tokenizer, setting, arguments.texts) for name, setting in SETTINGS.items()}
    settings = track.settings
    report = {
        "made by": "python -m bench.experiments.reference_ood",
        "model": demo_model().name,
        "monitor": {"layers": settings.layers, "window": settings.window, "start": settings.start},
        "descriptors": DESCRIPTORS,
        "texts": {"ordinary": arguments.texts, "strange": arguments.texts, "reference": 2 * arguments.texts},
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "auroc": "value, and the interval of 90 % of a bootstrap over texts",
        "settings": results,
    }
    write_json(arguments.json, report)
    print(table(report))


def run(track: EigenTrack, tokenizer: Any, setting: Setting, count: int) -> dict[str, Any]:
    """The figures of one setting."""
    name, source = setting.ordinary
    ids = draw(tokenizer, source(), setting.tokens, 3 * count)
    reference = look(track, tokenizer, ids[: 2 * count], f"{name} (reference)")
    ordinary = look(track, tokenizer, ids[2 * count :], f"{name} (held out)")
    fitted = Reference.fit(reference.recordings)
    size = Reference.fit(reference.recordings, only=["log_trace"])
    held_out = scores(fitted, size, reference, ordinary)
    result: dict[str, Any] = {
        "ordinary": name,
        "tokens": setting.tokens,
        "median score of ordinary text": float(held_out["spectra"].median()),
        "ordinary tokens above the reference's 1 %": share_above(fitted, ordinary.recordings),
        "strange": {},
    }
    for other, make in setting.strange.items():
        seen = look(track, tokenizer, draw(tokenizer, make(), setting.tokens, count), other)
        found = scores(fitted, size, reference, seen)
        result["strange"][other] = {
            "texts": len(seen.words),
            "tokens above the reference's 1 %": share_above(fitted, seen.recordings),
            "auroc": {column: auroc(found[column], held_out[column]) for column in found},
        }
    return result


def draw(tokenizer: Any, pool: list[str], tokens: int, count: int) -> list[list[int]]:
    """Token ids of `count` texts (or all there are) that are long enough, cut to one length."""
    pool = random.Random(SEED).sample(pool, len(pool))
    chosen: list[list[int]] = []
    for text in pool:
        ids = tokenizer(text).input_ids
        if len(ids) >= tokens:
            chosen.append(ids[:tokens])
        if len(chosen) == count:
            break
    return chosen


@torch.no_grad()
def look(track: EigenTrack, tokenizer: Any, ids: list[list[int]], what: str) -> Seen:
    """Teacher-forces the texts, in batches. The first token of each is fed but not watched."""
    recordings, nll, embedding, hidden = [], [], [], []
    with track:
        for start in tqdm(range(0, len(ids), BATCH), desc=what, unit="batch"):
            fed = torch.tensor(ids[start : start + BATCH])
            first = track.model(fed[:, :1], use_cache=True)
            track.reset()  # the first token's massive activation would rule every window that holds it
            output = track.model(fed[:, 1:], past_key_values=first.past_key_values, output_hidden_states=True)
            recordings.append(track.recording())
            logits = torch.cat([first.logits, output.logits[:, :-1]], 1)
            nll.append(torch.nn.functional.cross_entropy(logits.mT, fed[:, 1:], reduction="none").mean(1))
            states = output.hidden_states
            embedding.append(states[0].mean(1))
            hidden.append(torch.cat([states[layer + 1].mean(1) for layer in track.layers], 1))
    words = torch.tensor([len(tokenizer.decode(row).split()) for row in ids], dtype=torch.float32)
    return Seen(recordings, words, torch.cat(nll), torch.cat(embedding), torch.cat(hidden))


def scores(fitted: Reference, size: Reference, reference: Seen, seen: Seen) -> dict[str, Tensor]:
    """Per text, higher = stranger: ours and what it is compared with."""
    return {
        "spectra": text_scores(fitted, seen),
        "log_trace alone": text_scores(size, seen),
        "words": robust(seen.words[:, None], reference.words[:, None]),
        "perplexity": seen.nll,
        "perplexity, both sides": robust(seen.nll[:, None], reference.nll[:, None], clip=torch.inf),
        "mean embedding": robust(seen.embedding, reference.embedding),
        "mean hidden state": robust(seen.hidden, reference.hidden),
    }


def text_scores(fitted: Reference, seen: Seen) -> Tensor:
    """(texts,) means over the tokens."""
    return torch.cat([fitted.score(recording).nanmean(1) for recording in seen.recordings])


def robust(values: Tensor, reference: Tensor, clip: float = CLIP) -> Tensor:
    """The distance of the reference score, on (texts, D) values instead of descriptors."""
    median = reference.median(0).values
    scale = 1.4826 * (reference - median).abs().median(0).values + FLOOR
    return ((values - median) / scale).clamp(-clip, clip).square().mean(1).sqrt()


def share_above(fitted: Reference, recordings: list[Recording]) -> float:
    """The share of tokens with a score that one in a hundred of the reference's tokens exceeds."""
    found = torch.cat([fitted.score(recording).flatten() for recording in recordings])
    return float((found[~found.isnan()] > fitted.threshold(0.01)).double().mean())


def auroc(strange: Tensor, ordinary: Tensor) -> list[float]:
    """[value, low, high]: how often a strange text scores above an ordinary one."""
    above = (strange[:, None] > ordinary).double() + 0.5 * (strange[:, None] == ordinary).double()
    wins, generator = above.numpy(), np.random.default_rng(SEED)
    drawn = [
        wins[generator.integers(0, len(strange), len(strange))][:, generator.integers(0, len(ordinary), len(ordinary))]
        for _ in range(DRAWS)
    ]
    low, high = np.quantile([one.mean() for one in drawn], (0.05, 0.95))
    return [round(float(value), 3) for value in (wins.mean(), low, high)]


def table(report: dict[str, Any]) -> str:
    """Markdown, the best column of a row in bold."""
    lines = []
    for result in report["settings"].values():
        columns = list(next(iter(result["strange"].values()))["auroc"])
        lines += ["", f"| against {result['ordinary']} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, row in result["strange"].items():
            best = max(row["auroc"].values())
            cells = [f"**{v[0]:.3f}**" if v == best else f"{v[0]:.3f}" for v in row["auroc"].values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    main()
