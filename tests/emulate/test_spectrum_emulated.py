"""The shipped CUDA kernels of spectrum, run on the CPU, against LAPACK, the float64 oracle and the CPU kernel."""

import ctypes
import itertools
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rmtkernels import DESCRIPTORS, spectrum_descriptors
from rmtkernels.ops.law_table import law_table
from rmtkernels.reference import spectrum_descriptors_ref
from tests.helpers import gram_of, normal, same_bits

PROVE = os.environ.get("RMTKERNELS_PROVE") == "1"
SCHEDULES = ["rr", "rev", "rand"]
SMALL = [1, 2, 3, 5, 16]
SIZES = [*SMALL, 32, 33, *([64, 65, 128] if PROVE else [])]
INVALID_VALUE = 1
JOINTS = [None, "none", "trace"]
Result = tuple[Tensor, Tensor]


class DescriptorArgs(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("gram", "seen", "laws", "descriptors", "eigenvalues")],
        ("seen_stride", ctypes.c_int64),
        *[(name, ctypes.c_int64 * 2) for name in ("descriptors_stride", "eigenvalues_stride")],
        *[(name, ctypes.c_int64) for name in ("layers", "batch", "window", "dim")],
        *[(name, ctypes.c_int) for name in ("joint", "noise")],
        *[(name, ctypes.c_bool) for name in ("center", "normalize")],
    ]


@pytest.fixture(scope="module")
def library(builder) -> ctypes.CDLL:
    return ctypes.CDLL(str(builder.kernels("library", "spectrum")))


@pytest.fixture(scope="module")
def contracted(builder) -> ctypes.CDLL:
    return ctypes.CDLL(str(builder.kernels("library with contraction", "spectrum")))


def eigvalsh(library: ctypes.CDLL, matrices: np.ndarray) -> np.ndarray:
    """Of contiguous (B, n, n) matrices; what lies around the result must stay as it is."""
    batch, n, _ = matrices.shape
    padded = np.full(batch * n + 2, np.nan, matrices.dtype)
    values = padded[1:-1]
    error = library.rmtkernels_cuda_spectrum_eigvalsh(
        ctypes.c_void_p(matrices.ctypes.data), ctypes.c_void_p(values.ctypes.data),
        ctypes.c_bool(matrices.itemsize == 8), ctypes.c_int64(n), ctypes.c_int64(batch), None,
    )  # fmt: skip
    assert error == 0
    assert np.isnan(padded[[0, -1]]).all()
    return values.reshape(batch, n)


def describe(
    library: ctypes.CDLL,
    gram: Tensor,
    seen: Tensor,
    dim: int,
    center: bool = True,
    joint: str | None = None,
    normalize: str | None = None,
    noise: str = "median",
) -> Result:
    """Into strided buffers full of NaN, as a monitor keeps them."""
    layers, batch, window, _ = gram.shape
    spectra, width = (layers, dim) if joint is None else (1, dim * layers)
    laws = torch.tensor(law_table(window, width))
    column = torch.stack([seen, -seen], 1)
    out = torch.full((batch, spectra, len(DESCRIPTORS) + 3), torch.nan)
    values = torch.full((batch, spectra, window + 2), torch.nan)
    strides = [(ctypes.c_int64 * 2)(buffer.stride(1), buffer.stride(0)) for buffer in (out, values)]
    args = DescriptorArgs(
        gram.data_ptr(), column.data_ptr(), laws.data_ptr(), out[..., 1:].data_ptr(), values[..., 1:].data_ptr(),
        column.stride(0), *strides, layers, batch, window, dim,
        JOINTS.index(joint), ("median", "trace").index(noise), center, normalize is not None,
    )  # fmt: skip
    assert library.rmtkernels_cuda_spectrum_descriptors(ctypes.byref(args), None) == 0
    assert out[..., [0, -1, -2]].isnan().all() and values[..., [0, -1]].isnan().all()
    return out[..., 1:-2].transpose(0, 1).contiguous(), values[..., 1:-1].transpose(0, 1).contiguous()


