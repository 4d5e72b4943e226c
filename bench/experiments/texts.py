"""Texts of the experiments, from the data sets in $RMTKERNELS_DATA (default ../shared/data beside the project)."""

import ast
import gzip
import json
import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("argparse", "ast", "calendar", "configparser", "difflib", "inspect", "pathlib", "statistics", "textwrap")


def data_dir() -> Path:
    """Raises FileNotFoundError if the data sets are not there."""
    folder = Path(os.environ.get("RMTKERNELS_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        raise FileNotFoundError(f"no data sets in {folder}: set RMTKERNELS_DATA to the folder that holds them")
    return folder


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl.gz file."""
    with gzip.open(data_dir() / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def passages() -> list[str]:
    """Of HaluEval QA (seed: Wikipedia, CC BY-SA 4.0)."""
    return sorted({" ".join(row["knowledge"].split()) for row in rows("halueval_qa/dev.jsonl.gz")})


def law() -> list[str]:
    return [row["text"] for row in rows("eurlex/ai_act.jsonl.gz")]


def news() -> list[str]:
    return [f"{row['title']} {row['text']}" for row in rows("ag_news/train.jsonl.gz")]


def wikitext() -> list[str]:
    with gzip.open(data_dir() / "wikitext2/valid.txt.gz", "rt", encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip() and not line.startswith(" =")]


def arithmetic() -> list[str]:
    return [row["question"] for row in rows("gsm8k/dev.jsonl.gz")]


def assistant() -> list[str]:
    """ChatGPT's answers in HaluEval."""
    return [row["chatgpt_response"] for row in rows("halueval_general/dev.jsonl.gz")]


def web_questions() -> list[str]:
    return [row["qText"] for row in rows("webquestions/train.jsonl.gz")]


def hotpot_questions() -> list[str]:
    """HaluEval QA's questions, in WebQuestions' lower case."""
    return [row["question"].lower() for row in rows("halueval_qa/dev.jsonl.gz")]


def requests() -> list[str]:
    return [row["text"] for row in rows("clinc150/dev.jsonl.gz")]


def code() -> list[str]:
    """Functions of the standard library of the running Python, with their docstrings."""
    return [source for module in MODULES for source in _functions(Path(sysconfig.get_path("stdlib")), module)]


def shuffled(texts: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """The same texts, each with its words in random order."""

    def make() -> list[str]:
        generator = random.Random(0)
        return [" ".join(generator.sample(words := text.split(), len(words))) for text in texts()]

    return make


def _functions(library: Path, module: str) -> Iterator[str]:
    file = library / module / "__init__.py"
    source = (file if file.is_file() else library / f"{module}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield ast.get_source_segment(source, node) or ""
