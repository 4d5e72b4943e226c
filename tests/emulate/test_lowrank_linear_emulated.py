"""The shipped CUDA kernels of lowrank_linear, run on the CPU, against float64 NumPy."""

import ctypes
import itertools
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

TYPES = ["float32", "bfloat16", "float16"]
PAIRS = [
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
]
SCHEDULES = ["rr", "rev", "rand"]
ROUNDING = {"float32": 0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9
MARGIN = 3  # elements before and after a result, which nothing may touch


class Layer(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "down", "up", "bias", "out", "hidden")],
        *[(name, ctypes.c_int64) for name in ("rows", "d_in", "k", "d_out")],
        *[(name, ctypes.c_int32) for name in ("type", "weight_type")],
    ]


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds to `dtype`; bfloat16, which NumPy lacks, as the upper halves of float32 (to nearest even)."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return np.ascontiguousarray(values, dtype)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    values = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored
    return values.astype(np.float64)


def shifted(values: np.ndarray, elements: int) -> np.ndarray:
    """The same values, `elements` past an address that is a multiple of 64."""
    memory = np.zeros(values.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 64 + elements * values.itemsize
    view = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    view[...] = values
    return view


@dataclass
class Problem:
    """Arguments as stored, and the types of x and of the weights."""

    x: np.ndarray
    down: np.ndarray
    up: np.ndarray
    bias: np.ndarray | None
    types: tuple[str, str]

    def call(self, library: ctypes.CDLL, shift: tuple[int, ...] = (0,) * 6) -> tuple[int, np.ndarray]:
        """The error, and the result as stored; `shift` moves x, down, up, bias, the result and the scratch memory."""
        (rows, d_in), (d_out, k) = self.x.shape, self.up.shape
        stored = [None if t is None else shifted(t, s) for t, s in zip(self.tensors(), shift, strict=False)]
        memory = shifted(encode(np.full(rows * d_out + 2 * MARGIN, np.nan), self.types[0]), shift[4] - MARGIN + 32)
        hidden = shifted(np.full((rows, k), np.nan, np.float32), shift[5])
        out = memory[MARGIN : MARGIN + rows * d_out]
        untouched = memory.copy()
        layer = Layer(
            *[None if t is None else t.ctypes.data for t in stored], out.ctypes.data, hidden.ctypes.data,
            rows, d_in, k, d_out, *map(TYPES.index, self.types),
        )  # fmt: skip
        error = library.rmtkernels_cuda_lowrank_linear(ctypes.byref(layer), None)
        for edge in (slice(MARGIN), slice(memory.size - MARGIN, None)):
            assert memory[edge].tobytes() == untouched[edge].tobytes(), "wrote beyond the result"
        return error, out.reshape(rows, d_out)

    def tensors(self) -> tuple[np.ndarray | None, ...]:
        return self.x, self.down, self.up, self.bias

    def bits(self, library: ctypes.CDLL, **options: Any) -> bytes:
        error, out = self.call(library, **options)
        assert error == 0
        return out.tobytes()

    def check(self, library: ctypes.CDLL, **options: Any) -> None:
        """Within the bound of its own summation (Higham, gamma_n), and of one rounding to x's type."""
        error, out = self.call(library, **options)
        assert error == 0
        x, down, up = (decode(t, self.types[i > 0]) for i, t in enumerate((self.x, self.down, self.up)))
        bias = np.zeros(len(up)) if self.bias is None else decode(self.bias, self.types[1])
        exact = x @ down.T @ up.T + bias
        size = np.abs(x) @ np.abs(down).T @ np.abs(up).T + np.abs(bias)
        bound = (sum(self.up.shape[1:] + self.x.shape[1:]) / 8 + 40) * 2.0**-24 * size
        bound += ROUNDING[self.types[0]] * (np.abs(exact) + bound)
        bound += 2.0**-25 * (self.types[0] == "float16")  # its subnormal numbers lie 2^-24 apart
        assert (np.abs(decode(out, self.types[0]) - exact) <= bound).all()


def problem(
    rows: int, d_in: int, k: int, d_out: int, types: tuple[str, str] = ("float32", "float32"), bias: bool = True
) -> Problem:
    random = np.random.default_rng([rows, d_in, k, d_out])

    def draw(dtype: str, *shape: int) -> np.ndarray:
        return encode(random.standard_normal(shape), dtype)

    x, down, up = draw(types[0], rows, d_in), draw(types[1], k, d_in), draw(types[1], d_out, k)
    return Problem(x, down, up, draw(types[1], d_out) if bias else None, types)


@pytest.fixture(scope="module")
def library(builder) -> ctypes.CDLL:
    return ctypes.CDLL(str(builder.kernels("library", "lowrank_linear")))


# rows, d_in, k, d_out. A sum is shared by 8 lanes, a warp or a block, by width; both products have each.
SHAPES = [
    (1, 1, 1, 1), (1, 64, 64, 70), (2, 7, 3, 5), (3, 33, 70, 9), (4, 300, 41, 33), (5, 600, 136, 11), (8, 264, 648, 3),
    (9, 259, 65, 3), (16, 520, 24, 37), (17, 40, 9, 5), (35, 16, 8, 3), (2, 0, 3, 4), (3, 5, 0, 4), (1, 0, 0, 2),
]  # fmt: skip


@pytest.mark.parametrize("types", PAIRS, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_under_every_schedule(library, monkeypatch, shape: tuple[int, ...], types) -> None:
    case = problem(*shape, types, bias=shape[0] != 9)
    results = set()
    for schedule in SCHEDULES:
        monkeypatch.setenv("EMU_SCHED", schedule)
        case.check(library)
        results.add(case.bits(library))
    assert len(results) == 1


@pytest.mark.parametrize("types", PAIRS, ids="-".join)
def test_a_row_has_the_same_bits_in_any_batch(library, types) -> None:
    for d_in, k, d_out in ((72, 24, 19), (45, 13, 6), (528, 8, 3)):
        whole = problem(20, d_in, k, d_out, types)
        want = whole.call(library)[1]
        for rows in range(1, 18):
            part = Problem(whole.x[:rows], *whole.tensors()[1:], types)
            part.check(library)
            assert part.bits(library) == want[:rows].tobytes()


@pytest.mark.parametrize("types", PAIRS, ids="-".join)
@pytest.mark.parametrize("moved", [*range(6), None])
def test_addresses_do_not_change_a_bit(library, moved: int | None, types) -> None:
    for shape in ((3, 80, 24, 9), (2, 536, 40, 6)):
        case = problem(*shape, types)
        shift = (1,) * 6 if moved is None else tuple(int(moved == i) for i in range(6))
        assert case.bits(library, shift=shift) == case.bits(library)


@pytest.mark.parametrize("types", PAIRS, ids="-".join)
def test_contraction_does_not_change_a_bit(builder, library, types) -> None:
    contracted = ctypes.CDLL(str(builder.kernels("library with contraction", "lowrank_linear")))
    for shape in ((1, 72, 24, 19), (5, 600, 137, 11), (16, 264, 33, 9)):
        case = problem(*shape, types)
        case.check(contracted)
        assert case.bits(contracted) == case.bits(library)


@pytest.mark.parametrize("types", PAIRS, ids="-".join)
@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_goes_where_it_belongs(library, bad: float, where: int, types) -> None:
    case = problem(5, 41, 24, 24, types)
    tensor = case.tensors()[where]
    tensor.flat[tensor.size // 2] = encode(np.array([bad]), types[where > 0])[0]
    error, out = case.call(library)
    with np.errstate(invalid="ignore"):
        hidden = decode(case.x, types[0]) @ decode(case.down, types[1]).T
        exact = hidden @ decode(case.up, types[1]).T + decode(case.bias, types[1])
    assert error == 0
    np.testing.assert_array_equal(np.isfinite(decode(out, types[0])), np.isfinite(exact))
    np.testing.assert_array_equal(np.isnan(decode(out, types[0])), np.isnan(exact))


def test_results_round_to_nearest_even(library) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 20000, np.uint32)
    special = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 1, 0], np.uint32)
    up = np.concatenate([bits, special, special | 0x80000000]).view(np.float32)[:, None]
    one = encode(np.ones((1, 1)), "bfloat16")
    error, out = Problem(one, np.ones((1, 1), np.float32), up, None, ("bfloat16", "float32")).call(library)
    got, want = decode(out[0], "bfloat16"), decode(encode(up[:, 0], "bfloat16"), "bfloat16")
    assert error == 0
    np.testing.assert_array_equal(got, want)

    up = random.integers(0, 2**16, (20000, 2), np.uint16).view(np.float16)
    case = Problem(np.ones((1, 1), np.float16), np.ones((2, 1), np.float16), up, None, ("float16", "float16"))
    with np.errstate(invalid="ignore", over="ignore"):
        want = up.astype(np.float32).sum(1).astype(np.float16)
    np.testing.assert_array_equal(case.call(library)[1][0], want)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (3, 4, 2, 0)])