def assert_near(result: Result, want: Result, tolerance: float = 3e-7) -> None:
    """One rounding to float32 of what float64 arithmetic gives, but for what counts."""
    (descriptors, eigenvalues), (want_descriptors, want_eigenvalues) = result, want
    largest = want_eigenvalues[..., :1].double()
    error = (eigenvalues.double() - want_eigenvalues.double()).abs()
    assert (error <= 1e-7 * want_eigenvalues + 1e-13 * largest + 2.0**-149).all()
    assert (eigenvalues >= 0).all() and (eigenvalues.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(descriptors.double(), want_descriptors.double(), rtol=tolerance, atol=tolerance)


def windows(layers: int, batch: int, window: int, dim: int, seed: int = 0) -> Tensor:
    """Gram matrices of noise with a direction in common, layers of different loudness."""
    rows = normal(layers, batch, window, dim, seed=seed, dtype=torch.float64)
    rows += 2 * normal(layers, batch, window, 1, seed=seed + 1, dtype=torch.float64)
    return gram_of(rows * 10.0 ** -torch.arange(layers, dtype=torch.float64)[:, None, None, None])[0]


def symmetric(batch: int, n: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng([seed, n]).standard_normal((batch, n, n))
    return x + x.swapaxes(-1, -2)


def assert_eigenvalues(values: np.ndarray, matrices: np.ndarray) -> None:
    """Ascending, and within a few float64 roundings of the largest eigenvalue (and one of the result's type)."""
    exact = np.linalg.eigvalsh(matrices.astype(np.float64))
    largest = np.abs(exact).max(-1, keepdims=True)
    bound = 2e-15 * largest * exact.shape[-1] ** 0.5
    if matrices.dtype == np.float32:
        bound = bound + 2.0**-24 * np.abs(exact) + 2.0**-150
    assert (np.diff(values, axis=-1) >= 0).all()
    assert (np.abs(values - exact) <= bound).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", SIZES)
def test_eigenvalues_agree_with_lapack(library, monkeypatch, n: int, dtype: type, schedule: str) -> None:
    if n > 16 and schedule != "rr" and not PROVE:
        pytest.skip("RMTKERNELS_PROVE=1 runs it")
    monkeypatch.setenv("EMU_SCHED", schedule)
    thin = np.random.default_rng(n).standard_normal((1, n, max(1, n // 3)))
    matrices = np.concatenate([symmetric(2, n), thin @ thin.swapaxes(-1, -2)]).astype(dtype)
    values = eigvalsh(library, matrices)
    assert_eigenvalues(values, matrices)
    upper = np.triu(np.full((n, n), np.nan, dtype), 1)
    assert eigvalsh(library, matrices + upper).tobytes() == values.tobytes()  # which is not read


def graded(n: int, decades: float, order: str) -> np.ndarray:
    scale = 10.0 ** (-decades * np.arange(n) / max(n - 1, 1))
    scale = {"down": scale, "up": scale[::-1], "valley": np.concatenate([scale[::2], scale[1::2][::-1]])}[order]
    return np.sqrt(scale)[:, None] * (np.eye(n) + symmetric(1, n)[0] / (20 * n)) * np.sqrt(scale)


FAMILIES = {
    "zero": lambda n: np.zeros((n, n)),
    "identity": lambda n: np.eye(n),
    "ones": lambda n: np.ones((n, n)),
    "negative definite": lambda n: -symmetric(1, n)[0] @ symmetric(1, n)[0],
    "exchange": lambda n: np.eye(n)[::-1].copy(),
    "cyclic": lambda n: np.roll(np.eye(n), 1, 0) + np.roll(np.eye(n), -1, 0),
    "Hilbert": lambda n: 1 / (np.arange(n)[:, None] + np.arange(n) + 1),
    "graded down": lambda n: graded(n, 12, "down"),
    "graded up": lambda n: graded(n, 12, "up"),
    "graded valley": lambda n: graded(n, 12, "valley"),
    "graded up 200 decades": lambda n: graded(n, 200, "up"),
    "a tail far below its head": lambda n: np.eye(n, k=1) + np.eye(n, k=-1) + 1e-9 * symmetric(1, n)[0],
    "Wilkinson W+": lambda n: np.diag(np.abs(np.arange(n) - n // 2) + 0.0) + np.eye(n, k=1) + np.eye(n, k=-1),
    "underflowing couplings": lambda n: np.eye(n) + np.diag(10.0 ** (-9.0 * np.arange(n - 1)), -1),
    "huge": lambda n: symmetric(1, n)[0] * 2.0**1000,
    "tiny": lambda n: symmetric(1, n)[0] * 2.0**-1000,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_families(library, contracted, family: str) -> None:
    for n in (1, 2, 3, 7, 17, *((33, 64) if PROVE else ())):
        matrix = FAMILIES[family](n)
        matrix = np.tril(matrix) + np.tril(matrix, -1).T
        for code in (library, contracted):
            assert_eigenvalues(eigvalsh(code, matrix[None]), matrix[None])


@pytest.mark.parametrize("order", ["down", "up", "valley"])
def test_small_eigenvalues_of_a_graded_matrix_keep_their_digits(library, order: str) -> None:
    matrix = graded(12, 10, order)
    exact = torch.tensor(np.sort(1 / np.linalg.eigvalsh(np.linalg.inv(graded(12, 10, "down")))))
    same_spectrum = np.array_equal(matrix, graded(12, 10, "down"))
    values = torch.from_numpy(eigvalsh(library, matrix[None])[0])
    if same_spectrum:  # the inverse of the one in descending order is accurate enough to compare with
        assert ((values - exact).abs() <= 1e-8 * exact).all()
    sorted_first = np.argsort(-np.diag(matrix))
    permuted = matrix[sorted_first][:, sorted_first]
    again = torch.from_numpy(eigvalsh(library, permuted[None])[0])
    assert ((values - again).abs() <= 1e-11 * again).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_entry_spoils_its_matrix_alone(library, bad: float) -> None:
    clean = symmetric(3, 9).astype(np.float32)
    want = eigvalsh(library, clean)
    spoilt = clean.copy()
    spoilt[1, 5, 2] = bad
    values = eigvalsh(library, spoilt)
    assert np.isnan(values[1]).all()
    assert values[[0, 2]].tobytes() == want[[0, 2]].tobytes()


OPTIONS = [
    dict(zip(("center", "joint", "normalize", "noise"), values, strict=True))
    for values in itertools.product((True, False), JOINTS, (None, "rms"), ("median", "trace"))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_descriptors_agree_with_the_oracle(library, contracted, options: dict) -> None:
    """All options, windows that are empty, filling up, full and long past; slots that are not in use hold NaN."""
    gram, dim = windows(3, 5, 6, 11), 11
    seen = torch.tensor([0, 1, 4, 6, 10**6 + 1])
    want = spectrum_descriptors_ref(gram, seen, dim, **options)
    for b, count in enumerate(seen.tolist()):
        gram[:, b, count:] = torch.nan
        gram[:, b, :, count:] = torch.nan
    for code in (library, contracted):
        assert_near(describe(code, gram, seen, dim, **options), want)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dim", [3, 200])
@pytest.mark.parametrize("window", SIZES)
def test_descriptors_of_every_size(library, monkeypatch, window: int, dim: int, schedule: str) -> None:
    if window > 16 and schedule != "rr" and not PROVE:
        pytest.skip("RMTKERNELS_PROVE=1 runs it")
    monkeypatch.setenv("EMU_SCHED", schedule)
    gram = windows(1, 2, window, dim, seed=window)
    seen = torch.tensor([window, max(window - 2, 1)])
    got = describe(library, gram, seen, dim)
    assert_near(got, spectrum_descriptors_ref(gram, seen, dim))
    assert_near(got, spectrum_descriptors(gram, seen, dim, backend="cpu"))


def test_widest_window(library) -> None:
    """Its block needs 75 KB: more than a kernel may use unasked, less than the 99 KB that the emulator gives."""
    gram, seen = windows(1, 1, 128, 300), torch.tensor([128])
    assert_near(describe(library, gram, seen, 300), spectrum_descriptors(gram, seen, 300, backend="cpu"))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("joint", JOINTS)
def test_windows_without_energy(library, joint: str | None, center: bool) -> None:
    gram = torch.full((2, 3, 5, 5), torch.nan)
    gram[:, 1], gram[:, 2] = 0, 3  # no rows; zero rows; equal rows, of which centring leaves nothing
    seen = torch.tensor([0, 5, 5])
    got = describe(library, gram, seen, 7, center=center, joint=joint)
    want = spectrum_descriptors(gram, seen, 7, center=center, joint=joint)
    assert_near(got, want)
    assert (got[1][:, :2] == 0).all()


@pytest.mark.parametrize("joint", JOINTS)
@pytest.mark.parametrize("place", [(0, 0), (5, 2)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_gram_matrix_spoils_its_own_window_alone(library, joint: str | None, place, bad: float) -> None:
    gram, seen = windows(2, 3, 6, 9), torch.tensor([6, 6, 6])
    want = describe(library, gram, seen, 9, joint=joint)
    i, j = place
    gram[1, 1, i, j] = gram[1, 1, j, i] = bad
    got = describe(library, gram, seen, 9, joint=joint)
    layer = 1 if joint is None else 0
    assert got[0][layer, 1].isnan().all() and got[1][layer, 1, :5].isnan().all()
    for mine, theirs in zip(got, want, strict=True):
        mine[layer, 1] = theirs[layer, 1]
        assert same_bits(mine, theirs)


def test_bits_do_not_depend_on_schedule_or_company(library, monkeypatch) -> None:
    gram, seen = windows(2, 3, 9, 20), torch.tensor([9, 4, 30])
    want = describe(library, gram, seen, 20)
    for schedule in SCHEDULES:
        monkeypatch.setenv("EMU_SCHED", schedule)
        assert all(map(same_bits, describe(library, gram, seen, 20), want))
    for layer, b in itertools.product(range(2), range(3)):
        alone = describe(library, gram[layer : layer + 1, b : b + 1].contiguous(), seen[b : b + 1], 20)
        assert all(same_bits(a, w[layer : layer + 1, b : b + 1]) for a, w in zip(alone, want, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_partly_filled_window_gives_the_bits_of_a_full_one_of_that_size(library, rows: int) -> None:
    """Though it is worked on by more threads: 40 rows take two warps across, 7 take one."""
    gram = windows(1, 1, 40, 60)
    padded = describe(library, gram, torch.tensor([rows]), 60, normalize="rms")
    tight = describe(library, gram[..., :rows, :rows].contiguous(), torch.tensor([rows]), 60, normalize="rms")
    assert same_bits(padded[0], tight[0])
    assert same_bits(padded[1][..., :rows], tight[1])


@pytest.mark.parametrize(("layers", "batch", "joint"), [(0, 3, None), (2, 0, None), (2, 0, "trace")])
def test_nothing_to_do(library, layers: int, batch: int, joint: str | None) -> None:
    values, _ = describe(
        library, torch.zeros(layers, batch, 4, 4), torch.zeros(batch, dtype=torch.int64), 5, joint=joint
    )
    assert values.numel() == 0
    assert eigvalsh(library, np.zeros((0, 4, 4))).shape == (0, 4)


@pytest.mark.parametrize("window", [0, 129])
def test_an_impossible_size_is_an_error(library, window: int) -> None:
    args = DescriptorArgs(batch=1, layers=1, window=window, dim=1)
    assert library.rmtkernels_cuda_spectrum_descriptors(ctypes.byref(args), None) == INVALID_VALUE
    assert library.rmtkernels_cuda_spectrum_eigvalsh(None, None, True, ctypes.c_int64(window), ctypes.c_int64(1), None)


def run(program: Path, workers: int, *arguments: str) -> None:
    environment = os.environ | {"EMU_WORKERS": str(workers), "EMU_SCHED": "rand", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


LARGEST = ["33"] if PROVE else ["9"]


@pytest.mark.parametrize("blocks_in_flight", [1, 2])
def test_thread_sanitizer_is_silent(builder, blocks_in_flight: int) -> None:
    run(builder.driver("thread", "spectrum"), blocks_in_flight, *LARGEST)


def test_address_and_undefined_behaviour_sanitizers_are_silent(builder) -> None:
    run(builder.driver("memory", "spectrum"), 1, *LARGEST)


def test_wavefronts_of_64_lanes(builder) -> None:
    run(builder.driver("wavefronts of 64", "spectrum"), 1, *LARGEST)
