"""The CUDA kernels of covariance under the sanitizers and nvcc, and with one line broken, which must be found.

RMTKERNELS_PROVE=1 runs all of it; else what takes seconds."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.emulate.proof import ROOT, SILENT, assert_found, assert_silent, break_headers, prove

SLICE = "covariance"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@prove
@pytest.mark.parametrize(("build", "blocks"), SILENT)
def test_checkers_are_silent(builder, build: str, blocks: int) -> None:
    assert_silent(builder, SLICE, build, blocks)


SAMPLE, SCATTER, TENSOR, SCAN = (
    "covariance.cuh", "covariance_scatter.cuh", "covariance_tensor.cuh", "block_scan.cuh"
)  # fmt: skip
# (header, text as shipped, text broken, build, what it says). The plain build says what the driver's reference found.
MUTANTS = {
    "the list is read before it is there":
        (SAMPLE, "__syncthreads();  // the list is there", "", "thread", "data race"),
    "one room for the counts of two steps":
        (SCAN, "__syncthreads();\n  *all = 0;", "*all = 0;", "thread", "data race"),
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
    return break_headers(builder, tmp_path_factory, SLICE, MUTANTS)


@prove
@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernel_is_found(builder, broken_headers: dict[str, Path], name: str) -> None:
    assert_found(builder, SLICE, broken_headers[name], MUTANTS[name])


def readable(mangled: str) -> str:
    """A kernel's name<rows, state>, from its Itanium name."""
    name, types = re.fullmatch(r"_ZN10rmtkernels\d+(\w+?_kernel)(?:I((?:[fd]|NS_\d+\w+?E)+)E)?E\w*", mangled).groups()
    spelt = re.findall(r"([fd])|NS_\d+([a-z]+\d+)E", types or "")
    words = [{"f": "float", "d": "double"}.get(letter, other) for letter, other in spelt]
    return f"{name}<{', '.join(words)}>" if words else name


@prove
@needs_nvcc
def test_instructions(tmp_path: Path) -> None:
    """16-byte loads of rows, tensor cores in the kernels for 16-bit rows and in no other, and no atomic."""
    command = ["nvcc", "-std=c++17", "-O3", "-Icsrc/include", "-Icsrc", "-arch=compute_80", "-ptx",
               f"csrc/cuda/{SLICE}.cu", "-o", str(tmp_path / "all.ptx")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    bodies = re.split(r"\.entry (\w+)", (tmp_path / "all.ptx").read_text())[1:]
    kernels = {readable(mangled): body for mangled, body in zip(bodies[::2], bodies[1::2], strict=True)}
    for name, body in kernels.items():
        assert not re.search(r"\b(atom|red)\.", body), name
        assert ("mma.sync" in body) == ("ldmatrix" in body) == ("tensor" in name), name
        assert "tf32" not in body, name
        if re.search("norms|sums|scatter|tensor", name):
            assert re.search(r"ld\.global\S*\.v(4\.[a-z]32|2\.[a-z]64)", body), name
