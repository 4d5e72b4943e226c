"""The unit tests that call native CPU code pass on sanitizer builds of it, which have nothing to say, and say so where
something is planted. tests/sanitize has what needs no Python."""

import os
import re
from pathlib import Path

import pytest

from tools.sanitized_suite import SANITIZERS, build, copy, native_tests, run

ROOT = Path(__file__).resolve().parents[2]
ISA = re.compile(r"\bisa\b")  # the fixture
LONG = os.environ.get("RMTKERNELS_PROVE") == "1"
SOURCE = "csrc/cpu/lowrank_linear.cpp"
CALLS = ["tests/unit/test_lowrank_linear.py", "-k", "threads"]
GRAIN, BODY = "const int64_t grain = 1 +", "{ kernels().row_products(args, begin, end); }"
# Sanitizer -> what is broken in SOURCE, how, and what must be said of it.
PLANTED = {
    "memory": [
        ("parallel_for(0, args.out_dim,", "parallel_for(0, args.out_dim + 1,", "heap-buffer-overflow"),
        (GRAIN, "const int64_t grain = ((INT32_MAX + int32_t(args.rows)) & 1) + 1 +", "signed integer overflow"),
    ],
    "thread": [(BODY, "{ static int64_t calls; ++calls; kernels().row_products(args, begin, end); }", "data race")],
}


def test_every_test_of_both_instruction_sets_is_one_of_them() -> None:
    found = native_tests()
    calling = {
        f"tests/unit/{path.name}" for path in (ROOT / "tests/unit").glob("test_*.py") if ISA.search(path.read_text())
    }
    assert len(calling) > 8 and calling <= set(found)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="RMTKERNELS_PROVE=1 runs it")
@pytest.mark.parametrize("name", SANITIZERS)
def test_the_sanitizers_are_silent_but_where_something_is_planted(name: str, tmp_path: Path) -> None:
    sanitizer = SANITIZERS[name]
    copy(tmp_path)
    build(tmp_path, sanitizer)
    status, said = run(tmp_path, sanitizer, native_tests())
    print(said)
    assert status == 0 and not said
    shipped = (tmp_path / SOURCE).read_text()
    for whole, broken, said in PLANTED[name]:
        assert shipped.count(whole) == 1
        (tmp_path / SOURCE).write_text(shipped.replace(whole, broken))
        build(tmp_path, sanitizer)
        assert said in run(tmp_path, sanitizer, CALLS)[1], said
