"""The report of a plan or a run: one HTML page with what was cut, why, and what became of the model."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rmtkd import checkpoints, files
from rmtkd.checkpoints import Stage
from rmtkd.errors import FileFormatError
from rmtkd.plans import Plan
from rmtkd.plot import draw_plan
from rmtkd.stages import stage_rows
from rmtkd.table import change, count

_STYLE = """
:root { --paper: #fbfaf7; --card: #fff; --ink: #1d1c1a; --muted: #5e5a55; --line: #dcd8d1; color-scheme: light dark;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #141518; --card: #1b1d21; --ink: #ecebe7; --muted: #aaa7a1; --line: #3a3d43; } }
body { margin: 0 auto; padding: 0 1rem 2rem; max-width: 76rem; background: var(--paper); color: var(--ink); }
h1 { font-size: 1.35rem; } h2 { font-size: 1.1rem; }
p { color: var(--muted); overflow-wrap: anywhere; margin: .4rem 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 0 1.1rem 1rem;
  margin-top: 1.25rem; }
div { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { padding: .2rem .6rem; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; padding-left: 0; } thead th { border-bottom: 1px solid var(--line); }
tbody th { font-weight: 400; }
img { display: block; width: 100%; min-width: 44rem; background: #fff; border-radius: .4rem; margin-top: 1rem; }
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{_HASH}'; img-src data:"


def read(folder: Path) -> tuple[dict[str, Plan], tuple[Stage, ...], str]:
    """The plans that `rmtkd plan` or `rmtkd run` left in a folder, the stages of a run, and why it ended.

    Raises:
        FileFormatError: if there is neither, or one is damaged.
        OSError: if one cannot be read.
    """
    stages = sorted(
        (path for path in folder.glob(f"stages/stage-*/{files.PLAN}") if _number(path).isdecimal()),
        key=lambda path: int(_number(path)),
    )
    found = {f"Stage {_number(path)}": path for path in stages}
    if (folder / files.PLAN).is_file():
        found = {"Plan": folder / files.PLAN} | found
    plans = {name: Plan.from_json(path.read_text(encoding="utf-8")) for name, path in found.items()}
    result = folder / files.RESULT
    history, reason = checkpoints.read_result(result) if result.is_file() else ((), "")
    if not plans and not history:
        raise FileFormatError(f"{folder} holds neither {files.PLAN} nor {files.RESULT}: give the --output of a command")
    return plans, history, reason


def _number(plan: Path) -> str:
    """Of the stage that a plan lies in."""
    return plan.parent.name.removeprefix("stage-")


def page(plans: Mapping[str, Plan], history: Sequence[Stage], reason: str) -> str:
    """HTML that loads nothing. Needs matplotlib for the spectra."""
    parts = []
    if history:
        first, last = history[0], [stage for stage in history if not stage.undone][-1]
        kept = (
            f"Parameters {count(first.parameters)} → {count(last.parameters)} "
            f"({change(first.parameters, last.parameters)}), score {first.score:.4f} → {last.score:.4f}. {reason}"
        )
        parts.append(_section("Before and after", f"<p>{escape(kept)}</p>{_table(stage_rows(history))}"))
    for name, plan in plans.items():
        spectra = f'<img alt="{escape(_in_words(plan))}" src="data:image/svg+xml;base64,{_picture(plan)}">'
        notes = "".join(f"<p>{escape(note)}</p>" for note in plan.notes())
        parts.append(_section(name, f"<p>{escape(plan.method)}</p>{_table(plan.rows())}{notes}<div>{spectra}</div>"))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>RMT-KD report</title>\n<style>{_STYLE}</style>\n<h1>RMT-KD</h1>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _section(title: str, inside: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading, the first column names the others."""
    head, *body = rows
    heading = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = (
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in body
    )
    return f"<div><table><thead><tr>{heading}</tr></thead>\n<tbody>{chr(10).join(lines)}</tbody></table></div>"


def _in_words(plan: Plan) -> str:
    kept = ", ".join(f"{layer.name} keeps {layer.rank} of {layer.dim}" for layer in plan.layers)
    return f"Histogram of the eigenvalues of each layer, with the Marchenko-Pastur law of its noise: {kept}"


def _picture(plan: Plan) -> str:
    """An SVG as an image: whatever a layer is called, nothing in a picture runs."""
    drawn = io.BytesIO()
    draw_plan(plan).savefig(drawn, format="svg", metadata={"Date": None})
    return base64.b64encode(drawn.getvalue()).decode()
