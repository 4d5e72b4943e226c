"""Every checker finds the bugs it is there for: planted ones, and the shipped kernels with one line broken."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HEADERS = Path(__file__).resolve().parents[2] / "csrc/include/rmtkernels"
GPU, SLIDING_WINDOW, SPECTRUM = "gpu.cuh", "sliding_window.cuh", "spectrum.cuh"
EIGENVALUES = "small_eigenvalues.cuh"


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


@pytest.mark.parametrize("case", ["empty_grid", "more_shared_than_asked_for"])
def test_bad_launch_shape_is_an_error(builder, case: str) -> None:
    assert run(builder.planted_bugs("plain"), case).returncode == 3


# slice -> mutant -> (header, text as shipped, text broken, build, what it says). The plain build says what the driver's
# own reference found.
MUTANTS = {
    "sliding_window": {
        "a warp's sum leaves lanes out":
            (GPU, "offset = kWarpSize / 2;", "offset = kWarpSize / 4;", "plain", "wrong Gram matrix"),
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
    },
    "spectrum": {
        "a packed index is off by one":
            (EIGENVALUES, ": packed_row(j) + i;", ": packed_row(j) + i + 1;", "plain", "eigenvalue of"),
        "the reflector has the wrong sign":
            (EIGENVALUES, "head + copysign(norm, head)", "head - copysign(norm, head)", "plain", "eigenvalue of"),
        "the update forgets its second half":
            (EIGENVALUES, "v * m.w[j] + w * m.v[j]", "v * m.w[j] - w * m.v[j]", "plain", "eigenvalue of"),
        "the tail is not summed to its end":
            (EIGENVALUES, "if (j < k + 2)", "if (j < k + 2 || j == n - 1)", "plain", "eigenvalue of"),
        "bisection stops early":
            (EIGENVALUES, "kPassesAtMost = 48", "kPassesAtMost = 12", "plain", "eigenvalue of"),
        "small eigenvalues are not found to their own digits":
            (EIGENVALUES, "kSmallestWidth = 0x1p-80", "kSmallestWidth = 0x1p-30", "plain", "eigenvalue of"),
        "the count is off by one":
            (EIGENVALUES, "(point + 1) * step) > number", "(point + 1) * step) >= number", "plain", "eigenvalue of"),
        "a matrix is exchanged by halves":
            (EIGENVALUES, "j < n && j != q", "j < n && j < q", "plain", "eigenvalue of"),
        "the row's mean is subtracted once":
            (SPECTRUM, "(total - m.w[x]) - m.w[j]", "total - m.w[x]", "plain", "lambda of"),
        "the sum of all entries leaves out the upper triangle":
            (SPECTRUM, "2 * below + entry", "below + entry", "plain", "descriptor of"),
        "the grid's second launch starts over":
            (SPECTRUM, "problem = first_problem + blockIdx.x;", "problem = 0 * first_problem + blockIdx.x;",
             "plain", "eigenvalue of"),
        "the kernel does not ask for its shared memory":
            (SPECTRUM, "(descriptors ? kBins : 0)", "(descriptors ? 0 : 0)", "memory", "heap-buffer-overflow"),
        "no barrier after the reflector":
            (EIGENVALUES, "__syncthreads();\n    const double beta", "const double beta", "thread", "data race"),
        "no barrier after the product":
            (EIGENVALUES, "multiply(m, k + 1, n);\n    __syncthreads();", "multiply(m, k + 1, n);",
             "thread", "data race"),
        "no barrier after the update":
            (EIGENVALUES, "rank_two_update(m, k + 1, n);\n    __syncthreads();", "rank_two_update(m, k + 1, n);",
             "thread", "data race"),
        "one place for the factors of two reflections":
            (EIGENVALUES, "m.scalars + k % 2;", "m.scalars;", "thread", "data race"),
        "no barrier between layers":
            (SPECTRUM, "facts.add(raw_trace, block, rows, args.dim);\n    __syncthreads();",
             "facts.add(raw_trace, block, rows, args.dim);", "thread", "data race"),
        "the logarithms are read before they are written":
            (SPECTRUM, "__syncwarp();", "", "thread", "data race"),
    },
}  # fmt: skip
# One of each kind is tried in every run, the others with RMTKERNELS_PROVE=1: each is compiled for itself.
QUICK = {"the reflector has the wrong sign", "bisection stops early", "no barrier after the product"}


def chosen() -> list[tuple[str, str]]:
    prove = os.environ.get("RMTKERNELS_PROVE") == "1"
    return [
        (name, mutant)
        for name, mutants in MUTANTS.items()
        for mutant in mutants
        if prove or name == "sliding_window" or mutant in QUICK
    ]


@pytest.fixture(scope="module")
def broken_headers(builder, tmp_path_factory: pytest.TempPathFactory, request) -> dict[tuple[str, str], Path]:
    """A copy of the headers for each mutant that pytest was asked for. All are sent to the compilers at once."""
    folders = {}
    tests = [test for test in request.session.items if test.function is test_broken_kernel_is_found]
    for number, parameters in enumerate(test.callspec.params for test in tests):
        name, mutant = parameters["name"], parameters["mutant"]
        header, shipped, broken, build, _ = MUTANTS[name][mutant]
        folders[name, mutant] = tmp_path_factory.mktemp(f"mutant{number}")
        copy = folders[name, mutant] / "rmtkernels"
        shutil.copytree(HEADERS, copy)
        source = (copy / header).read_text()
        assert source.count(shipped) == 1, f"{mutant}: {header} has changed"
        (copy / header).write_text(source.replace(shipped, broken))
        builder.start_driver(build, name, folders[name, mutant])
    return folders


@pytest.mark.parametrize(("name", "mutant"), chosen())
def test_broken_kernel_is_found(builder, broken_headers: dict[tuple[str, str], Path], name: str, mutant: str) -> None:
    build, message = MUTANTS[name][mutant][-2:]
    done = run(builder.driver(build, name, broken_headers[name, mutant]))
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
