"""The kernels of sliding_window with one line broken, which must be found, and what nvcc makes of their products.

RMTKERNELS_PROVE=1 runs all of it; else what takes seconds. The sanitizers' silence: test_sliding_window_emulated.py."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.emulate.proof import PROVE, ROOT, assert_found, break_headers, prove

SLICE, GRAM, SHARED, CORE = "sliding_window", "sliding_window_gram.cuh", "sliding_window.cuh", "tensor_core.cuh"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")

# (header, text as shipped, text broken, build, what it says). The plain build says what the driver's reference found.
MUTANTS = {
    "a tile begins one row late":
        (GRAM, "place > tile - rows.window &&", "place > tile - rows.window + 1 &&", "plain", "wrong windows"),
    "rows past the list's end are read":
        (GRAM, " && place < listed;", ";", "memory", "runtime error"),
    "products past the list's end are stored":
        (GRAM, "if (place >= listed) continue;", "", "plain", "wrong windows"),
    "offsets are read before they are there":
        (GRAM, "__syncthreads();  // the offsets", "// the offsets", "thread", "data race"),
    "the first slice is multiplied before it is there":
        (GRAM, "__syncthreads();  // the first", "// the first", "thread", "data race"),
    "a slice is overwritten while it is multiplied":
        (GRAM, "__syncthreads();  // nobody", "// nobody", "thread", "data race"),
    "counts are added up before they are there":
        ("block_scan.cuh", "__syncthreads();", "", "thread", "data race"),
    "the other way round belongs to another row":
        (GRAM, "middle[k - k * 2 * rows.window]", "middle[k - k / 2 * 2 * rows.window]", "plain",
               "wrong windows"),
    "the oldest row is taken for the newest":
        (GRAM, "slot > newest ?", "slot >= newest ?", "plain", "wrong windows"),
    "slots that are not in use are read":
        (GRAM, "i < 0 || j < 0 ? 0", "i < 0 && j < 0 ? 0", "plain", "wrong windows"),
    "a window ends one row early":
        (GRAM, "+ 1) * stride - 1]", "+ 1) * stride - 2]", "plain", "wrong windows"),
    "a split is left out":
        (GRAM, "int64_t split = 0;", "int64_t split = 1;", "plain", "wrong windows"),
    "splits overlap":
        (GRAM, "end = begin + kSplitDim < rows.dim ? begin + kSplitDim : rows.dim;", "end = rows.dim;", "plain",
               "wrong windows"),
    "elements past a row's end count":
        (GRAM, " || first >= rows.dim)", ")", "plain", "wrong windows"),
    "where a row begins is told in 32 bits":
        (GRAM, "= (own + i) * rows.step_stride;", "= int((own + i) * rows.step_stride);", "plain",
               "rows far apart"),
    "masked rows are taken":
        (GRAM, "rows.mask == nullptr || rows.mask[", "rows.mask == nullptr || !rows.mask[", "plain",
               "wrong windows"),
    "rows that are not finite are taken":
        (GRAM, "taken = norm_is_finite(", "taken = true || norm_is_finite(", "plain", "wrong windows"),
    "a fragment comes from other rows":
        (GRAM, "lane() % 16][16 * step + lane() / 16 * 8]", "lane() % 8 + lane() / 16 * 8][16 * step + lane() / 8"
               " % 2 * 8]", "plain", "wrong windows"),
    "half a slice is multiplied twice":
        (GRAM, "lane() % 8][lane() / 8 * 8]", "lane() % 8][lane() / 8 % 2 * 8]", "plain", "wrong windows"),
    "CUDA cores mistake a column":
        (GRAM, "return 8 * n + lane() / 2 % 8;", "return 8 * n + lane() / 4;", "plain", "wrong windows"),
    "bfloat16 is taken for float16":
        (CORE, "double(to_float(Half{", "double(to_float(float16{", "plain", "wrong windows"),
    "any address is taken for aligned":
        (SHARED, "(data) % sizeof(Pack<T>) == 0", "(data) % 1 == 0", "memory", "misaligned"),
}  # fmt: skip
QUICK = {"a tile begins one row late", "a slice is overwritten while it is multiplied"}
CHOSEN = {name: mutant for name, mutant in MUTANTS.items() if PROVE or name in QUICK}


@pytest.fixture(scope="module")
def broken_headers(builder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return break_headers(builder, tmp_path_factory, SLICE, CHOSEN)


@pytest.mark.parametrize("name", CHOSEN)
def test_broken_kernel_is_found(builder, broken_headers: dict[str, Path], name: str) -> None:
    assert_found(builder, SLICE, broken_headers[name], MUTANTS[name])


@prove
@needs_nvcc
def test_instructions(tmp_path: Path) -> None:
    """Tensor cores multiply 16-bit rows in their own type, and nothing else; there is no atomic."""
    command = ["nvcc", "-std=c++17", "-O3", "-Icsrc/include", "-Icsrc", "-arch=compute_80", "-ptx",
               f"csrc/cuda/{SLICE}.cu", "-o", str(tmp_path / "all.ptx")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    bodies = re.split(r"\.entry (\w+)", (tmp_path / "all.ptx").read_text())[1:]
    assert len(bodies) == 2 * (6 + 3 + 9 + 3)
    for mangled, body in zip(bodies[::2], bodies[1::2], strict=True):
        assert not re.search(r"\batom\.|\bred\.(global|shared)", body), mangled
        products = "products" in mangled
        assert ("mma.sync" in body) == ("ldmatrix" in body) == (products and "float16" in mangled), mangled
        assert ("f32.bf16.bf16.f32" in body) == (products and "bfloat16" in mangled), mangled
        assert "tf32" not in body, mangled
        if products or "accept" in mangled:
            assert re.search(r"ld\.global\S*\.v(4\.[a-z]32|2\.[a-z]64)", body), mangled
