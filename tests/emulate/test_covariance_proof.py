"""The CUDA kernels of covariance under the sanitizers, and with one line broken, which must be found.

RMTKERNELS_PROVE=1 runs all of it; else what takes seconds."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc/include/rmtkernels"
SLICE = "covariance"

prove = pytest.mark.skipif("RMTKERNELS_PROVE" not in os.environ, reason="RMTKERNELS_PROVE=1 runs it")


def run(program: Path, workers: int, schedule: str = "rand") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"EMU_WORKERS": str(workers), "EMU_SCHED": schedule, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600, check=False)


@prove
@pytest.mark.parametrize(("build", "blocks"), [("thread", 1), ("thread", 2), ("memory", 1), ("wavefronts of 64", 1)])
def test_checkers_are_silent(builder, build: str, blocks: int) -> None:
    done = run(builder.driver(build, SLICE), blocks)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


SAMPLE, SCATTER, TENSOR, CORE = (
    "covariance.cuh", "covariance_scatter.cuh", "covariance_tensor.cuh", "tensor_core.cuh"
)  # fmt: skip
# (header, text as shipped, text broken, build, what it says). The plain build says what the driver's reference found.
MUTANTS = {
    "the list is read before it is there":
        (SAMPLE, "__syncthreads();  // the list is there", "", "thread", "data race"),
    "one room for the counts of two steps":
        (SAMPLE, "__syncthreads();\n  *all = 0;", "*all = 0;", "thread", "data race"),
    "columns are added up too early":
        (SAMPLE, "__syncthreads();\n  for (int i = threadIdx.x; i < kLanesAcross", "for (int i = threadIdx.x; i < "
         "kLanesAcross", "thread", "data race"),
    "every thread writes the totals":
        (SAMPLE, "if (threadIdx.x != 0) return;\n  *work.plan", "*work.plan", "thread", "data race"),
    "masked rows count":
        (SAMPLE, "!batch.mask[row", "batch.mask[row", "plain", "wrong result"),
    "rejected rows count":
        (SAMPLE, "<= largest)) weight = kGivenRejected", "<= largest)) weight = 1", "plain", "wrong result"),
    "a part of the list is left out":
        (SAMPLE, "part * rows_per_part(chosen.rows) < chosen.rows", "part < 1", "plain", "wrong result"),
    "the last pack reads past the row":
        (SAMPLE, "left == Pack<X>::kSize", "left > 0", "memory", "heap-buffer-overflow"),
    "any address is taken for aligned":
        (SAMPLE, "if (allows_packs && left", "if ((allows_packs || true) && left", "memory", "misaligned"),
    "what was there does not decay":
        (SCATTER, "T(plan.decay) * *place", "*place", "plain", "wrong result"),
    "the gap of the means is forgotten":
        (SCATTER, "multiply_add(gap_i, gap_j,", "multiply_add(0 * gap_i, gap_j,", "plain", "wrong result"),
    "a fresh state is read":
        (SCATTER, "if (plan.fresh) return 0;", "", "plain", "wrong result"),
    "the upper triangle is written":
        (SCATTER, "row < rows && column <= row + reach", "row < rows && column < row + reach + 2 && column < rows",
         "plain", "wrong result"),
    "rows past the last are written":
        (SCATTER, "return row < rows && column", "return column", "memory", "heap-buffer-overflow"),
    "a slab is left out":
        (SCATTER, "int64_t split = 0; split * share", "int64_t split = 1; split * share", "plain", "wrong result"),
    "the mean's low part is forgotten":
        (SCATTER, "(x - high[c]) - low[c]", "(x - high[c]) - 0 * low[c]", "plain", "wrong result"),
    "rows past the list's end count":
        (SCATTER, "listed ? T(work.root[begin + row]) : T(0)", "T(1)", "plain", "wrong result"),
    "the list's next rows do not come":
        (SCATTER, "block.begin, block.end, done + RowList<T>::kLength)", "block.begin, block.end, done)", "plain",
         "wrong result"),
    "rows are multiplied while they are overwritten":
        (SCATTER, "      }\n    }\n    __syncthreads();\n  }\n}", "      }\n    }\n  }\n}", "thread", "data race"),
    "means are read before they are there":
        (SCATTER, "__syncthreads();  // the list and", "// the list and", "thread", "data race"),
    "low times high is left out":
        (TENSOR, "multiply(slice, a_[step], b, 1, 0);", "", "plain", "wrong result"),
    "sums do not begin anew after a chunk":
        (TENSOR, "own = 0;", "own *= 1;", "plain", "wrong result"),
    "the scale is not undone":
        (TENSOR, "1 / power;", "2 / power;", "plain", "wrong result"),
    "halves are multiplied while they are overwritten":
        (TENSOR, "shared->means);\n    __syncthreads();", "shared->means);", "thread", "data race"),
    "a fragment comes from other rows of the batch":
        (TENSOR, "lane_ % 8 + lane_ / 16 * 8]", "lane_ % 8 + lane_ / 8 % 2 * 8]", "plain", "wrong result"),
    "more shared memory than was asked for":
        (TENSOR, "part[2][2][kHalves]", "part[1][2][kHalves]", "memory", "out of bounds"),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken_headers(builder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy of the headers for each mutant. All are sent to the compilers at once."""
    folders = {}
    for number, (mutant, (header, shipped, broken, build, _)) in enumerate(MUTANTS.items()):
        folders[mutant] = tmp_path_factory.mktemp(f"covariance_mutant{number}")
        copy = folders[mutant] / "rmtkernels"
        shutil.copytree(HEADERS, copy)
        source = (copy / header).read_text()
        assert source.count(shipped) == 1, f"{mutant}: {header} has changed"
        (copy / header).write_text(source.replace(shipped, broken))
        builder.start_driver(build, SLICE, folders[mutant])
    return folders


@prove
@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_kernel_is_found(builder, broken_headers: dict[str, Path], mutant: str) -> None:
    build, message = MUTANTS[mutant][-2:]
    done = run(builder.driver(build, SLICE, broken_headers[mutant]), 1)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
