"""The CPU kernels execute no more instructions than their budget, and a kernel that does is found."""

import json
import shutil
from pathlib import Path

import pytest

from bench import instructions

ISA = "avx2"


@pytest.fixture(scope="module", autouse=True)
def _valgrind() -> None:
    for tool in ("valgrind", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    if ISA not in __import__("rmtkernels").cpu_isas():
        pytest.skip("this processor has no AVX2")


def test_the_kernels_keep_to_their_budget(tmp_path: Path) -> None:
    try:
        budget = instructions.read_budget()[ISA]
    except instructions.CountError as error:
        pytest.skip(str(error))
    counts = instructions.count(instructions.build(tmp_path, ISA))
    assert instructions.over_budget(counts, budget) == []


def test_a_slower_kernel_is_found(root: Path, tmp_path: Path) -> None:
    """Every inner product twice: the same results, and no test of results would see it."""
    for folder in ("bench", "csrc"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    kernel = tmp_path / "csrc/cpu/sliding_window_kernels.cpp"
    right = "    dot_block<kRows>(block, x, y, dim);\n"
    assert kernel.read_text().count(right) == 1
    kernel.write_text(kernel.read_text().replace(right, right + '    asm volatile("" ::: "memory");\n' + right))
    program = instructions.build(tmp_path, ISA, root=tmp_path)
    name = "sliding_window.push_float32"
    written = json.loads(instructions.BUDGET.read_text())["instructions"][ISA][name]
    found = instructions.over_budget({name: instructions.count_one(program, name)}, {name: written})
    assert len(found) == 1 and name in found[0]


def test_what_is_over_budget() -> None:
    budget = {"a": 1000, "b": 1000, "gone": 5}
    assert instructions.over_budget({"a": 1009, "b": 500, "gone": 5}, budget) == []
    assert instructions.over_budget({"a": 1011, "b": 1000, "new": 1}, budget) == [
        "a: 1011 instructions, +1.1% of 1000",
        "gone: a budget and no kernel",
        "new: 1 instructions and no budget",
    ]


def test_the_budget_of_another_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "compiler", lambda: "g++ 1.2.3")
    with pytest.raises(instructions.CountError, match=r"this is g\+\+ 1\.2\.3"):
        instructions.read_budget()
