"""The kernels of lowrank_linear under the sanitizers, and with one line broken, which must be found: with
RMTKERNELS_PROVE=1."""

from pathlib import Path

import pytest

from tests.emulate.proof import SILENT, assert_found, assert_silent, break_headers, prove

SLICE, HEADER = "lowrank_linear", "lowrank_linear.cuh"


@prove
@pytest.mark.parametrize(("build", "blocks"), SILENT)
def test_checkers_are_silent(builder, build: str, blocks: int) -> None:
    assert_silent(builder, SLICE, build, blocks)


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
IN_HEADER = {name: (HEADER, *mutant) for name, mutant in MUTANTS.items()}


@pytest.fixture(scope="module")
def broken_headers(builder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return break_headers(builder, tmp_path_factory, SLICE, IN_HEADER)


@prove
@pytest.mark.parametrize("name", IN_HEADER)
def test_broken_kernel_is_found(builder, broken_headers: dict[str, Path], name: str) -> None:
    assert_found(builder, SLICE, broken_headers[name], IN_HEADER[name])
