"""The kernels of lanczos under the sanitizers and nvcc, and with one line broken, which must be found.

RMTKERNELS_PROVE=1 runs all of it; else what takes seconds."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.emulate.proof import PROVE, ROOT, SILENT, assert_found, assert_silent, break_headers, prove

SLICE, HEADER = "lanczos", "lanczos.cuh"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@prove
@pytest.mark.parametrize(("build", "blocks"), SILENT)
def test_checkers_are_silent(builder, build: str, blocks: int) -> None:
    assert_silent(builder, SLICE, build, blocks)


# (text as shipped, text broken, build, what it says). The plain build says what the driver's own sums found.
MUTANTS = {
    "the projection of another row": ("i = warp; i < g.known; i +=", "i = warp + 1; i < g.known; i +=",
                                      "plain", "not orthogonal"),
    "a warp's projections are left out": ("w = 0; w < kSweepWarps; ++w) value", "w = 1; w < kSweepWarps; ++w) value",
                                          "plain", "not orthogonal"),
    "rows are mixed the wrong way round": ("mix[r * kBlockRows + j], sums", "mix[j * kBlockRows + r], sums",
                                           "plain", "not orthonormal"),
    "the next chunk begins the sums again": ("first == begin", "first >= begin", "plain", "more chunks than parts"),
    "a slice of the parts is left out": ("s = 0; s < kSumSlices; ++s", "s = 1; s < kSumSlices; ++s",
                                          "plain", "wrong products"),
    "lanes keep the other half": ("upper = lane & kOffset;", "upper = !(lane & kOffset);", "plain", "wrong products"),
    "random rows are taken as they are": (" || !result.safe", "", "plain", "not ortho"),
    "dependent rows stay": ("if (!stays) result.leaving |= 1u << k;", "", "plain", "not orthonormal"),
    "the second factor is forgotten": ("begins ? double(k == r) :", "begins || true ? double(k == r) :", "plain",
                                       "the triangle does not give the rows"),
    "the groups before are forgotten": ("before + (i - size) * dim", "before", "plain", "not orthonormal"),
    "the shift runs the other way": ("column - g.shift + g.dim)", "column + g.dim)", "memory", "heap-buffer-overflow"),
    "columns past the end are read": ("if (column + e < g.dim) read", "read", "memory", "heap-buffer-overflow"),
    "columns past the end are stored": ("&& first + c < g.dim) g.unit", ") g.unit", "memory", "heap-buffer-overflow"),
    "rows that do not exist are stored": ("sweep > 0 && r < g.count &&", "sweep > 0 &&", "memory",
                                          "heap-buffer-overflow"),
    "no barrier before the projections are read": ("add_projections(g, first, sums);\n    __syncthreads();",
                                                   "add_projections(g, first, sums);", "thread", "data race"),
    "no barrier before mixing": ("leaving >> r & 1);\n  }\n  __syncthreads();", "leaving >> r & 1);\n  }",
                                 "thread", "data race"),
    "no barrier before multiplying": ("first + c] = stored;\n  }\n  __syncthreads();", "first + c] = stored;\n  }",
                                      "thread", "data race"),
    "no barrier between the slices of a sum": ("= sum;\n  __syncthreads();\n  if (slice > 0 ||",
                                               "= sum;\n  if (slice > 0 ||", "thread", "data race"),
    "no barrier before an elimination is stored": ("f.left[k][j];\n    __syncthreads();", "f.left[k][j];",
                                                   "thread", "data race"),
    "all lanes store a product": ("if (lane % kSame == 0) part", "part", "thread", "data race"),
    "the state is written while others read it": ("state.replaced;\n  __syncthreads();", "state.replaced;",
                                                  "thread", "data race"),
}  # fmt: skip
QUICK = {"random rows are taken as they are", "rows that do not exist are stored"}
CHOSEN = {name: (HEADER, *mutant) for name, mutant in MUTANTS.items() if PROVE or name in QUICK}


@pytest.fixture(scope="module")
def broken_headers(builder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return break_headers(builder, tmp_path_factory, SLICE, CHOSEN)


@pytest.mark.parametrize("name", CHOSEN)
def test_broken_kernel_is_found(builder, broken_headers: dict[str, Path], name: str) -> None:
    assert_found(builder, SLICE, broken_headers[name], CHOSEN[name])


@prove
@needs_nvcc
def test_the_basis_is_read_two_columns_at_once_and_there_is_no_atomic(tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", "-Icsrc/include", "-Icsrc", "-arch=compute_80", "-ptx",
               f"csrc/cuda/{SLICE}.cu", "-o", str(tmp_path / "all.ptx")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    bodies = re.split(r"\.entry (\w+)", (tmp_path / "all.ptx").read_text())[1:]
    assert len(bodies) == 12
    for mangled, body in zip(bodies[::2], bodies[1::2], strict=True):
        pairs = len(re.findall(r"ld\.global\.v2\.(?:f32|f64|b32|b64|u32|u64)", body))
        assert pairs >= (2 if "sweep" in mangled else 0), mangled
        assert not re.search(r"\batom\.|\bred\.(global|shared)", body)
