"""The Triton kernels compiled for GPUs that are not here, from the package's own launches: nothing spills on NVIDIA's,
shared memory fits, and no kernel takes more than budget.json says. RMTKERNELS_PROVE=1 tries all launches and targets.

To set a new budget, run `python -m tests.triton.test_compiled` in the repository and look at what it changed.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from rmtkernels.ops.law_table import law_table_size  # noqa: E402
from rmtkernels.triton import (  # noqa: E402
    covariance,
    lanczos,
    lowrank_linear,
    sliding_window,
    sliding_window_gram,
    spectrum,
    spectrum_descriptors,
)
from tests.triton.compile_only import TARGETS, Resources, compile_only, resources  # noqa: E402

BUDGET = Path(__file__).with_name("budget.json")
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KB that a program may have
MOST_SPILLED = 16  # bytes: ptxas may put a few registers aside, outside the loops, for a second program on the SM
FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
Launch = Callable[[], object]


def linear(rank: int, dtype: torch.dtype, weights: torch.dtype | None = None) -> Launch:
    weights = dtype if weights is None else weights
    x, bias = torch.empty(4096, 1024, dtype=dtype), torch.empty(2048, dtype=weights)
    down, up = torch.empty(rank, 1024, dtype=weights), torch.empty(2048, rank, dtype=weights)
    return lambda: lowrank_linear.lowrank_linear(x, down, up, bias, False)


def gradient(rank: int, dtype: torch.dtype) -> Launch:
    """dx and what the gradient of `down` needs: the same kernel with both factors transposed."""
    dy, up, down = (torch.empty(*shape, dtype=dtype) for shape in ((4096, 2048), (2048, rank), (rank, 1024)))
    return lambda: lowrank_linear.lowrank_linear(dy, up.T, down.T, None, True)


def eigenvalues(n: int, dtype: torch.dtype) -> Launch:
    return lambda: spectrum.spectrum_eigvalsh(torch.empty(32, n, n, dtype=dtype))


def descriptors(window: int, joint: int, noise: int) -> Launch:
    spectra = 1 if joint else 3
    buffers = torch.empty(spectra, 4, 24), torch.empty(spectra, 4, window), torch.empty(3, 4, window, window)
    laws = torch.empty(law_table_size(window), dtype=DOUBLE)
    rest = torch.empty(4, dtype=torch.int64), laws, 4096, joint != 1, joint, joint != 1, noise
    return lambda: spectrum_descriptors.spectrum_descriptors_(*buffers, *rest)


def push(dtype: torch.dtype, masked: bool, steps: int | None) -> Launch:
    ring, gram = torch.empty(32, 4, 32, 4096, dtype=dtype), torch.empty(32, 4, 32, 32)
    shape = (4, 4096) if steps is None else (4, steps, 4096)
    rows, mask = [torch.empty(*shape, dtype=dtype)] * 32, torch.empty(shape[:-1], dtype=torch.bool)
    seen = torch.empty(4, 3, dtype=torch.int64)
    return lambda: sliding_window.window_push_(ring, gram, seen, rows, mask if masked else None)


def windows(dtype: torch.dtype, masked: bool, shape: tuple[int, int, int], window: int) -> Launch:
    hidden, mask = torch.empty(*shape, dtype=dtype), torch.empty(shape[:2], dtype=torch.bool)
    return lambda: sliding_window_gram.window_gram(hidden, window, 1, mask if masked else None)


def update(state: torch.dtype, dtype: torch.dtype) -> Launch:
    mean, totals = torch.zeros(1024, dtype=DOUBLE), torch.ones(5, dtype=DOUBLE)
    scatter, batch, weights = torch.zeros(1024, 1024, dtype=state), torch.ones(256, 1024, dtype=dtype), torch.ones(256)
    return lambda: covariance.covariance_update_(mean, scatter, totals, batch, weights, None, 0.9)


def block_step(dtype: torch.dtype, count: int, size: int, dim: int) -> Launch:
    rows, basis, noise = (torch.empty(vectors, dim, dtype=dtype) for vectors in (count, size, count))
    return lambda: lanczos.lanczos_orthonormalize(rows, basis, noise, torch.zeros((), dtype=DOUBLE), 1)


LAUNCHES: dict[str, Launch] = {
    **{f"lowrank_linear bf16 k={k}": linear(k, BFLOAT) for k in lowrank_linear.TILES_HALF},
    **{f"lowrank_linear f32 k={k}": linear(k, FLOAT) for k in lowrank_linear.TILES_FLOAT32},
    "lowrank_linear f16 k=100": linear(100, HALF),
    "lowrank_linear f32, bf16 weights k=100": linear(100, FLOAT, BFLOAT),
    "lowrank_linear gradient bf16 k=128": gradient(128, BFLOAT),
    "lowrank_linear gradient f32 k=128": gradient(128, FLOAT),
    **{f"spectrum_eigvalsh f64 n={n}": eigenvalues(n, DOUBLE) for n in spectrum.WARPS},
    "spectrum_eigvalsh f32 n=64": eigenvalues(64, FLOAT),
    "spectrum_descriptors_ n=64, joint": descriptors(64, 2, 0),
    "spectrum_descriptors_ n=32": descriptors(32, 0, 0),
    "spectrum_descriptors_ n=16, joint, as they are": descriptors(16, 1, 1),
    "window_push_ bf16": push(BFLOAT, True, None),
    "window_push_ f32, two steps": push(FLOAT, False, 2),
    "window_gram bf16": windows(BFLOAT, True, (4, 512, 4096), 64),
    "window_gram f32": windows(FLOAT, False, (4, 512, 4096), 64),
    "window_gram f16, all sizes 1": windows(HALF, True, (1, 1, 1), 1),
    "covariance_update_ f32, bf16 rows": update(FLOAT, BFLOAT),
    "covariance_update_ f64": update(DOUBLE, DOUBLE),
    "lanczos_orthonormalize f32": block_step(FLOAT, 8, 256, 4096),
    "lanczos_orthonormalize f64": block_step(DOUBLE, 8, 256, 4096),
    "lanczos_orthonormalize f32, all sizes 1": block_step(FLOAT, 1, 1, 3),
}


def measured(target: str, name: str) -> dict[str, Resources]:
    """Kernel -> what it takes; the largest of several of one kernel."""
    found: dict[str, Resources] = {}
    with compile_only(TARGETS[target]) as compiled:
        LAUNCHES[name]()
    for kernel_name, kernel in compiled:
        taken = resources(kernel)
        found[kernel_name] = Resources(*map(max, taken, found.get(kernel_name, taken)))
    return found


PROVE = os.environ.get("RMTKERNELS_PROVE") == "1"
QUICK = (
    "lowrank_linear bf16 k=64",
    "lowrank_linear f32 k=64",
    "spectrum_eigvalsh f64 n=64",
    "window_push_ bf16",
    "window_gram bf16",
)
TRIALS = [(target, name) for target in TARGETS for name in LAUNCHES if PROVE or (target == "sm_90" and name in QUICK)]


@pytest.mark.parametrize(("target", "name"), TRIALS)
def test_kernels_stay_within_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], target: str, name: str
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what comes from the cache warns of nothing
    found = measured(target, name)
    assert capfd.readouterr().err == ""
    assert max(taken.shared for taken in found.values()) <= SHARED[target] * 1024
    assert max(taken.spilled for taken in found.values()) <= (MOST_SPILLED if target.startswith("sm_") else 0)
    budget = json.loads(BUDGET.read_text())
    if budget["triton"] != triton.__version__:
        pytest.skip(f"the budget is that of Triton {budget['triton']}; nothing spills, and shared memory fits")
    allowed = {kernel: Resources(**most) for kernel, most in budget[target][name].items()}
    assert found.keys() == allowed.keys()
    for kernel, taken in found.items():
        assert all(used <= most for used, most in zip(taken, allowed[kernel], strict=True)), (taken, allowed[kernel])


def test_the_budget_knows_every_launch() -> None:
    budget = json.loads(BUDGET.read_text())
    assert all(budget[target].keys() == LAUNCHES.keys() for target in TARGETS)


def write_budget() -> None:
    """Compiles everything, and notes what it takes."""
    found = {
        target: {name: {k: r._asdict() for k, r in measured(target, name).items()} for name in LAUNCHES}
        for target in TARGETS
    }
    BUDGET.write_text(json.dumps({"triton": triton.__version__, **found}, indent=1) + "\n")


if __name__ == "__main__":
    write_budget()