def test_nothing_to_do(library, shape: tuple[int, ...]) -> None:
    assert problem(*shape).call(library)[0] == 0


def test_what_cannot_be_launched_is_an_error(library) -> None:
    layer = Layer(rows=1, d_in=0, k=1 << 42, d_out=1)
    assert library.rmtkernels_cuda_lowrank_linear(ctypes.byref(layer), None) == INVALID_CONFIGURATION
    for types in ((2, 0), (0, 2), (2, 1)):
        mixed = Layer(rows=1, d_in=1, k=1, d_out=1, type=types[0], weight_type=types[1])
        assert library.rmtkernels_cuda_lowrank_linear(ctypes.byref(mixed), None) == INVALID_VALUE


@pytest.mark.skipif("RMTKERNELS_PROVE" not in os.environ, reason="RMTKERNELS_PROVE=1 runs every number of rows")
@pytest.mark.parametrize("types", PAIRS, ids="-".join)
@pytest.mark.parametrize("rows", range(1, 17))
def test_every_number_of_rows(library, monkeypatch, rows: int, types) -> None:
    for d_in, k, d_out in itertools.product((1, 31, 64, 520), (1, 8, 67, 520), (1, 33)):
        case = problem(rows, d_in, k, d_out, types, bias=d_out == 1)
        monkeypatch.setenv("EMU_SCHED", SCHEDULES[(rows + k) % 3])
        case.check(library)
