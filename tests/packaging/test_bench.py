"""The bench itself: a wrong case is not reported, a slowdown is found, fits and intervals are right."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import bench.__main__ as command
from bench import cases, page, scale
from bench.case import Case
from bench.compare import change, report
from bench.plot import draw
from bench.timer import LARGEST_COPY, copy_of, median_interval

MACHINE = {"cpu": "a", "torch": "2.13.0"}


def adding(times: int, right: bool = True) -> Case:
    """Ours adds up once, the peer `times` times."""
    numbers = np.ones(1000)

    def verify() -> None:
        if not right:
            raise AssertionError("ours: 999")

    return Case(
        ours=numbers.sum,
        peers={"again": lambda: [numbers.sum() for _ in range(times)]},
        verify=verify,
        targets={"again": times / 4},
        bytes_read=numbers.nbytes,
        rounds=8,
    )


def test_a_wrong_case_is_named_and_not_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = {"right": (1, lambda: adding(8)), "wrong": (1, lambda: adding(8, right=False))}
    monkeypatch.setattr(cases, "REGISTRY", registry)
    file = tmp_path / "results.json"
    assert command.main(["run", "wrong", "right", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert found["wrong"] == {"wrong": "ours: 999"}
    assert found["cases"].keys() == {"right"}
    assert "wrong: WRONG, so not timed: ours: 999" in capsys.readouterr().out
    assert command.main(["run", "right"]) == 0
    assert command.main(["verify", "wrong"]) == 1

    one = found["cases"]["right"]
    assert one["threads"] == 1 and one["rounds"] == 8
    assert one["targets"] == [
        {
            "what": "times faster than again",
            "at_least": True,
            "target": 2,
            "met": True,
            "value": one["ratios"]["again"]["median"],
        }
    ]
    for name in ("ours", "again"):
        spread = list(one["percentiles"][name].values())
        assert spread == sorted(spread) and spread[2] == one["seconds"][name]
    assert one["floor_seconds"] > 0 and one["floor"] in ("memory", "arithmetic")
    assert {"cpu", "cores", "commit", "torch", "scipy", "load"} <= found["machine"].keys()


def test_a_case_without_its_data_does_not_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def setup() -> Case:
        raise FileNotFoundError("no WikiText-2")

    monkeypatch.setattr(cases, "REGISTRY", {"right": (1, lambda: adding(8)), "unset": (1, setup)})
    file = tmp_path / "results.json"
    assert command.main(["run", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert found["not run"] == {"unset": "no WikiText-2"} and found["cases"].keys() == {"right"}


def test_no_such_case_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "REGISTRY", {"right": (1, lambda: adding(8))})
    with pytest.raises(SystemExit, match=r"nothing begins with any of .*there is: right"):
        command.main(["run", "left"])


def run_of(ratio: float, spread: float = 0.01, seconds: float = 1.0) -> dict[str, Any]:
    limits = [ratio * (1 - spread), ratio * (1 + spread)]
    one = {"median": ratio, "low": 0.5 * ratio, "high": 2 * ratio, "confidence": limits}
    return {"machine": MACHINE, "cases": {"a.b": {"seconds": {"ours": seconds}, "ratios": {"peer": one}}}, "wrong": {}}


@pytest.mark.parametrize(
    ("new", "verdict", "regressed"),
    [
        (run_of(2.0), "within noise", False),
        (run_of(1.94, 0.005), "slower", False),  # 3 %: less than the margin
        (run_of(1.6), "REGRESSION", True),
        (run_of(1.6, 0.3), "within noise", False),
        (run_of(2.5), "faster", False),
        (run_of(2.0, seconds=3.0), "within noise", False),  # another machine, or a busy one: the peer slows down too
    ],
)
def test_compare(new: dict[str, Any], verdict: str, regressed: bool) -> None:
    text, failed = report(run_of(2.0, 0.005), new, margin=0.05)
    assert verdict in text and failed == regressed


def test_compare_names_what_else_differs() -> None:
    new = run_of(2.0)
    new["machine"] = {**MACHINE, "torch": "2.14.0"}
    new["wrong"] = {"a.c": "ours: 999"}
    old = run_of(2.0)
    old["cases"]["a.d"] = old["cases"]["a.b"]
    text, failed = report(old, new, margin=0.05)
    assert failed and "torch: 2.13.0 -> 2.14.0" in text and "WRONG in the new run: ours: 999" in text
    assert "a.d" in text and "not in the new run" in text


def test_compare_takes_the_peer_that_was_timed_best() -> None:
    old, new = run_of(2.0)["cases"]["a.b"], run_of(1.0)["cases"]["a.b"]
    for one in (old, new):
        one["ratios"]["noisy"] = {"median": 5.0, "low": 1.0, "high": 9.0}  # as of version 0.1.0
    found = change(old, new)
    assert found.against == "peer" and found.middle == 2.0 and found.low < 2.0 < found.high
    assert (
        change(*({**one, "ratios": {"noisy": one["ratios"]["noisy"]}} for one in (old, new))).verdict == "within noise"
    )


@pytest.mark.parametrize("count", [1, 3, 6, 7, 20, 60, 300])
def test_limits_of_a_median(count: int) -> None:
    """Of the numbers 0, 1, 2 …, whose ranks the limits therefore are: they miss the median as often as a coin says."""
    low, high = median_interval(np.arange(count)[::-1])
    assert low + high == count - 1
    missed = 2 * scipy.stats.binom.cdf(low, count, 0.5)
    assert missed <= 0.07 or low == 0
    assert low == 0 or scipy.stats.binom.cdf(low + 2, count, 0.5) > 0.025, "wider than it must be"


@pytest.mark.parametrize(("footprint", "moved"), [(0, 8), (4096, 4096), (10**13, LARGEST_COPY)])
def test_the_copy_is_as_large_as_asked_and_fits_the_memory(footprint: int, moved: int) -> None:
    copy, count = copy_of(footprint)
    target = copy()
    assert isinstance(target, torch.Tensor) and target.eq(1).all()
    assert count == moved == 2 * target.nbytes


def test_the_exponent_is_that_of_the_large_sizes() -> None:
    sizes = (1, 2, 4, 8, 16, 32, 64)
    fitted, error = scale.exponent(sizes, [max(8.0**3, size**3) for size in sizes])
    assert fitted == pytest.approx(3) and error == pytest.approx(0, abs=1e-6)
    assert scale.exponent((1, 2), [4.0, 1.0]) == (pytest.approx(-2), None)


def test_memory_is_what_becomes_resident() -> None:
    held = []

    def make() -> scale.Call:
        held.append(torch.ones(16 << 20))
        return lambda: torch.ones(4 << 20)

    _, count = scale.resident_bytes(make)
    assert count == pytest.approx(80 << 20, rel=0.05)


def test_pictures(root: Path, tmp_path: Path) -> None:
    results = json.loads((root / "bench/results/operators.json").read_text())
    sweep = scale.Sweep("N", (8, 16, 32), lambda n: lambda: sum(range(n)), 1, 0)
    results["scales"] = {"adding_": scale.measure([sweep])}
    files = draw(results, tmp_path)
    assert {file.name for file in files} == {
        "bench-covariance.svg", "bench-lanczos.svg", "bench-lowrank_linear.svg", "scale-adding.svg"
    }  # fmt: skip
    before = [file.read_bytes() for file in files]
    assert all(ElementTree.fromstring(content).tag.endswith("svg") for content in before)
    assert [file.read_bytes() for file in draw(results, tmp_path)] == before


def test_the_page_is_made_from_the_committed_results(root: Path, tmp_path: Path) -> None:
    text = (root / "docs/benchmarks.md").read_text()
    assert page.filled(text) == text, "python -m bench page --write docs/benchmarks.md"
    with pytest.raises(KeyError, match="scaling"):
        page.filled(text.replace("begin: scaling", "begin: nothing"))
    run = json.loads((root / "bench/results/operators.json").read_text())
    case = run["cases"]["covariance.update_4096x2048"]
    case["seconds"]["ours"], case["floor_seconds"], case["floor"], case["threads"] = 0.2, 0.05, "memory", 1
    case["percentiles"]["ours"] |= {"25": 0.15, "75": 0.25}
    case["targets"] = [
        {"what": "share of the floor reached", "value": 0.25, "target": 0.85, "at_least": True, "met": False}
    ]
    run["cases"] = {"covariance.update_4096x2048": case}
    (tmp_path / "operators.json").write_text(json.dumps(run))
    made = page.filled(text, tmp_path)
    assert "| `covariance.update_4096x2048` | share of the floor reached | 0.25 | ≥ 0.85 | **missed** |" in made
    assert "| `covariance.update_4096x2048` | 1 | 200 ms, 150 ms … 250 ms | 50 ms, memory | 25% | torch.cov (" in made
    assert "Not measured yet: `python -m bench run rmtkd --json bench/results/rmtkd-speed.json`." in made
