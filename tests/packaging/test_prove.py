"""tools/prove.py: which ladders a changed file repeats, and what is recorded."""

import json
import shutil
from pathlib import Path

import pytest

from tools import prove, slices
from tools.prove import Ladder

SLICES = {"covariance", "lanczos", "lowrank_linear", "sliding_window", "spectrum"}
FOLDERS = ("build_tools", "csrc", "python/eigentrack", "python/rmtkd", "requirements", "rmtkernels", "tests", "tools")
# A file, what its change repeats, and what it must not repeat.
CHANGES = [
    ("csrc/cuda/lowrank_linear.cu", {"lowrank_linear"}, SLICES - {"lowrank_linear"} | {"rmtkd"}),
    ("csrc/cpu/covariance_kernels.cpp", {"covariance"}, SLICES - {"covariance"} | {"rmtkd"}),
    ("csrc/include/rmtkernels/small_eigenvalues.cuh", {"spectrum"}, SLICES - {"spectrum"} | {"rmtkd"}),
    ("csrc/include/rmtkernels/sliding_window.h", {"sliding_window", "spectrum"}, {"lowrank_linear", "rmtkd"}),
    ("csrc/include/rmtkernels/gpu.cuh", SLICES, {"rmtkd"}),
    ("csrc/tensor_check.h", SLICES, {"rmtkd"}),
    ("build_tools/native_modules.py", SLICES, {"rmtkd"}),
    ("rmtkernels/reference/lanczos.py", {"lanczos"}, SLICES - {"lanczos"} | {"rmtkd"}),
    ("rmtkernels/ops/law_table.py", {"spectrum"}, SLICES - {"spectrum"} | {"rmtkd"}),
    ("tests/unit/test_spectrum_noise.py", {"spectrum"}, SLICES - {"spectrum"} | {"rmtkd"}),
    ("tests/emulate/fibers.h", SLICES, {"rmtkd"}),
    ("tests/emulate/machine_code/spectrum.json", {"spectrum"}, SLICES - {"spectrum"} | {"rmtkd"}),
    ("tests/compile/test_compile.py", SLICES, {"rmtkd"}),
    ("python/rmtkd/rank.py", {"rmtkd"}, SLICES | {"vllm"}),
    ("python/eigentrack/vllm/slots.py", {"vllm"}, SLICES | {"rmtkd", "bad_input", "kills", "soak", "monitor"}),
    ("python/eigentrack/windows.py", {"bad_input", "kills", "soak", "monitor"}, SLICES | {"rmtkd", "vllm"}),
    ("tools/sanitized_suite.supp", {"sanitized"}, SLICES | {"rmtkd", "vllm"}),
    ("tests/vllm/drive.py", {"vllm"}, SLICES | {"rmtkd"}),
    ("requirements/vllm.txt", {"vllm"}, SLICES | {"rmtkd"}),
]


