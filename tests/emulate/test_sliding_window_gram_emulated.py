"""The shipped CUDA kernels of window_gram, run on the CPU, against the float64 oracle and window_push_."""

import ctypes
import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from rmtkernels.reference import window_gram_ref
from tests.helpers import LAYOUTS, normal, rows_in_layout, same_bits

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
TYPES = [FLOAT, BFLOAT, HALF]  # in the order of RowType
SCHEDULES = ["rr", "rev", "rand"]
INVALID_CONFIGURATION = 9
MARGIN = 64  # bytes behind the workspace, which nothing may touch


class WindowGram(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("data", "mask")],
        *[(f"{name}_stride", ctypes.c_int64) for name in ("batch", "step", "dim", "mask_batch", "mask_step")],
        *[(name, ctypes.c_int64) for name in ("batch", "steps", "dim", "window")],
        *[(name, ctypes.c_void_p) for name in ("gram", "seen", "workspace")],
        ("stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


def loaded(path: Any) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.rmtkernels_cuda_window_gram_workspace.argtypes = [ctypes.c_int64] * 4
    library.rmtkernels_cuda_window_gram_workspace.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def library(builder) -> ctypes.CDLL:
    return loaded(builder.kernels("library", "sliding_window"))


def window_gram(
    library: ctypes.CDLL, hidden: Tensor, window: int, stride: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By the emulated kernels; what they write is full of NaN before."""
    batch, steps, dim = hidden.shape
    gram = torch.full((batch, steps // stride, window, window), torch.nan)
    seen = torch.full((batch, steps // stride), -7)
    size = library.rmtkernels_cuda_window_gram_workspace(batch, steps, dim, window)
    memory = torch.full((size + 16 + MARGIN,), 0xFF, dtype=torch.uint8)  # NaN, wherever it is read as a number
    shift = -memory.data_ptr() % 16
    arguments = WindowGram(
        hidden.data_ptr(), None if mask is None else mask.data_ptr(), *hidden.stride(),
        *((0, 0) if mask is None else mask.stride()), *hidden.shape, window,
        gram.data_ptr(), seen.data_ptr(), memory.data_ptr() + shift, stride, TYPES.index(hidden.dtype),
    )  # fmt: skip
    assert library.rmtkernels_cuda_window_gram(ctypes.byref(arguments), None) == 0
    assert (memory[:shift] == 0xFF).all() and (memory[shift + size :] == 0xFF).all(), "wrote beyond the workspace"
    return gram, seen


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(map(same_bits, a, b))


def assert_near(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Entries within rounding of the norms of their rows."""
    assert torch.equal(got[1], want[1])
    size = want[0].diagonal(dim1=-2, dim2=-1).sqrt()
    error = (got[0].double() - want[0]).abs() - 5e-7 * size[..., :, None] * size[..., None, :]
    assert error.numel() == 0 or error.max() <= 1e-30
    assert same_bits(got[0], got[0].mT)


def oracle(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return window_gram_ref(hidden, *arguments, dtype=torch.float64)


def rows_and_mask(batch: int, steps: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows far from zero, of which some are masked and some are not finite."""
    hidden = (normal(batch, steps, dim) + 0.5).to(dtype)
    hidden[:, 2::9, dim // 2] = torch.nan
    hidden[-1:, 4::11, 0] = -torch.inf
    return hidden, (normal(steps, batch, seed=1) > -1.2).T


# batch, steps, dim, window, stride
SHAPES = [
    (1, 1, 1, 1, 1), (2, 5, 7, 2, 1), (2, 67, 19, 31, 3), (1, 70, 67, 32, 1), (2, 66, 33, 33, 5), (1, 135, 40, 64, 7),
    (1, 150, 24, 128, 30), (2, 20, 9, 128, 4), (1, 200, 8, 1, 9), (1, 40, 1045, 5, 2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle_under_every_schedule(library, monkeypatch, shape: tuple[int, ...], dtype) -> None:
    *sizes, window, stride = shape
    hidden, mask = rows_and_mask(*sizes, dtype)
    results = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("EMU_SCHED", schedule)
        results.append(window_gram(library, hidden, window, stride, mask))
    assert_near(results[0], oracle(hidden, window, stride, mask))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_contraction_changes_no_bit(builder, library, dtype: torch.dtype) -> None:
    contracted = loaded(builder.kernels("library with contraction", "sliding_window"))
    for window in (5, 40, 70):
        hidden, mask = rows_and_mask(1, 75, 37, dtype)
        assert same(window_gram(contracted, hidden, window, 3, mask), window_gram(library, hidden, window, 3, mask))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("steps", "dim", "window"), [(131, 35, 32), (131, 35, 64), (200, 9, 128), (66, 1030, 3)])
def test_integers_are_exact_in_every_entry(library, steps: int, dim: int, window: int, dtype: torch.dtype) -> None:
    """Every product and sum is a small integer: an entry is right to the bit or wrong."""
    hidden = torch.randint(-5, 6, (1, steps, dim), generator=torch.Generator().manual_seed(dim)).to(dtype)
    gram, seen = window_gram(library, hidden, window, 13)
    want = oracle(hidden, window, 13)
    assert torch.equal(gram.double(), want[0]) and torch.equal(seen, want[1])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS[:-1], "unaligned"])
@pytest.mark.parametrize("dim", [24, 21])
def test_strides_do_not_change_a_bit(library, dtype: torch.dtype, layout: str, dim: int) -> None:
    if layout == "unaligned":
        hidden = normal(1 + 2 * 9 * dim, dtype=dtype)[1:].view(2, 9, dim)
    else:
        hidden = rows_in_layout(layout, 2, 9, dim, 3, dtype, 1.0)
    mask = (normal(9, 4, seed=2) > -1)[:, ::2].T
    assert same(window_gram(library, hidden, 4, 2, mask), window_gram(library, hidden.clone(), 4, 2, mask.contiguous()))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_that_are_skipped_leave_the_bits_of_rows_that_never_came(library, dtype: torch.dtype) -> None:
    hidden, keep = normal(1, 150, 20, dtype=dtype), normal(1, 150, seed=3) > 0
    want = window_gram(library, hidden[keep][None], 40)
    hidden[~keep] = torch.nan
    for mask in (keep, None):
        gram, seen = window_gram(library, hidden, 40, 1, mask)
        assert same((gram[keep][None], seen[keep][None]), want)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_product_has_the_same_bits_in_any_window_place_and_company(library, dtype: torch.dtype) -> None:
    """Equal rows have equal products, so what is constant has no spread; the batch does not matter either."""
    one = normal(1, 1, 70, dtype=dtype)
    gram, _ = window_gram(library, one.expand(1, 140, 70), 33, 140)
    assert (gram == gram[0, 0, 0, 0]).all()
    hidden = normal(3, 80, 70, dtype=dtype)
    gram, _ = window_gram(library, hidden, 8, 80)
    for first in (0, 3, 61):  # in other tiles, at other places of a tile
        padded = torch.cat([normal(1, first, 70, seed=5, dtype=dtype), hidden[1:2, -8:]], 1)
        alone, _ = window_gram(library, padded, 8, 8 + first)
        turned = alone[0, 0].roll((-first % 8, -first % 8), (0, 1))
        assert same_bits(turned, gram[1, 0])


def pushed(library: ctypes.CDLL, hidden: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Gram matrices and counters after the last row, by the emulated kernels of window_push_."""

    class Rows(ctypes.Structure):
        _fields_ = [("data", ctypes.c_void_p), *[(name, ctypes.c_int64) for name in ("batch", "step", "dim")]]

    class Push(ctypes.Structure):
        _fields_ = [
            *[(name, ctypes.c_void_p) for name in ("ring", "gram", "seen", "rows", "mask")],
            *[(name, ctypes.c_int64) for name in ("mb", "ms", "layers", "batch", "steps", "window", "dim")],
            ("type", ctypes.c_int32),
        ]

    batch, steps, dim = hidden.shape
    ring, gram = hidden.new_zeros(batch, window, dim), torch.zeros(batch, window, window)
    seen, rows = torch.zeros(batch, 3, dtype=torch.int64), Rows(hidden.data_ptr(), *hidden.stride())
    arguments = Push(
        *(t.data_ptr() for t in (ring, gram, seen)), ctypes.addressof(rows), None,
        0, 0, 1, batch, steps, window, dim, TYPES.index(hidden.dtype),
    )  # fmt: skip
    assert library.rmtkernels_cuda_window_push(ctypes.byref(arguments), None) == 0
    return gram, seen[:, 0]


@pytest.mark.parametrize("dim", [50, 523])
def test_takes_the_rows_that_window_push_takes(library, dim: int) -> None:
    """Also where a norm just fits float32. What was taken has finite entries, in whatever order they are summed."""
    size = torch.finfo(FLOAT).max ** 0.5
    scale = size / dim**0.5 * (1 + 2e-8 * torch.arange(-40, 40, dtype=torch.float64))
    hidden = scale[None, :, None].expand(1, 80, dim).float()
    gram, seen = window_gram(library, hidden, 80, 80)
    want_gram, want_seen = pushed(library, hidden, 80)
    assert 0 < seen[0, 0] < 80 and torch.equal(seen[:, 0], want_seen)
    assert gram.isfinite().all()
    assert ((gram[0, 0].double() - want_gram[0]).abs() <= 1e-6 * size * size).all()


def last_two(values: Tensor, mask: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Windows of two rows of one element (B = 1), without the oracle's loop over rows."""
    seen = mask.cumsum(1)[:, stride - 1 :: stride]
    places = torch.stack([seen[0] - 2 + seen[0] % 2, seen[0] - 1 - seen[0] % 2], -1)  # of the slots 0 and 1
    rows = values[0, mask[0], 0][places]
    return (rows[:, :, None] * rows[:, None, :])[None], seen


def test_a_list_of_several_steps_is_in_order(library) -> None:
    hidden = torch.arange(5000.0).remainder(199)[None, :, None]
    mask = (normal(1, 5000) > -0.3) & (torch.arange(5000) % 1000 > 7)
    assert same(window_gram(library, hidden, 2, 100, mask), last_two(hidden, mask, 100))


def test_a_sequence_without_a_row_has_windows_of_zeros(library) -> None:
    hidden = normal(2, 6, 9, dtype=BFLOAT)
    hidden[1] = torch.nan
    gram, seen = window_gram(library, hidden, 3, 2, torch.tensor([[False], [True]]).expand(2, 6))
    assert (gram == 0).all() and (seen == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 2, 4), (2, 0, 4)])
def test_nothing_to_do(library, shape: tuple[int, ...]) -> None:
    gram, seen = window_gram(library, torch.zeros(shape), 3, 3)
    assert gram.numel() == seen.numel() == 0


def test_rows_without_elements(library) -> None:
    gram, seen = window_gram(library, torch.zeros(2, 5, 0), 3, 2)
    assert (gram == 0).all() and seen.tolist() == [[2, 4]] * 2


@pytest.mark.parametrize("sizes", [{"batch": 1 << 32}, {"steps": 1 << 45}, {"dim": 1 << 40}], ids=str)
def test_impossible_sizes_are_errors(library, sizes: dict[str, int]) -> None:
    """Found before anything is read: there is no memory."""
    impossible = WindowGram(**{"batch": 1, "steps": 1, "dim": 1, "window": 1, "stride": 1, **sizes})
    assert library.rmtkernels_cuda_window_gram(ctypes.byref(impossible), None) == INVALID_CONFIGURATION


@pytest.mark.skipif("RMTKERNELS_PROVE" not in os.environ, reason="RMTKERNELS_PROVE=1 runs every edge of every tile")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128])
def test_every_edge(library, window: int, dtype: torch.dtype) -> None:
    for steps, dim in itertools.product((1, 63, 64, 65, 129, 193), (7, 33)):
        hidden = normal(1, steps, dim, seed=steps, dtype=dtype)
        stride = max(1, steps // 9)
        assert_near(window_gram(library, hidden, window, stride), oracle(hidden, window, stride))
    hidden = normal(1, 5, 1100, dtype=dtype)
    for dim in (511, 512, 513, 528, 1024, 1025):
        assert_near(window_gram(library, hidden[..., :dim], window), oracle(hidden[..., :dim], window))
