"""The kernels of lowrank_linear under the sanitizers, and with one line broken, which must be found: with
RMTKERNELS_PROVE=1."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc/include/rmtkernels"
SLICE, HEADER = "lowrank_linear", "lowrank_linear.cuh"

prove = pytest.mark.skipif("RMTKERNELS_PROVE" not in os.environ, reason="RMTKERNELS_PROVE=1 runs it")


def run(program: Path, workers: int, schedule: str = "rand") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"EMU_WORKERS": str(workers), "EMU_SCHED": schedule, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600, check=False)


@prove
@pytest.mark.parametrize(("build", "blocks"), [("thread", 1), ("thread", 2), ("memory", 1), ("wavefronts of 64", 1)])
def test_checkers_are_silent(builder, build: str, blocks: int) -> None:
    done = run(builder.driver(build, SLICE), blocks)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


# (text as shipped, text broken, build, what it says). The plain build says what the driver's reference found.
MUTANTS = {
    "the barrier before the last sum is missing": ("__syncthreads();", "", "thread", "data race"),
    "all lanes store a sum": ("if (lane % kSame != 0) return;", "", "thread", "data race"),
    "lanes keep the other half": ("upper = lane & kOffset;", "upper = !(lane & kOffset);", "plain", "wrong result"),
    "a lane is left out": ("add_lanes<kLanes / 2, kSums>", "add_lanes<kLanes / 4, kSums>", "plain", "wrong result"),
    "a team's other warps are left out": ("k < parts_per_team", "k < 1", "plain", "wrong result"),
    "the bias of another column": ("p.bias)[column]", "p.bias)[column ^ 1]", "plain", "wrong result"),
    "the activations of another row": ("sum + r * kColumns, packs, row,", "sum, packs, row,", "plain", "wrong result"),
    "rows that do not exist are stored": ("r >= rows_left || ", "", "memory", "heap-buffer-overflow"),
    "the last pack reads past the row":
        ("first + kPack < dim ? first + kPack : dim;", "first + kPack;", "memory", "heap-buffer-overflow"),
    "packs past the row are read": ("if (i < dim) bits =", "bits =", "memory", "heap-buffer-overflow"),
    "columns that do not exist are read":
        ("mine < p.columns ? mine : p.columns - 1", "mine", "memory", "heap-buffer-overflow"),
    "any address is taken for aligned": ("(p.weights) % 16 == 0", "(p.weights) % 1 == 0", "memory", "misaligned"),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken_headers(builder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy of the headers for each mutant. All are sent to the compilers at once."""
    folders = {}
    for number, (mutant, (shipped, broken, build, _)) in enumerate(MUTANTS.items()):
        folders[mutant] = tmp_path_factory.mktemp(f"lowrank_mutant{number}")
        copy = folders[mutant] / "rmtkernels"
        shutil.copytree(HEADERS, copy)
        source = (copy / HEADER).read_text()
        assert source.count(shipped) == 1, f"{mutant}: {HEADER} has changed"
        (copy / HEADER).write_text(source.replace(shipped, broken))
        builder.start_driver(build, SLICE, folders[mutant])
    return folders


@prove
@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_kernel_is_found(builder, broken_headers: dict[str, Path], mutant: str) -> None:
    build, message = MUTANTS[mutant][-2:]
    done = run(builder.driver(build, SLICE, broken_headers[mutant]), 1)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
