"""Samples an answer, and lowers the temperature for the next token while the hidden states look strange.

    python examples/lower_temperature.py --prompt "Tell me about the Duchy of Lower Zamunda."

The gate is the reference score (eigentrack.Reference) above the level that a share of ordinary answers exceeds. The
reference comes from --reference FILE, or is made first from the model's own answers to a few plain questions.
That this makes answers truer is not claimed: it shows how to act on what the monitor sees.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from eigentrack import EigenTrack, Recording, Reference, Step
from eigentrack.loading import demo_model, load_causal_lm
from eigentrack.watch import encode, printable

QUESTIONS = (
    "What is the capital of France?",
    "How do plants make food from sunlight?",
    "Why is the sky blue?",
    "Give me three tips for sleeping well.",
    "What is the difference between a lake and a river?",
    "How do I boil an egg?",
)


class LowerTemperature(LogitsProcessor):
    """Divides the logits of the sequences for which the gate fired by `temperature`; it is the monitor's on_token."""

    def __init__(self, gate: Callable[[Step], Tensor], temperature: float) -> None:
        self.gate, self.temperature = gate, temperature
        self.fired: list[list[bool]] = []  # per watched step, per sequence
        self._now: Tensor | None = None

    def watch(self, step: Step) -> None:
        """Keeps what the gate, (B,) bool, says of the token fed last: the logits that follow are of the next one."""
        self._now = self.gate(step)
        self.fired.append(self._now.tolist())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits; as they are until a token has been watched."""
        now, self._now = self._now, None
        return scores if now is None else torch.where(now[:, None].to(scores.device), scores / self.temperature, scores)


def ordinary(model: Any, tokenizer: Any, tokens: int, **options: Any) -> list[Recording]:
    """The model's sampled answers to plain questions, watched."""
    recordings = []
    with EigenTrack(model, **options) as track:
        for question in QUESTIONS:
            inputs = encode(tokenizer, question).to(model.device)
            model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=1.0)
            recordings.append(track.recording())
    return recordings


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a Hugging Face id, or a .gguf file (default: the demo's)")
    parser.add_argument("--prompt", default="Tell me about the history of the Duchy of Lower Zamunda.")
    parser.add_argument("--reference", type=Path, help="read the reference from this file; made and written if missing")
    parser.add_argument("--share", type=float, default=0.1, help="of ordinary tokens that may pass the gate (0.1)")
    parser.add_argument("--temperature", type=float, default=0.3, help="while the gate fires (0.3; else it is 1)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    model, tokenizer = load_causal_lm(arguments.model or demo_model())
    torch.manual_seed(arguments.seed)
    if arguments.reference and arguments.reference.exists():
        reference = Reference.load(arguments.reference)
    else:
        print(f"reference: {len(QUESTIONS)} answers to plain questions", flush=True)
        reference = Reference.fit(ordinary(model, tokenizer, arguments.max_new_tokens, window=arguments.window))
        if arguments.reference:
            reference.save(arguments.reference)
    limit = reference.threshold(arguments.share)

    lower = LowerTemperature(lambda step: reference.score_step(step) > limit, arguments.temperature)
    inputs = encode(tokenizer, arguments.prompt).to(model.device)
    with EigenTrack(model, window=arguments.window, on_token=lower.watch) as track:
        output = model.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            logits_processor=[lower],
        )
    score = reference.score(track)[0]
    for token, value, (fired,) in zip(track.tokens[0].tolist(), score.tolist(), lower.fired, strict=True):
        print(f"{value:6.2f} {'cooled' if fired else '      '} {printable(tokenizer.decode([token]))}")
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    count = sum(fired for (fired,) in lower.fired)
    print(f"answer: {printable(answer)}")
    print(f"the gate (score > {limit:.2f}) fired at {count} of {track.steps} tokens; there the temperature was lowered")


if __name__ == "__main__":
    main()
