"""The report: one HTML page that holds everything it needs, made from watched generations."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigentrack.errors import EigenTrackError, MismatchError
from eigentrack.files import Settings, write_whole
from eigentrack.recording import Recording
from rmtkernels import DESCRIPTORS

_HTML = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def write_report(path: str | Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Writes the page of `runs_of` one or several recordings, whole or not at all.

    Raises:
        OSError: if the file cannot be written, or `path` names no file.
    """
    write_whole(path, page(runs).encode())


def page(runs: Sequence[Mapping[str, Any]], *, live: bool = False) -> str:
    """The page, with its style, script and data inside. It may load nothing; a live one only listens to its server."""
    parts = {name: files("eigentrack").joinpath("page", f"page.{name}").read_text("utf-8") for name in _PARTS}
    allowed = {"style-src": _hash(parts["css"]), "script-src": _hash(parts["js"])}
    allowed |= {"connect-src": "'self'"} if live else {}
    nothing = ("default-src", "base-uri", "form-action")
    policy = "; ".join(f"{name} {source}" for name, source in (dict.fromkeys(nothing, "'none'") | allowed).items())
    filled = {
        "policy": policy,
        "style": parts["css"],
        "script": parts["js"],
        "data": island({"live": live, "measures": DESCRIPTORS, "runs": runs}),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], parts["html"])  # one pass: data are never filled


_PARTS = ("html", "css", "js")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def island(value: Any) -> str:
    """JSON that is safe inside a <script> element: plain ASCII, and nothing that HTML would read as a tag."""
    return re.sub("[<>&]", lambda found: _HTML[found[0]], json.dumps(value, allow_nan=False, separators=(",", ":")))


def runs_of(
    recording: Recording,
    tokenizer: Any = None,
    prompts: Sequence[str] | None = None,
    threshold: float | None = None,
) -> list[dict[str, Any]]:
    """What the page shows of each sequence.

    Raises:
        MismatchError: if there are not as many prompts as sequences.
        EigenTrackError: if the threshold is not from 0 to 1.
    """
    batch = len(recording.tokens)
    if prompts is not None and (isinstance(prompts, str) or len(prompts) != batch):
        raise MismatchError(f"prompts must be a list of {batch}, one for each sequence")
    if threshold is not None and not 0 <= threshold <= 1:
        raise EigenTrackError(f"a risk is from 0 to 1, so the threshold must be, got {threshold!r}")
    values = torch.cat([_by_layer(recording.descriptors), recording.eigenvalues], -1)
    runs = []
    for row in range(batch):
        steps = int(recording.watched[row].nonzero().max()) + 1 if recording.watched[row].any() else 0
        decode = TokenTexts(tokenizer)
        risk = None if recording.risk is None else recording.risk[row, :steps]
        runs.append(
            heading(recording.settings, recording.versions, None if prompts is None else prompts[row], threshold)
            | chunk([decode(token) for token in recording.tokens[row, :steps].tolist()], values[row, :steps], risk)
        )
    return runs


def _by_layer(descriptors: Tensor) -> Tensor:
    """(..., F) to (..., S, descriptors of one spectrum)."""
    by_layer: Tensor = descriptors.unflatten(-1, (-1, len(DESCRIPTORS)))
    return by_layer


def heading(
    settings: Settings, versions: Mapping[str, str], prompt: str | None, threshold: float | None
) -> dict[str, Any]:
    """What the page says of a run before its first token."""
    return {
        "prompt": prompt,
        "model": settings.model,
        "layers": ["joint"] if settings.spectra == "joint" else list(settings.taps),
        "window": settings.window,
        "threshold": threshold,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def chunk(texts: list[str], values: Tensor, risk: Tensor | None) -> dict[str, Any]:
    """Steps of a run.

    Args:
        texts: of T tokens.
        values: (T, S, descriptors, then eigenvalues).
        risk: (T,), or None without a detector.
    """
    # Bytes and not numbers in JSON: exact, shorter, and NaN has a place.
    numbers = values.to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes()
    risks = None if risk is None else [None if math.isnan(value) else round(value, 6) for value in risk.tolist()]
    return {"tokens": texts, "risk": risks, "values": base64.b64encode(numbers).decode()}


class TokenTexts:
    """The text that each token adds. A character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # a token that has been told, as context: many tokenizers eat a leading space
        self._pending: list[int] = []

    def __call__(self, token: int) -> str:
        if token < 0:
            return "⟨embedding⟩"
        if self._tokenizer is None:
            return f"⟨{token}⟩"
        self._pending.append(token)
        context = self._tokenizer.decode(self._before)
        text: str = self._tokenizer.decode([*self._before, *self._pending])
        if text.endswith("\ufffd") and len(self._pending) < _BYTES_OF_A_CHARACTER:
            return ""
        added = text[len(context) :] if text.startswith(context) else self._tokenizer.decode(self._pending)
        self._before, self._pending = self._pending, []
        return added


_BYTES_OF_A_CHARACTER = 4
