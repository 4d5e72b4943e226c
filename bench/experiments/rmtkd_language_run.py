"""`python -m bench.experiments.rmtkd_language_run`: `rmtkd run` on SmolLM2-135M, as a user of the command line runs it.

Factor mode on the linear layers of every third block, one stage of one epoch over WikiText-2 paragraphs; then
`rmtkd compare` on paragraphs that took no part. Runs the two commands in processes of their own and keeps what they
print with `--json`. A run that was stopped goes on with the stage it was in.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.experiments import texts
from bench.experiments.results import write_json
from bench.experiments.rmtkd_language import BLOCKS
from eigentrack.loading import cache_dir, demo_model, load_causal_lm

RESULT = texts.ROOT / "bench" / "results" / "rmtkd-language-run.json"
SHORTEST, TRAIN, DEV = 400, 240, 60  # characters of a paragraph; how many paragraphs
SETTINGS = ("--mode", "factor", *(option for block in BLOCKS for option in ("--modules", block)))
SETTINGS += ("--keep-slower", "--stages", "1", "--epochs", "1", "--learning-rate", "3e-5", "--max-drop", "2")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rmtkd_language_run", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    folder = cache_dir() / "rmtkd-experiments" / "language-run"
    prepare(folder)
    model, output, dev = folder / "model", folder / "out", folder / "dev.jsonl"
    common = ("--batch", "8", "--longest", "128", "--threads", "1")
    data = ("--data", folder / "train.jsonl", "--dev", dev)
    ran = rmtkd("run", "--model", model, *data, "--output", output, *SETTINGS, *common)
    compared = rmtkd("compare", model, output / "model", "--data", dev, *common)
    for fields, name in zip(compared["models"], ("dense", "RMT-KD"), strict=True):
        fields["model"] = name
        del fields["milliseconds"]  # `bench/cases/rmtkd.py` measures speed, one thing at a time
    settings = " ".join(SETTINGS + common)
    report = {"made by": "python -m bench.experiments.rmtkd_language_run", "settings": settings, "run": ran}
    write_json(options.json, report | compared)


def prepare(folder: Path) -> None:
    """The model as `save_pretrained` writes it, and the first and last long paragraphs, a JSON object per line."""
    if not (folder / "model" / "config.json").is_file():
        model, tokenizer = load_causal_lm(demo_model())
        tokenizer.save_pretrained(folder / "model")
        model.save_pretrained(folder / "model")
    paragraphs = [text for text in texts.wikitext() if len(text) >= SHORTEST]
    for name, chosen in {"train": paragraphs[:TRAIN], "dev": paragraphs[-DEV:]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def rmtkd(*arguments: object) -> dict[str, Any]:
    """What `rmtkd` prints with `--json`; its progress goes to standard error, as for a user."""
    command = [sys.executable, "-m", "rmtkd", *map(str, arguments), "--json"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(printed)
    return found


if __name__ == "__main__":
    main()
