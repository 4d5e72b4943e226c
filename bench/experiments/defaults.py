"""`python -m bench.experiments.defaults [--json FILE]`: what the monitor's settings do to real spectra.

One pass over ordinary and strange texts with a monitor per setting attached at once. Per setting: how much of a window
one direction holds (a spectrum with all of it in one tells nothing), how many eigenvalues exceed the noise edge,
and what it is all for: the area under the ROC curve of the label-free reference score, averaged over the sets.
"""

import argparse
import platform
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from bench.experiments import texts
from bench.experiments.reference_ood import BATCH, SETTINGS, auroc, draw
from bench.experiments.results import write_json
from eigentrack import EigenTrack, Recording, Reference
from eigentrack.loading import demo_model, load_causal_lm
from rmtkernels import DESCRIPTORS

RESULT = texts.ROOT / "bench" / "results" / "defaults.json"
ROWS = {"normalize": "rms"}
AS_THEY_ARE: dict[str, Any] = {"normalize": None}
CHOICES: dict[str, dict[str, Any]] = {
    "rows of root mean square 1, centred, median noise": ROWS,
    "… not centred": {**ROWS, "center": False},
    "… noise from the trace": {**ROWS, "noise": "trace"},
    "… joint, each layer by its trace": {**ROWS, "spectra": "joint"},
    "rows as they are, centred, median noise": AS_THEY_ARE,
    "… not centred ": {**AS_THEY_ARE, "center": False},
    "… joint, each layer by its trace ": {**AS_THEY_ARE, "spectra": "joint"},
    "… joint, as they are, not centred (the paper)": {
        **AS_THEY_ARE,
        "spectra": "joint",
        "layer_scale": "none",
        "center": False,
    },
}
WINDOW = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--texts", type=int, default=60, help="per set; the reference has twice as many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_causal_lm(demo_model())
    tracks = {name: EigenTrack(model, start="prompt", window=WINDOW, **options) for name, options in CHOICES.items()}
    results = {name: run(tracks, tokenizer, name, arguments.texts) for name in SETTINGS}
    report = {
        "made by": "python -m bench.experiments.defaults",
        "model": demo_model().name,
        "window": WINDOW,
        "texts": arguments.texts,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "settings": {choice: {name: result[choice] for name, result in results.items()} for choice in CHOICES},
    }
    write_json(arguments.json, report)
    print(table(report))


def run(tracks: dict[str, EigenTrack], tokenizer: Any, name: str, count: int) -> dict[str, dict[str, Any]]:
    """Figures per choice, on one comparison of `reference_ood`."""
    setting = SETTINGS[name]
    ids = draw(tokenizer, setting.ordinary[1](), setting.tokens, 3 * count)
    reference = look(tracks, ids[: 2 * count], f"{name}: reference")
    ordinary = look(tracks, ids[2 * count :], f"{name}: held out")
    strange = {
        other: look(tracks, draw(tokenizer, make(), setting.tokens, count), f"{name}: {other}")
        for other, make in setting.strange.items()
    }
    results = {}
    for choice in tracks:
        fitted = Reference.fit(reference[choice])
        held_out = mean_scores(fitted, ordinary[choice])
        found = {other: auroc(mean_scores(fitted, seen[choice]), held_out)[0] for other, seen in strange.items()}
        results[choice] = {
            **health(reference[choice]),
            "auroc": found,
            "mean auroc": round(sum(found.values()) / len(found), 3),
        }
    return results


@torch.no_grad()
def look(tracks: dict[str, EigenTrack], ids: list[list[int]], what: str) -> dict[str, list[Recording]]:
    """Teacher-forces the texts with all monitors attached; the first token of each is not watched."""
    recordings: dict[str, list[Recording]] = {name: [] for name in tracks}
    model = next(iter(tracks.values())).model
    with ExitStack() as attached:
        for track in tracks.values():
            attached.enter_context(track)
        for start in tqdm(range(0, len(ids), BATCH), desc=what, unit="batch"):
            fed = torch.tensor(ids[start : start + BATCH])
            first = model(fed[:, :1], use_cache=True)
            for track in tracks.values():
                track.reset()
            model(fed[:, 1:], past_key_values=first.past_key_values)
            for name, track in tracks.items():
                recordings[name].append(track.recording())
    return recordings


def mean_scores(fitted: Reference, recordings: list[Recording]) -> torch.Tensor:
    return torch.cat([fitted.score(recording).nanmean(1) for recording in recordings])


def health(recordings: list[Recording]) -> dict[str, float]:
    """Medians over watched windows of at least eight rows, and over layers."""
    values = torch.cat([recording.descriptors[:, 7:].flatten(0, 1) for recording in recordings])
    values = values.unflatten(1, (-1, len(DESCRIPTORS)))
    column = {name: values[..., index].flatten() for index, name in enumerate(DESCRIPTORS)}
    return {
        "median share of the first eigenvalue": round(float(column["share_1"].median()), 4),
        "windows with nine tenths in one direction": round(float((column["share_1"] > 0.9).double().mean()), 4),
        "median count above the edge": float(column["above_edge"].median()),
    }


def table(report: dict[str, Any]) -> str:
    comparisons = list(SETTINGS)
    lines = [
        "| setting | median p₁ | p₁ > 0.9 | above the edge | " + " | ".join(f"AUROC, {c}" for c in comparisons) + " |",
        "|---" * (4 + len(comparisons)) + "|",
    ]
    for choice, found in report["settings"].items():
        one = found[comparisons[0]]
        cells = [
            f"{one['median share of the first eigenvalue']:.2f}",
            f"{one['windows with nine tenths in one direction']:.1%}",
            f"{one['median count above the edge']:.0f}",
            *(f"{found[comparison]['mean auroc']:.3f}" for comparison in comparisons),
        ]
        lines.append(f"| {choice} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
