"""Every checker finds the bugs it is there for: planted ones, and the shipped kernels with one line broken."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HEADERS = Path(__file__).resolve().parents[2] / "csrc/include/rmtkernels"
SLIDING_WINDOW = "sliding_window.cuh"


Done = subprocess.CompletedProcess[str]


def run(program: Path, *arguments: str, schedule: str = "rr", workers: int = 1) -> Done:
    environment = os.environ | {"EMU_SCHED": schedule, "EMU_WORKERS": str(workers), "TSAN_OPTIONS": "halt_on_error=1"}
    command = [program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("case", ["missing_syncthreads", "missing_syncwarp", "racing_blocks"])
def test_race_passes_unnoticed_without_thread_sanitizer(builder, case: str) -> None:
    assert run(builder.planted_bugs("plain"), case).returncode == 0


@pytest.mark.parametrize("case", ["missing_syncthreads", "missing_syncwarp", "racing_blocks"])
def test_thread_sanitizer_finds_race(builder, case: str) -> None:
    done = run(builder.planted_bugs("thread"), case, workers=2)
    assert done.returncode != 0
    assert "data race" in done.stderr
    assert case in done.stderr


@pytest.mark.parametrize("schedule", ["rr", "rev", "rand"])
@pytest.mark.parametrize("build", ["plain", "thread", "address", "wavefronts of 64"])
def test_correct_code_passes(builder, build: str, schedule: str) -> None:
    done = run(builder.planted_bugs(build), "correct", schedule=schedule, workers=2)
    assert (done.returncode, done.stderr) == (0, "")


def test_schedule_exposes_missing_barrier(builder) -> None:
    assert run(builder.planted_bugs("plain"), "missing_syncthreads", schedule="rev").returncode == 1


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("divergent_syncthreads", "divergent __syncthreads()"),
        ("exit_before_syncthreads", "some threads of the block have already returned"),
        ("shuffle_of_half_a_warp", "deadlock in block (0,0,0)"),
        ("shuffle_from_outside_the_mask", "shuffle reads lane 20 outside the mask"),
    ],
)
@pytest.mark.parametrize("schedule", ["rr", "rev", "rand"])
def test_emulator_reports(builder, case: str, message: str, schedule: str) -> None:
    done = run(builder.planted_bugs("plain"), case, schedule=schedule)
    assert done.returncode < 0
    assert message in done.stderr


def test_emulator_reports_32_lanes_on_a_wavefront_of_64(builder) -> None:
    assert run(builder.planted_bugs("plain"), "mask_of_32_lanes").returncode == 0
    done = run(builder.planted_bugs("wavefronts of 64"), "mask_of_32_lanes")
    assert done.returncode < 0
    assert "outside its own mask" in done.stderr


@pytest.mark.parametrize("case", ["static_overrun", "dynamic_overrun"])
def test_address_sanitizer_finds_overrun(builder, case: str) -> None:
    done = run(builder.planted_bugs("address"), case)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
    assert case in done.stderr


def test_unwritten_shared_memory_is_not_a_number(builder) -> None:
    assert run(builder.planted_bugs("plain"), "unwritten_shared").returncode == 1


def test_bad_launch_shape_is_an_error(builder) -> None:
    assert run(builder.planted_bugs("plain"), "empty_grid").returncode == 3


# (header, text as shipped, text broken, build, what it says). The plain build says what the driver's reference found.
MUTANTS = {
    "a warp's sum leaves lanes out":
        ("gpu.cuh", "offset = kWarpSize / 2;", "offset = kWarpSize / 4;", "plain", "wrong Gram matrix"),
    "the Gram matrix is not symmetric":
        (SLIDING_WINDOW, "stream_gram[j * window + slot] = dot;", "", "plain", "wrong Gram matrix"),
    "a row is counted once per launch":
        (SLIDING_WINDOW, "if (last_chunk)", "if (last_chunk || true)", "plain", "wrong counters"),
    "the barrier before the decision is missing":
        (SLIDING_WINDOW, "__syncthreads_and(finite)", "finite", "thread", "data race"),
    "all lanes store the product":
        (SLIDING_WINDOW, "if (lane == 0) {", "{", "thread", "data race"),
    "the last pack reads past the row":
        (SLIDING_WINDOW, "first + i < dim ?", "first + i <= dim ?", "memory", "heap-buffer-overflow"),
    "any address is taken for aligned":
        (SLIDING_WINDOW, "% sizeof(Pack<T>) == 0;", "% 1 == 0;", "memory", "misaligned address"),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken_headers(builder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy of the headers for each mutant. All are sent to the compilers at once."""
    folders = {}
    for number, (mutant, (header, shipped, broken, build, _)) in enumerate(MUTANTS.items()):
        folders[mutant] = tmp_path_factory.mktemp(f"mutant{number}")
        copy = folders[mutant] / "rmtkernels"
        shutil.copytree(HEADERS, copy)
        source = (copy / header).read_text()
        assert source.count(shipped) == 1, f"{mutant}: {header} has changed"
        (copy / header).write_text(source.replace(shipped, broken))
        builder.start_driver(build, folders[mutant])
    return folders


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_kernel_is_found(builder, broken_headers: dict[str, Path], mutant: str) -> None:
    build, message = MUTANTS[mutant][-2:]
    done = run(builder.driver(build, broken_headers[mutant]))
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
