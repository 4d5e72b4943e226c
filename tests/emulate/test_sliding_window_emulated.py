"""The shipped CUDA kernels of sliding_window, run on the CPU, against float64 NumPy."""

import ctypes
import itertools
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

TYPES = ["float32", "bfloat16", "float16"]
SCHEDULES = ["rr", "rev", "rand"]
LAYERS_PER_LAUNCH = 128
INVALID_CONFIGURATION = 9
ROWS, REJECTED, SLOT = range(3)


class OfferedRows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *[(f"{name}_stride", ctypes.c_int64) for name in ("batch", "step", "dim")]]


class WindowPush(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("ring", "gram", "seen", "rows", "mask")],
        *[(name, ctypes.c_int64) for name in ("mask_batch_stride", "mask_step_stride")],
        *[(name, ctypes.c_int64) for name in ("layers", "batch", "steps", "window", "dim")],
        ("type", ctypes.c_int32),
    ]


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds to `dtype`; bfloat16, which NumPy lacks, as the upper halves of float32 (to nearest even)."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return np.ascontiguousarray(values, dtype)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    values = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored
    return values.astype(np.float64)


class Windows:
    """Ring, Gram matrices and counters, filled with NaN where nothing has been written, and the same in float64."""

    def __init__(self, library: ctypes.CDLL, dtype: str, layers: int, batch: int, window: int, dim: int) -> None:
        self.library, self.dtype, self.shape = library, dtype, (layers, batch, window, dim)
        self.ring = encode(np.full(self.shape, np.nan), dtype)
        self.gram = np.full((layers, batch, window, window), np.nan, np.float32)
        self.seen = np.zeros((batch, 3), np.int64)
        self.expected_ring = np.full(self.shape, np.nan)
        self.expected_seen = self.seen.copy()

    def push(self, rows: list[np.ndarray], mask: np.ndarray | None = None) -> int:
        """rows: one encoded (B, T, D) array per layer, of any strides; mask: (B, T)."""
        offered = (OfferedRows * len(rows))(*[(r.ctypes.data, *[s // r.itemsize for s in r.strides]) for r in rows])
        layers, batch, window, dim = self.shape
        mask_strides = (0, 0) if mask is None else mask.strides
        arguments = WindowPush(
            self.ring.ctypes.data, self.gram.ctypes.data, self.seen.ctypes.data, ctypes.addressof(offered),
            None if mask is None else mask.ctypes.data, *mask_strides,
            layers, batch, rows[0].shape[1] if rows else 0, window, dim, TYPES.index(self.dtype),
        )  # fmt: skip
        return self.library.rmtkernels_cuda_window_push(ctypes.byref(arguments), None)

    def push_and_check(self, rows: list[np.ndarray], mask: np.ndarray | None = None) -> None:
        assert self.push(rows, mask) == 0
        for b, t in itertools.product(range(self.shape[1]), range(rows[0].shape[1])):
            self._expect(b, [decode(layer[b, t], self.dtype) for layer in rows], mask is None or mask[b, t])
        self.check()

    def _expect(self, b: int, row: list[np.ndarray], offered: bool) -> None:
        seen = self.expected_seen[b]
        seen[SLOT] = -1
        if not offered:
            return
        if not all((values**2).sum() <= np.finfo(np.float32).max for values in row):
            seen[REJECTED] += 1
            return
        seen[SLOT] = seen[ROWS] % self.shape[2]
        seen[ROWS] += 1
        self.expected_ring[:, b, seen[SLOT]] = row

    def check(self) -> None:
        np.testing.assert_array_equal(self.seen, self.expected_seen)
        np.testing.assert_array_equal(decode(self.ring, self.dtype), self.expected_ring)
        expected = self.expected_ring @ self.expected_ring.swapaxes(-1, -2)
        norms = np.sqrt(np.diagonal(expected, axis1=-2, axis2=-1))
        scale = norms[..., :, None] * norms[..., None, :]
        np.testing.assert_array_equal(np.isnan(self.gram), np.isnan(expected))
        np.testing.assert_array_equal(self.gram, self.gram.swapaxes(-1, -2))
        assert np.nanmax(np.abs(self.gram - expected) / np.maximum(scale, 1e-300), initial=0) < 5e-7

    def bits(self) -> tuple[bytes, bytes, bytes]:
        return self.ring.tobytes(), self.gram.tobytes(), self.seen.tobytes()


@pytest.fixture(scope="module")
def library(builder) -> ctypes.CDLL:
    return ctypes.CDLL(str(builder.kernels("library", "sliding_window")))


def random_rows(dtype: str, layers: int, batch: int, steps: int, dim: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng([seed, layers, batch, dim])
    return [encode(random.standard_normal((batch, steps, dim)) * 10.0**-layer, dtype) for layer in range(layers)]


def with_strides(rows: np.ndarray, layout: str) -> np.ndarray:
    """The same (B, T, D) values, laid out in memory in another way."""
    batch, steps, dim = rows.shape
    if layout == "contiguous":
        return np.ascontiguousarray(rows)
    if layout == "unaligned":
        flat = np.zeros(rows.size + 1, rows.dtype)
        view = flat[1:].reshape(rows.shape)
    elif layout == "strided":
        view = np.zeros((batch, steps, 3 * dim), rows.dtype)[..., ::3]
    elif layout == "steps first":
        view = np.zeros((steps, batch, dim), rows.dtype).swapaxes(0, 1)
    else:
        view = np.zeros((dim, batch, steps), rows.dtype).transpose(1, 2, 0)
    view[...] = rows
    return view


# layers, batch, window, dim
SHAPES = [(1, 1, 1, 1), (1, 3, 3, 7), (3, 2, 3, 8), (2, 1, 32, 33), (3, 2, 9, 264), (1, 1, 5, 1040)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(library, monkeypatch, shape: tuple[int, ...], dtype: str, schedule: str) -> None:
    monkeypatch.setenv("EMU_SCHED", schedule)
    layers, batch, window, dim = shape
    windows = Windows(library, dtype, *shape)
    for call, steps in enumerate([1, 1, window - 1, window + 2]):  # part of the ring, all of it, once around and more
        windows.push_and_check(random_rows(dtype, layers, batch, steps, dim, call))
        used = min(windows.seen[0, ROWS], window)
        assert np.isnan(windows.gram[:, :, used:]).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_widest_window(library, dtype: str) -> None:
    Windows(library, dtype, 1, 1, 128, 5).push_and_check(random_rows(dtype, 1, 1, 130, 5))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES)
def test_masked_and_rejected_rows(library, monkeypatch, dtype: str, schedule: str) -> None:
    monkeypatch.setenv("EMU_SCHED", schedule)
    layers, batch, window, dim = 3, 3, 4, 20
    windows = Windows(library, dtype, layers, batch, window, dim)
    rows = random_rows(dtype, layers, batch, 12, dim)
    bad = [np.nan, np.inf, -np.inf] if dtype == "float16" else [np.nan, np.inf, -np.inf, 1e30, -3e38]
    for step, value in enumerate(bad, start=2):  # in one layer and one element only
        rows[step % layers][step % batch, step, (7 * step) % dim] = encode(np.array([value]), dtype)[0]
    mask = np.random.default_rng(1).random((12, batch)).T > 0.3
    mask[0, 2:4] = False, True
    windows.push_and_check(rows, mask)
    assert (windows.seen[:, REJECTED] > 0).any()
    assert (windows.seen[:, ROWS] + windows.seen[:, REJECTED] == mask.sum(1)).all()

    windows.push_and_check(rows, np.zeros((batch, 12), bool))
    assert (windows.seen[:, SLOT] == -1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_at_the_edge_of_float32(library, dtype: str) -> None:
    """No square overflows; their sum does, or nearly."""
    windows = Windows(library, dtype, 1, 2, 2, 64)
    near, beyond = np.full((1, 64), 2.25e18), np.full((1, 64), 2.5e18)
    windows.push_and_check([encode(np.stack([near, beyond]), dtype)])
    assert windows.seen[:, REJECTED].tolist() == [0, 1]
    assert np.isfinite(windows.gram[0, 0, 0, 0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", ["unaligned", "strided", "steps first", "dim first", "mixed"])
@pytest.mark.parametrize("dim", [24, 21])
def test_strides_do_not_change_a_bit(library, dtype: str, layout: str, dim: int) -> None:
    rows = random_rows(dtype, 3, 2, 5, dim)
    layouts = ["strided", "contiguous", "unaligned"] if layout == "mixed" else [layout] * 3
    plain, other = (Windows(library, dtype, 3, 2, 3, dim) for _ in range(2))
    plain.push_and_check(rows)
    other.push_and_check([with_strides(layer, name) for layer, name in zip(rows, layouts, strict=True)])
    assert plain.bits() == other.bits()


@pytest.mark.parametrize("bad_layer", [None, 0, LAYERS_PER_LAUNCH - 1, LAYERS_PER_LAUNCH, LAYERS_PER_LAUNCH + 1])
def test_more_layers_than_one_launch_takes(library, bad_layer: int | None) -> None:
    layers = LAYERS_PER_LAUNCH + 2
    random = np.random.default_rng(0)
    rows = [random.standard_normal((2, 3, 5)).astype(np.float32) for _ in range(layers)]
    if bad_layer is not None:
        rows[bad_layer][1, 1, 4] = np.nan
    windows = Windows(library, "float32", layers, 2, 2, 5)
    windows.push_and_check(rows, np.array([[True, True, False], [True, True, True]]))
    assert windows.seen[:, REJECTED].tolist() == [0, int(bad_layer is not None)]


@pytest.mark.parametrize("dtype", TYPES)
def test_bits_do_not_depend_on_schedule_contraction_or_company(builder, library, monkeypatch, dtype: str) -> None:
    rows = random_rows(dtype, 3, 2, 7, 264)
    windows = Windows(library, dtype, 3, 2, 5, 264)
    windows.push(rows)

    contracted = ctypes.CDLL(str(builder.kernels("library with contraction", "sliding_window")))
    for schedule, code in itertools.product(SCHEDULES, (library, contracted)):
        monkeypatch.setenv("EMU_SCHED", schedule)
        again = Windows(code, dtype, 3, 2, 5, 264)
        again.push_and_check(rows)
        assert again.bits() == windows.bits()

    alone = Windows(library, dtype, 1, 1, 5, 264)
    for step in range(7):
        alone.push([rows[2][1:, step : step + 1]])
    np.testing.assert_array_equal(alone.gram[0, 0], windows.gram[2, 1])


@pytest.mark.parametrize(("batch", "steps"), [(0, 2), (2, 0)])
def test_nothing_to_do(library, batch: int, steps: int) -> None:
    windows = Windows(library, "float32", 2, batch, 3, 4)
    windows.push_and_check(random_rows("float32", 2, batch, steps, 4))


def test_impossible_batch_is_an_error(library) -> None:
    impossible = WindowPush(batch=1 << 40, steps=1, layers=1, window=1, dim=1)
    assert library.rmtkernels_cuda_window_push(ctypes.byref(impossible), None) == INVALID_CONFIGURATION


def run(program: Path, workers: int) -> None:
    environment = os.environ | {"EMU_WORKERS": str(workers), "EMU_SCHED": "rand", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("blocks_in_flight", [1, 2])
def test_thread_sanitizer_is_silent(builder, blocks_in_flight: int) -> None:
    run(builder.driver("thread", "sliding_window"), blocks_in_flight)


def test_address_and_undefined_behaviour_sanitizers_are_silent(builder) -> None:
    run(builder.driver("memory", "sliding_window"), 1)


def test_wavefronts_of_64_lanes(builder) -> None:
    run(builder.driver("wavefronts of 64", "sliding_window"), 1)
