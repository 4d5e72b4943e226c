"""Generates from prompts and prints each token with its spectral descriptors as it comes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigentrack.clock import Overhead
from eigentrack.live import Live
from eigentrack.monitor import EigenTrack
from eigentrack.options import FEW
from eigentrack.recording import Recording, current_versions
from eigentrack.step import Step
from rmtkernels import DESCRIPTORS

# 256-colour codes from calm to alarmed; the risk picks one, or without a detector the rank of a token's entropy among
# those so far.
_COLOURS = (27, 33, 39, 44, 48, 82, 154, 190, 220, 208, 196)


@dataclass(frozen=True)
class Watched:
    """One generation. `threshold` is the detector's; None without one, or without calibration."""

    prompt: str
    text: str
    recording: Recording
    overhead: Overhead
    threshold: float | None = None

    @property
    def descriptors(self) -> Tensor:
        """(T, S, F) of one spectrum each."""
        descriptors: Tensor = self.recording.descriptors[0].unflatten(1, (-1, len(DESCRIPTORS)))
        return descriptors

    @property
    def eigenvalues(self) -> Tensor:
        """(T, S, N)."""
        return self.recording.eigenvalues[0]

    @property
    def risk(self) -> Tensor | None:
        """(T,), or None without a detector."""
        return None if self.recording.risk is None else self.recording.risk[0]

    @property
    def layers(self) -> list[int]:
        """Indices of the watched blocks."""
        return self.recording.layers


class _Printer:
    """Prints each step as it comes: the monitor's on_token."""

    def __init__(
        self,
        tokenizer: Any,
        window: int,
        center: bool,
        colour: bool,
        write: Callable[[str], None],
        threshold: float | None = None,
    ) -> None:
        self.tokenizer, self.window, self.center, self.colour, self.write = tokenizer, window, center, colour, write
        self.threshold = threshold
        self.entropies: list[float] = []

    def __call__(self, step: Step) -> None:
        spectra = step.descriptors[0].unflatten(0, (-1, len(DESCRIPTORS)))
        risk = None if step.risk is None else float(step.risk[0])
        self._line(step.index, int(step.tokens[0]), spectra.mean(0), risk)

    def _line(self, step: int, token: int, mean: Tensor, risk: float | None) -> None:
        values = [float(mean[DESCRIPTORS.index(name)]) for name in FEW]
        fullness = relative_entropy(values[1], step, self.window, self.center)
        self.entropies.append(fullness)
        text = f"{printable(self.tokenizer.decode([token])):<16.16}"
        if self.colour:
            rank = sum(e <= fullness for e in self.entropies) / len(self.entropies)
            text = _paint(text, rank if risk is None else risk)
        if risk is None:
            last = "▇" * round(20 * fullness)
        else:
            last = f"{risk:5.3f}  " + "▇" * round(20 * risk)
            last += "  !" if self.threshold is not None and risk > self.threshold else ""
        self.write(f"{step:4d}  {text}  {values[0]:7.3f}  {values[1]:7.3f}  {values[2]:7.2f}  {values[3]:5.1f}  {last}")


def watch(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 96,
    colour: bool = True,
    write: Callable[[str], None] = print,
    live: Live | None = None,
    **options: Any,
) -> Watched:
    """Generates greedily from one prompt, printing as it goes, and telling a live page; `options` go to EigenTrack.

    Raises:
        What EigenTrack raises.
    """
    inputs = encode(tokenizer, prompt).to(model.device)
    with EigenTrack(model, tokenizer=tokenizer, **options) as track:
        what = "mean over the watched layers" if track.spectra == "per_layer" else "the joint spectrum"
        write(f"prompt: {printable(prompt)}")
        write(f"layers {', '.join(map(str, track.layers))}; window {track.window}; {what}")
        detector = track.detector
        threshold = detector.threshold if detector is not None and detector.calibrated else None
        last = "entropy / ln n" if detector is None else f"{'risk':<5}"
        if threshold is not None:
            last += f"  ! above {threshold:.3f}"
        write(f"{'step':>4}  {'token':<16}  {'λ₁/Σλ':>7}  {'entropy':>7}  {'eff.rank':>7}  {'>edge':>5}  {last}")
        listeners: list[Callable[[Step], None]] = [
            _Printer(tokenizer, track.window, track.center, colour, write, threshold)
        ]
        if live is not None:
            listeners.append(live.follow(track, tokenizer, prompt, threshold))
        track.on_token = lambda step: [listener(step) for listener in listeners]
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    recording = track.recording() if track.watching else _nothing_watched(track)
    return Watched(prompt, text, recording, track.overhead(), threshold)


def _nothing_watched(track: EigenTrack) -> Recording:
    """Of an answer that ended with its first token."""
    spectra = len(track.names) // len(DESCRIPTORS)
    return Recording(
        descriptors=torch.empty(1, 0, len(track.names)),
        eigenvalues=torch.empty(1, 0, spectra, track.window),
        tokens=torch.empty(1, 0, dtype=torch.int64),
        watched=torch.empty(1, 0, dtype=torch.bool),
        settings=track.settings,
        versions=current_versions(),
        risk=None if track.detector is None else torch.empty(1, 0),
    )


def encode(tokenizer: Any, prompt: str) -> Any:
    """The prompt as model inputs, through the chat template if the tokenizer has one."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return tokenizer(prompt, return_tensors="pt")


def relative_entropy(entropy: float, step: int, window: int, center: bool) -> float:
    """Entropy as a share of its maximum ln n, so that a window still filling up compares with a full one."""
    n = min(step + 1, window) - int(center)
    return entropy / math.log(n) if n > 1 else 0.0


def printable(text: str) -> str:
    """Text on one line, without control characters: what a model writes must not drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _paint(text: str, rank: float) -> str:
    return f"\x1b[38;5;{_COLOURS[round(rank * (len(_COLOURS) - 1))]}m{text}\x1b[0m"
