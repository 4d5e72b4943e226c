"""Tables of README and docs/performance.md are those that the committed results give, and their arithmetic is right."""

from pathlib import Path

import pytest

from bench import predict, work
from tools import kernel_table, machine_code, slices


def test_the_table_of_what_has_been_proved_is_made_from_the_records(root: Path) -> None:
    page = (root / "README.md").read_text()
    assert kernel_table.filled(page) == page, "python -m tools.kernel_table --write README.md"


def test_performance_is_made_from_budgets_and_results(root: Path) -> None:
    page = (root / "docs/performance.md").read_text()
    assert predict.filled(page) == page, "python -m bench.predict --write docs/performance.md"
    for name in slices.slices():
        with pytest.raises(KeyError, match=name):
            predict.filled(page.replace(f"begin: {name}", "begin: nothing"))


def test_an_operator_without_a_kernel_is_claimed_nothing() -> None:
    assert kernel_table.has_kernel("window_gram", "cpu")
    assert not kernel_table.has_kernel("window_gra", "cpu")
    assert not kernel_table.has_kernel("spectrum_laws", "cuda")
    assert kernel_table.cell("spectrum", "spectrum_laws", "cuda") == "none yet"


@pytest.mark.parametrize(
    ("item", "moved", "operations", "seconds"),
    [
        # 32 layers, a row of 8 KB: read twice and 31 rows of the ring, 64 floats of the Gram matrix; by hand on an H100
        (work.push(1, 32), 32 * (33 * 8192 + 256), 2 * 32 * 33 * 4096, 32 * (33 * 8192 + 256) / 3.35e12),
        # 2048 rows of 8 KB; for each 32 × 32 floats and a counter
        (work.gram(2048, 32), 2048 * (8192 + 4096 + 8), 2 * 2048 * 32 * 4096, 2048 * 12296 / 3.35e12),
        (work.multiply(4096), 4 * (4096**2 + 16 * 4096), 16 * 4096**2, 4 * (4096**2 + 16 * 4096) / 3.35e12),
        (work.lowrank(1, 256, "bfloat16"), 2 * (2 * 256 * 4096 + 8192), 4 * 256 * 4096, 4210688 / 3.35e12),
        (work.covariance(8192, "float32"), 4 * (10**5 * 8192 + 8192 * 8193), 10**5 * 8192 * 8193, 6.7117056e12 / 67e12),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_work_and_floor(item: work.Work, moved: int, operations: int, seconds: float) -> None:
    h100 = predict.DEVICES[1]
    assert (item.bytes, item.operations) == (moved, operations)
    assert predict.floor(item, h100) == pytest.approx(seconds, rel=1e-3)
    for device in predict.DEVICES:
        assert predict.predicted(item, device) > predict.floor(item, device)


def test_the_devices_of_the_page_are_ours() -> None:
    assert {device.architecture for device in predict.DEVICES} <= machine_code.DEVICES.keys()
    assert len({item.name for item in work.all_work()}) == len(work.all_work())
    assert {item.slice for item in work.all_work()} == set(slices.slices())
