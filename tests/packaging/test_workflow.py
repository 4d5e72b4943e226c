"""What other machines run: the workflow, the wheels, the pinned requirements, and the record of installs."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import install_check

LOCKS = ("audit", "dev", "docs", "models", "vllm")


def targets(root: Path) -> set[str]:
    return set(re.findall(r"^\.PHONY: (.+)$", (root / "Makefile").read_text(), re.MULTILINE)[0].split())


def classified(root: Path) -> list[str]:
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    found = yaml.safe_load((install_check.ROOT / ".github/workflows/test.yml").read_text())
    assert isinstance(found, dict)
    return found


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_every_target_that_the_workflow_makes_is_there(root: Path, workflow: dict[Any, Any]) -> None:
    made = [target for step in steps(workflow) for target in re.findall(r"^make ([\w-]+)", step.get("run", ""), re.M)]
    assert set(made) <= targets(root) and {"test", "gpu-check", "docs", "audit", "dist"} <= set(made)


def test_the_workflow_has_no_more_rights_than_it_needs(workflow: dict[Any, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) == {"push", "pull_request", "schedule"}, "YAML reads `on` as true"
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v[\d.]+", step["uses"]) for step in steps(workflow) if "uses" in step)
    assert not any("secrets." in str(step) for step in steps(workflow))
    # What somebody else writes into a title or a branch must not become part of a command.
    assert not any("github.event." in step.get("run", "") for step in steps(workflow))


def test_every_python_that_is_promised_is_installed_and_has_a_wheel(root: Path, workflow: dict[Any, Any]) -> None:
    pythons = classified(root)
    assert len(pythons) >= 4
    assert workflow["jobs"]["install"]["strategy"]["matrix"]["python"] == pythons
    wheels = (root / "pyproject.toml").read_text().split("[tool.cibuildwheel]")[1].split("\n[")[0]
    assert re.findall(r'"cp3(\d+)-manylinux_x86_64"', wheels) == [python.split(".")[1] for python in pythons]
    assert {"2.10.0", "2.14.1"} <= set(workflow["jobs"]["install"]["strategy"]["matrix"]["torch"])


def test_files_that_the_wheels_are_built_with_are_there(root: Path) -> None:
    wheels = (root / "pyproject.toml").read_text().split("[tool.cibuildwheel]")[1].split("\n[")[0]
    named = re.findall(r"\{project\}/([\w/.]+)", wheels)
    assert named == ["tools/smoke.py"] and (root / named[0]).is_file()


@pytest.mark.parametrize("name", LOCKS)
def test_everything_that_is_pinned_has_a_hash_and_no_host(root: Path, name: str) -> None:
    text = (root / f"requirements/{name}.txt").read_text()
    assert "://" not in text and "index" not in text
    wanted = [part for part in re.sub(r"^#.*$", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines() if part]
    assert wanted
    for line in wanted:
        assert re.match(r"[\w.-]+==[\w.]+ ", line) and re.search(r"--hash=sha256:[0-9a-f]{64}", line), line[:80]


def test_all_files_of_requirements_are_looked_at(root: Path) -> None:
    assert sorted(file.stem for file in (root / "requirements").glob("*.txt")) == sorted(LOCKS)


def test_what_the_extra_asks_for_is_pinned(root: Path) -> None:
    extra = re.search(r"^dev = \[\n(.*?)^\]", (root / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert extra is not None
    asked = set(re.findall(r'^ *"([\w-]+)', extra[1], re.MULTILINE)) - {"rmtkernels"}
    pinned = set(re.findall(r"^([\w.-]+)==", (root / "requirements/dev.txt").read_text(), re.MULTILINE))
    assert len(asked) > 12 and asked <= pinned


def test_a_recorded_install_says_what_it_was_made_of(root: Path) -> None:
    record = install_check.read_record(root)
    assert record
    for name, cell in record.items():
        assert name == f"Python {cell['python'].rpartition('.')[0]}, torch {cell['torch']}"
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", cell["date"]) and re.fullmatch(r"[0-9a-f]{16}", cell["sources"])
        assert cell["wheel"].startswith(f"rmtkernels-0.1.0-cp{name.split()[1].rstrip(',').replace('.', '')}-")


def test_a_cell_that_fails_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_check, "ROOT", tmp_path)
    monkeypatch.setattr(install_check, "write_record", lambda cell: pytest.fail("recorded"))
    assert install_check.main(["--python", "false"]) == 1
    assert capsys.readouterr().err.startswith("false, torch: false -m venv")


def test_a_changed_source_changes_the_hash(root: Path, tmp_path: Path) -> None:
    for folder in install_check.SOURCES:
        (tmp_path / folder).mkdir()
    for name in install_check.FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    before = install_check.sources_hash(tmp_path)
    (tmp_path / "csrc" / "new.cu").write_text("x")
    assert install_check.sources_hash(tmp_path) != before