@pytest.fixture(scope="module")
def copy_of_the_tree(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


def hashes(root: Path) -> dict[str, str]:
    return {name: ladder.hash for name, ladder in prove.ladders(root).items()}


@pytest.fixture(scope="module")
def before(copy_of_the_tree: Path) -> dict[str, str]:
    return hashes(copy_of_the_tree)


def test_every_slice_has_a_ladder_and_its_tests(root: Path) -> None:
    found = prove.ladders(root)
    assert SLICES | {"rmtkd"} <= found.keys()
    for name in SLICES:
        assert f"tests/unit/test_{name}.py" in found[name].arguments
        assert "tests/compile/test_compile.py" in found[name].arguments
        assert set(found[name].arguments[-1].split(" or ")) == {name, *slices.operators(name)}


@pytest.mark.parametrize(("file", "repeats", "leaves"), CHANGES, ids=[change[0] for change in CHANGES])
def test_a_change_repeats_what_depends_on_it(
    copy_of_the_tree: Path, before: dict[str, str], file: str, repeats: set, leaves: set
) -> None:
    path = copy_of_the_tree / file
    shipped = path.read_bytes()
    path.write_bytes(shipped + b"\n")
    after = hashes(copy_of_the_tree)
    path.write_bytes(shipped)
    changed = {name for name in before if after[name] != before[name]}
    assert repeats <= changed
    assert not leaves & changed


def test_what_changed_nothing_changes_no_hash(copy_of_the_tree: Path, before: dict[str, str]) -> None:
    """After all of the above have put things back."""
    assert hashes(copy_of_the_tree) == before


def test_a_new_header_repeats_the_slice_that_includes_it(copy_of_the_tree: Path) -> None:
    header, user = (copy_of_the_tree / f"csrc/include/rmtkernels/{n}" for n in ("new.cuh", "lowrank_linear.cuh"))
    shipped = user.read_text()
    header.write_text("")
    assert not {file for name in SLICES for file in slices.files_of(name, copy_of_the_tree) if file == header}
    user.write_text('#include "rmtkernels/new.cuh"\n' + shipped)
    assert header in slices.files_of("lowrank_linear", copy_of_the_tree)
    user.write_text(shipped)
    header.unlink()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A root with a test of each kind."""
    (tmp_path / "tests/emulate").mkdir(parents=True)
    for name, body in {
        "good": "assert os.environ['RMTKERNELS_PROVE'] == '1'",
        "bad": "assert False",
        "left_out": "pytest.skip('the compiler is missing')",
        "missing": "assert True",
        "optional": "assert True\n\n\ndef test_more():\n    pytest.skip('Triton is not installed')",
    }.items():
        (tmp_path / f"tests/emulate/test_{name}.py").write_text(
            f"import os\nimport pytest\nimport numpy as np\n\n\ndef test_it():\n    np.full(1, np.nan)\n    {body}\n"
        )
    return tmp_path


def ladder(name: str) -> Ladder:
    return Ladder(name, f"hash of {name}", [f"tests/emulate/test_{name}.py", *(["-k", "other"] * (name == "missing"))])


def test_only_what_passed_is_recorded(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {name: ladder(name) for name in ("bad", "left_out", "missing", "good", "optional")}
    assert prove.run(list(found), found, small, jobs=1) == 1
    record = json.loads((small / prove.RECORD).read_text())
    assert set(record) == {"good", "optional"}
    assert record["optional"]["passed"] == 1
    assert record["good"]["hash"] == "hash of good"
    assert record["good"]["rungs"] == {"cuda": {"6": 1, "8": 1}}
    assert prove.changed(record, found) == ["bad", "left_out", "missing"]
    said = capsys.readouterr().out
    for name, why in (
        ("bad", "ended with 1"),
        ("left_out", "the compiler is missing (1)"),
        ("missing", "ended with 5"),
    ):
        assert any(f"{name} is not recorded" in line and why in line for line in said.splitlines()), why


def test_an_interrupted_run_keeps_what_it_finished(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_then_interrupted(ladder: Ladder, root: Path, jobs: int) -> dict[str, object]:
        if ladder.name == "bad":
            raise KeyboardInterrupt
        return {"hash": ladder.hash, "passed": 1, "seconds": 0}

    monkeypatch.setattr(prove, "prove", first_then_interrupted)
    found = {name: ladder(name) for name in ("good", "bad", "missing")}
    with pytest.raises(KeyboardInterrupt):
        prove.run(list(found), found, small, jobs=1)
    assert prove.changed(prove.read_record(small), found) == ["bad", "missing"]


def test_check_names_what_changed_and_runs_nothing(
    copy_of_the_tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prove, "run", lambda *_: pytest.fail("something ran"))
    record = {name: {"hash": digest} for name, digest in hashes(copy_of_the_tree).items()}
    (copy_of_the_tree / prove.RECORD).write_text(json.dumps(record))
    assert prove.main(["--check"], copy_of_the_tree) == 0
    record["lanczos"]["hash"] = "another"
    (copy_of_the_tree / prove.RECORD).write_text(json.dumps(record))
    assert prove.main(["--check"], copy_of_the_tree) == 1
    assert "changed since they were proved: lanczos\n" in capsys.readouterr().out
    assert prove.main(["--check", "--slices", "vllm"], copy_of_the_tree) == 0
    record["vllm"]["hash"] = "another"
    (copy_of_the_tree / prove.RECORD).write_text(json.dumps(record))
    assert prove.main(["--check", "--slices", "vllm"], copy_of_the_tree) == 1
    with pytest.raises(SystemExit):
        prove.main(["--slices", "nonsense"], copy_of_the_tree)


def test_what_has_an_environment_of_its_own_runs_only_when_it_is_named(
    copy_of_the_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(prove, "run", lambda names, *_: ran.append(names))
    record = {
        name: {"hash": digest} for name, digest in hashes(copy_of_the_tree).items() if name not in ("vllm", "rmtkd")
    }
    (copy_of_the_tree / prove.RECORD).write_text(json.dumps(record))
    prove.main([], copy_of_the_tree)
    prove.main(["--slices", "vllm"], copy_of_the_tree)
    assert ran == [["rmtkd"], ["vllm"]]


def test_every_triton_kernel_is_checked_in_the_interpreter() -> None:
    """The checks are found by name: one that was renamed would not be missed otherwise."""
    checked = {
        file.stem.removeprefix("check_") for file in (slices.ROOT / "tests/triton/interpreted").glob("check_*.py")
    }
    kernels = {name for name in slices.slices() if slices.kernel_files(name, "triton")}
    assert checked == kernels and len(kernels) >= 4
