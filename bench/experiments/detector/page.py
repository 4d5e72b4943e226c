"""`python -m bench.experiments.detector.page`: tables from the committed results, for docs/detector.md and README.md.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from bench.experiments.detector.early import SEEN
from bench.experiments.detector.report import result_path
from bench.experiments.texts import ROOT

PAGE = ROOT / "docs" / "detector.md"
PAGES = (PAGE, ROOT / "README.md")
BLOCK = re.compile(r"<!-- table: (.*?) -->\n(.*?)\n?<!-- end of table -->", re.DOTALL)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(page: str) -> str:
    """The page with its tables made anew."""
    return BLOCK.sub(lambda block: f"<!-- table: {block[1]} -->\n{table(block[1])}\n<!-- end of table -->", page)


def table(name: str) -> str:
    """Of "methods dialogue", "stopping passage/random" and so on: kind, result and, within it, comparison."""
    if name == "summary":
        return summary()
    kind, place = name.split(" ", 1)
    file, _, part = place.partition("/")
    result = json.loads(result_path(file).read_text(encoding="utf-8"))
    if kind in ("methods", "paper"):
        add_sampled(result, file)
    return TABLES[kind](result[part] if part else result)


SUMMARY = {  # columns of the summary: file and part of it
    "dialogue": ("dialogue", ""),
    "QA": ("qa", ""),
    "HaluEval 2.0": ("facts", ""),
    "matched question": ("passage", "matched"),
    "random question": ("passage", "random"),
}
SUMMARISED = (
    *("last prompt token, best layer", "mean embedding (layer 0)", "perplexity", "HaloScope", "LapEigvals"),
    *("mean hidden state, all layers", "EigenTrack RNN", "EigenTrack GRU", "EigenTrack LSTM"),
    "EigenTrack GRU with vectors",
)


def summary() -> str:
    """AUROC of some methods on every protocol with labels, for the README."""
    results = []
    for file, part in SUMMARY.values():
        result = json.loads(result_path(file).read_text(encoding="utf-8"))
        results.append(result[part] if part else result)
    rows = []
    for name in SUMMARISED:
        found = [result["methods"].get(name) for result in results]
        rows.append([name, *("" if one is None else f"{one['auroc'][0]:.3f}" for one in found)])
    rows.append(["answers in test", *(str(result["counts"]["test"]["answers"]) for result in results)])
    return markdown(["AUROC on the test part", *SUMMARY], rows)


def add_sampled(result: dict[str, Any], file: str) -> None:
    """Puts the methods that sample beside the others, where they have judged the same test part."""
    for place, one in _sampled().items():
        name, _, part = place.partition("/")
        if name == file:
            compared = result[part] if part else result
            if one["answers"] == compared["counts"]["test"]["answers"]:
                compared["methods"] |= one["methods"]


def sampled(curves: dict[str, Any]) -> str:
    """All that was judged on the dialogues that were sampled."""
    here = _sampled()["dialogue"]
    areas = {name: one["auroc where sampled"] for name, one in curves["roc"].items()}
    areas |= {name: one["auroc"] for name, one in here["methods"].items()}
    rows = [[name, interval(one)] for name, one in sorted(areas.items(), key=lambda item: -item[1][0])]
    return markdown(["method", f"AUROC [95 %], {here['answers']} answers"], rows)


def combined(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            one["best probe"],
            interval(one["probe"]["auroc"]),
            interval(one["with it"]["auroc"]),
            " ".join(f"{area:.3f}" for area in one["seeds"]),
            "; ".join(interval(each, "+") for each in one["minus best probe"]),
        ]
        for name, one in result["sets"].items()
    ]
    head = ["set", "best probe", "its AUROC [95 %]", "with the GRU", "seeds", "minus best probe, each seed"]
    return markdown(head, rows)


def _sampled() -> dict[str, Any]:
    sets: dict[str, Any] = json.loads(result_path("sampling").read_text(encoding="utf-8"))["sets"]
    return sets


def methods(result: dict[str, Any]) -> str:
    """One row per method, best first."""
    against = result.get("minus best probe", {})
    head = ["method", "AUROC [95 %]", "seeds", "pairs right", "AUPRC", "F1", "FPR at 95 % found", "calibration error"]
    head += [f"minus {result['best probe of hidden states']}"] if against else []
    rows = []
    for name, one in sorted(result["methods"].items(), key=lambda item: -item[1]["auroc"][0]):
        seeds = " ".join(f"{area:.3f}" for area in one.get("seeds", []))
        pairs = one["pairs right"]
        cells = [name, interval(one["auroc"]), seeds, "" if pairs is None else f"{pairs:.3f}", f"{one['auprc']:.3f}"]
        cells += [f"{one[key]:.3f}" if key in one else "" for key in ("f1", "fpr at 95 % found", "calibration error")]
        rows.append(cells + ([interval(against[name], "+") if name in against else ""] if against else []))
    return markdown(head, rows)


def counts(result: dict[str, Any]) -> str:
    head = ["part", "answers", "of label 1", "sources", "tokens"]
    return markdown(head, [[split, *(str(value) for value in one.values())] for split, one in result["counts"].items()])


def stopping(result: dict[str, Any]) -> str:
    names = {
        "wrong answers stopped": "wrong answers stopped",
        "right answers stopped": "right answers stopped",
        "median tokens left when stopped": "median tokens left when stopped",
        "tokens of wrong answers saved": "of the tokens of wrong answers, saved",
        "tokens of right answers lost": "of the tokens of right answers, lost",
    }
    rows = [
        [name, *(f"{one[key]:.0f}" if "median" in key else f"{one[key]:.1%}" for key in names)]
        for name, one in result["early"].items()
    ]
    return markdown(["method", *names.values()], rows)


def seen(result: dict[str, Any]) -> str:
    columns = [*map(str, SEEN), "all"]
    rows = [
        [name, *(f"{one['auroc after tokens'][column]:.3f}" for column in columns)]
        for name, one in result["early"].items()
    ]
    return markdown(["AUROC after … tokens", *columns], rows)


def tried(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            str(one["features"]),
            f"{one['gru']:.3f}",
            f"{min(one['seeds']):.3f} … {max(one['seeds']):.3f}",
            f"{one['seeds together']:.3f}",
            "" if one["logistic regression"] is None else f"{one['logistic regression']:.3f}",
        ]
        for name, one in result["validation"].items()
    ]
    head = ["per token", "numbers", "GRU, mean of 3 seeds", "seeds", "seeds together", "logistic regression"]
    return markdown(head, rows)


def adds(result: dict[str, Any]) -> str:
    rows = [
        [name, interval(one["auroc"]), interval(one["minus prompt alone"], "+") if name != "prompt alone" else ""]
        for name, one in result["the answer's part"].items()
    ]
    return markdown(["logistic regression on", "AUROC [95 %]", "minus prompt alone"], rows)


def strange(result: dict[str, Any]) -> str:
    """One column per comparison."""
    comparisons = [key for key in result if " against " in key]
    names = list(result[comparisons[0]]["methods"])
    best = {key: max(one["auroc"][0] for one in result[key]["methods"].values()) for key in comparisons}
    rows = []
    for name in names:
        areas = [result[key]["methods"][name]["auroc"] for key in comparisons]
        rows.append(
            [
                name,
                *(
                    f"**{a[0]:.3f}**" if a[0] == best[key] else f"{a[0]:.3f}"
                    for a, key in zip(areas, comparisons, strict=True)
                ),
            ]
        )
    rows.append(["texts in test", *(str(result[key]["counts"]["test"]["answers"]) for key in comparisons)])
    return markdown(["AUROC", *comparisons], rows)


PUBLISHED = {  # arXiv 2509.15735, tables I and II, LLaMa 1B
    "EigenTrack GRU": "0.842",
    "EigenTrack RNN": "0.799",
    "EigenTrack LSTM": "0.831",
    "EigenTrack GRU with vectors": "",
    "LapEigvals": "0.785",
    "HaloScope": "0.820",
    "INSIDE (EigenScore)": "0.753",
    "SelfCheckGPT, unigram (max)": "0.739",
    "word overlap of question and passage": "",
    "last prompt token, best layer": "",
}


def paper(result: dict[str, Any]) -> str:
    """The paper's figures beside ours."""
    rows = []
    for name, published in PUBLISHED.items():
        ours = [result[kind]["methods"].get(name) for kind in ("random", "matched")]
        rows.append(
            [name, published or "not reported", *(interval(one["auroc"]) if one else "not run" for one in ours)]
        )
    return markdown(["AUROC", "paper, LLaMa 1B", "here, random question", "here, matched question"], rows)


def interval(values: list[float], sign: str = "") -> str:
    value, low, high = (f"{one:{sign}.3f}" for one in values)
    return f"{value} [{low}, {high}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "methods": methods,
    "counts": counts,
    "stopping": stopping,
    "seen": seen,
    "tried": tried,
    "adds": adds,
    "strange": strange,
    "paper": paper,
    "sampled": sampled,
    "combined": combined,
}


if __name__ == "__main__":
    main()
