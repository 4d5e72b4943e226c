"""Every code block of README and docs/: Python is run, commands are checked, and what is neither is counted by name."""

import importlib.util
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

import eigentrack.cli
import rmtkd.cli
from tests.integration.snippets import ROOT, Block, blocks, pages, run_python

# Pages whose Python runs in a test of their own, which looks at what comes out.
ELSEWHERE = {
    "docs/eigentrack.md": "test_guide.py",
    "docs/report.md": "test_guide.py",
    "docs/rmtkd.md": "test_rmtkd_guide.py",
}
# Blocks that nothing runs: (page, why), and how many of them.
NOT_RUN = Counter({("docs/vllm.md", "needs vLLM, as tests/vllm has it"): 3})
# Output and drawings: page, and how many.
TEXT = {"CONTRIBUTING.md": 1, "docs/rmtkd.md": 1}
PROGRAMS: dict[str, ModuleType] = {"eigentrack": eigentrack.cli, "rmtkd": rmtkd.cli}
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")  # FOLDER: the command is parsed and not run

ALL = [block for page in pages() for block in blocks(page)]


def tiny_bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)).eval()


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in ALL} == {"python", "bash", "text"}
    assert Counter((block.page, block.not_run) for block in ALL if block.not_run) == NOT_RUN
    assert Counter(block.page for block in ALL if block.language == "text") == TEXT


@pytest.mark.parametrize("page", sorted(ELSEWHERE))
def test_the_python_of_a_guide_runs_in_its_own_test(page: str) -> None:
    assert f'run_python("{page}"' in (ROOT / "tests/integration" / ELSEWHERE[page]).read_text()


def test_no_page_with_python_is_forgotten() -> None:
    assert {block.page for block in ALL if block.language == "python" and not block.not_run} == {*ELSEWHERE, *PAGES}


# Python


def readme(llama: Any) -> dict[str, Any]:
    """What README's reader has already: a model and inputs to watch, data to calibrate on, tensors."""
    llama.generation_config.eos_token_id = None
    llama.config.eos_token_id = None
    ids = torch.tensor([[5, 9, 17, 33]])
    return {
        "torch": torch,
        "model": llama,
        "inputs": BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
    }


def test_the_python_of_the_readme(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ids = torch.randint(50, (4, 8, 12))

    def accuracy(model: Any) -> float:
        with torch.no_grad():
            return float((model(ids[0]).logits.argmax(1) == ids[0, :, 0] % 2).float().mean())

    watch, shrink, kernels = (block for block in blocks("README.md") if block.language == "python")
    names = readme(llama)
    run(watch, names)
    assert names["track"].descriptors.shape[1] == 127, "a row per generated token that was fed"
    run(
        shrink,
        {
            "model": tiny_bert(),
            "calibration": [{"input_ids": batch} for batch in ids],
            "train": [{"input_ids": batch, "labels": batch[:, 0] % 2} for batch in ids],
            "accuracy": accuracy,
        },
    )
    assert (tmp_path / "smaller" / "config.json").is_file()
    run(
        kernels,
        names
        | {
            "rows": [torch.randn(8, 4096, dtype=torch.bfloat16) for _ in range(32)],
            "hidden": torch.randn(2, 40, 64),
            "matrices": torch.eye(16).expand(3, 16, 16),
            "q": 0.5,
            "value": np.linspace(0.1, 3, 5),
            "u": np.linspace(0.1, 0.9, 5),
            "s": np.linspace(-4, 4, 5),
            "theta": 3.0,
            "batch": torch.randn(3000, 2048),
            "other": other_covariance(),
            "x": torch.randn(3, 5),
            "down": torch.randn(4, 5),
            "up": torch.randn(6, 4),
            "bias": torch.randn(6),
            "samples": spiked(),
            "edge": 1.2 * 2000 * (1 + 0.5) ** 2,
        },
    )


def test_the_python_of_the_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    assert run_python("docs/first-steps.md", names) == 3
    assert names["entropy"].shape == (7,) and names["entropy"][1:].isfinite().all()
    printed = capsys.readouterr().out
    assert names["plan"].table() in printed
    before, after = map(int, re.search(r"^(\d+) -> (\d+)$", printed, re.MULTILINE).groups())  # type: ignore[union-attr]
    assert after < before
    assert len(names["top"].eigenvalues) == 1 and names["top"].complete, "the planted direction, and no other"


def test_the_python_of_the_faq() -> None:
    assert run_python("docs/faq.md", {}) == 1


PAGES = {"README.md", "docs/first-steps.md", "docs/faq.md"}


def run(block: Block, names: dict[str, Any]) -> None:
    exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)


def other_covariance() -> Any:
    import rmtkernels

    covariance = rmtkernels.StreamingCovariance(2048)
    covariance.update(torch.randn(100, 2048))
    return covariance


def spiked() -> torch.Tensor:
    """Samples of which XᵀX has one eigenvalue above README's edge."""
    samples = torch.randn(2000, 500)
    samples[:, 0] *= 5
    return samples


# Commands


def commands() -> list[tuple[str, int, str]]:
    lines = []
    for block in ALL:
        if block.language == "bash" and block.not_run is None:
            for number, line in enumerate(block.code.splitlines(), block.line):
                if line and not line.startswith("#"):
                    lines.append((block.page, number, line))
    return lines


def check_make(arguments: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)[0].split()
    for target in (argument for argument in arguments if "=" not in argument):
        assert target in targets


def check_pip(arguments: list[str]) -> None:
    """What is installed is this package with extras it has, or a requirement of the form name>=version."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    known = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    assert {"eigentrack", "rmtkd", "demo"} <= known
    assert arguments[0] == "install"
    for argument in (argument for argument in arguments[1:] if not argument.startswith("-")):
        local = re.fullmatch(r"\.(?:\[([\w,]+)\])?", argument)
        assert local or re.fullmatch(r"[\w-]+(?:[=>]=[\d.]+)?", argument), argument
        extras = (local[1] or "").split(",") if local else []
        assert {extra for extra in extras if extra} <= known


def check_python(arguments: list[str]) -> None:
    module = arguments[arguments.index("-m") + 1] if "-m" in arguments else None
    assert (ROOT / arguments[0]).is_file() if module is None else importlib.util.find_spec(module) is not None


def check_torchrun(arguments: list[str]) -> None:
    """It starts one of our programs, with arguments that this takes."""
    where = arguments.index("-m") + 1
    PROGRAMS[arguments[where]]._parser().parse_args(arguments[where + 1 :])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
}


@pytest.mark.parametrize(("page", "line", "command"), commands(), ids=lambda value: str(value).replace("/", "-")[:40])
def test_a_command_is_one_that_there_is(
    page: str, line: int, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, arguments = words[0], words[1:]
    if program in PROGRAMS and PLACEHOLDER.search(command):
        PROGRAMS[program]._parser().parse_args(arguments)
    elif program in PROGRAMS:
        monkeypatch.chdir(tmp_path)
        assert PROGRAMS[program].main(arguments) == 0
    else:
        CHECKS[program](arguments)


def test_a_command_that_there_is_not_is_found() -> None:
    for check, arguments in (
        (check_make, ["nothing"]),
        (check_pip, ["install", ".[nothing]"]),
        (check_python, ["examples/nothing.py"]),
        (check_python, ["-m", "nothing_at_all"]),
        (check_torchrun, ["-m", "rmtkd", "nothing"]),
    ):
        with pytest.raises((AssertionError, SystemExit)):
            check(arguments)
