"""window_push_ in the checked interpreter: against the oracle, skipped rows, layouts, launches, planted bugs."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from rmtkernels import DtypeError, ShapeError, window_push_
from rmtkernels.reference.sliding_window import window_push_ref_
from rmtkernels.triton import sliding_window as shipped
from tests.helpers import LAYOUTS, State, empty_state, normal, rows_in_layout, same_bits, same_state
from tests.triton.checked import Counts
from tests.triton.mutants import chosen, mutant

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


def assert_same(got: State, want: State) -> None:
    """Ring and counters to the bit; Gram matrices to the rounding of float32 products, and NaN in unused slots."""
    assert same_bits(got.ring, want.ring) and same_bits(got.seen, want.seen)
    unused = want.gram.isnan()
    assert (got.gram.isnan() == unused).all()
    norms = want.gram.diagonal(dim1=-2, dim2=-1).nan_to_num().sqrt()
    bound = 2.0**-22 * norms[..., None] * norms[..., None, :]
    assert ((got.gram - want.gram).abs() <= bound).logical_or(unused).all()


def push_both(state: State, rows: list[Tensor], mask: Tensor | None = None) -> tuple[State, State]:
    got, want = state.copy(), state.copy()
    window_push_(*got, rows, mask, backend="triton")
    window_push_ref_(*want, rows, mask)
    return got, want


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF])
@pytest.mark.parametrize(("layers", "batch", "window", "dim"), [(1, 1, 1, 1), (3, 2, 5, 33), (2, 2, 4, 1500)])
def test_agrees_with_the_oracle(layers: int, batch: int, window: int, dim: int, dtype: torch.dtype) -> None:
    state = empty_state(layers, batch, window, dim, dtype)
    for step in range(window + 2):
        rows = [normal(batch, dim, seed=10 * step + layer, dtype=dtype) for layer in range(layers)]
        mask = None if step % 3 else normal(batch, seed=step) > -1
        state, want = push_both(state, rows, mask)
        assert_same(state, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_several_steps(layout: str) -> None:
    steps = 1 if layout == "flat" else 3
    rows = [rows_in_layout(layout, 2, steps, 20, layer, BFLOAT, 1.0) for layer in range(2)]
    wide_mask = normal(2, 2 * steps) > -0.5
    mask = wide_mask[:, ::2] if rows[0].dim() == 3 else wide_mask[:, 0]
    assert_same(*push_both(empty_state(2, 2, 3, 20, BFLOAT), rows, mask))


def test_a_row_that_is_not_finite_in_one_layer_is_skipped_in_all_and_counted() -> None:
    state = empty_state(3, 4, 3, 10)
    for step in range(3):
        rows = [normal(4, 10, seed=step + layer) for layer in range(3)]
        rows[1][1, 7], rows[2][2, 0], rows[0][3] = torch.nan, -torch.inf, 1e19
        state, want = push_both(state, rows)
        assert_same(state, want)
    assert state.seen[:, 1].tolist() == [0, 3, 3, 3]
    assert state.gram[:, 0].isfinite().all()


def test_a_norm_that_just_fits_float32_leaves_no_infinity() -> None:
    rows = [torch.full((1, 1025), (3.4028234663852886e38 / 1025) ** 0.5)]
    state, want = push_both(empty_state(1, 1, 2, 1025), rows)
    assert state.seen.tolist() == want.seen.tolist()
    assert not state.gram.isinf().any()


def test_layers_of_different_layouts_take_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also more layers than a launch holds; a layer that objects is heard whichever launch it is in."""
    monkeypatch.setattr(shipped, "MOST_LAYERS", 2)
    for bad in range(-1, 6):
        rows = [normal(2, 9, seed=layer) for layer in range(5)]
        rows[3] = rows[3].T.contiguous().T
        if 0 <= bad < 5:
            rows[bad][1, 3] = torch.nan
        assert_same(*push_both(empty_state(5, 2, 3, 9), rows))


def test_bits_do_not_depend_on_the_company() -> None:
    rows = [normal(3, 40, seed=layer) for layer in range(2)]
    together = empty_state(2, 3, 4, 40)
    window_push_(*together, rows, backend="triton")
    for b in range(3):
        alone = empty_state(2, 1, 4, 40)
        window_push_(*alone, [row[b : b + 1] for row in rows], backend="triton")
        assert same_state(alone, together.of_sequence(b))


def test_moves_each_byte_once(counts: Counts) -> None:
    """All rows once to be judged; then N - 1 ring rows, one row written, and the new row for each group of slots."""
    layers, batch, window, dim = 2, 2, 8, 64
    state, groups = empty_state(layers, batch, window, dim), window // shipped.PUSH_SLOTS
    for step in range(window + 1):
        before = counts.loaded, counts.stored
        window_push_(*state, [normal(batch, dim, seed=step)] * layers, backend="triton")
    streams = layers * batch
    counters = 8 * (2 * batch + 2 * streams * groups)
    assert counts.loaded - before[0] == counters + 4 * dim * (streams * (window - 1) + streams * groups + streams)
    assert counts.stored - before[1] == 8 * 3 * batch + 4 * streams * (dim + 2 * window)


def test_typed_errors_come_before_any_change() -> None:
    state = empty_state(2, 2, 3, 9)
    rows, want = [normal(2, 9)] * 2, state.copy()
    with pytest.raises(ShapeError):
        window_push_(*state, rows[:1], backend="triton")
    with pytest.raises(DtypeError):
        window_push_(*state, [row.double() for row in rows], backend="triton")
    with pytest.raises(ShapeError, match="mask"):
        window_push_(*state, rows, torch.ones(3, dtype=torch.bool), backend="triton")
    assert same_state(state, want)


def test_opcheck() -> None:
    arguments = (
        *empty_state(2, 2, 3, 9, BFLOAT),
        [normal(2, 2, 9, dtype=BFLOAT)] * 2,
        torch.ones(2, 2, dtype=torch.bool),
    )
    torch.library.opcheck(torch.ops.rmtkernels.window_push_triton_.default, arguments)


def first_wrong_push(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What finds it, if pushes of three layers in two launches each leave another state than the oracle's."""
    monkeypatch.setattr(module, "MOST_LAYERS", 2)
    state = empty_state(3, 2, 5, 33)
    want = state.copy()
    for step in range(7):
        rows = [normal(2, 33, seed=10 * step + layer) for layer in range(3)]
        if step == 2:
            rows[1][0, 3] = torch.nan
        if step == 3:
            rows[0][0, 3] = rows[2][0, 3] = torch.nan
        window_push_ref_(*want, rows, None)
        try:
            module.window_push_(*state, rows, None)
            assert_same(state, want)
        except InterpreterError as error:
            return str(error)
        except AssertionError:
            return "values"
    return None


DATA = "data += row_offset + sequence * row_batch\n\n"
# (text as shipped, text broken, what finds it: a check of the interpreter, or the oracle)
MUTANTS = {
    "columns past the row are loaded": ("row_column, mask=i < dim,", "row_column, mask=i <= dim,", "bounds"),
    "columns past the row are stored": ("mask=i < written", "mask=i < written + 1", "race|bounds"),
    "every program writes the row": ("mask=i < written", "mask=i < dim", "race"),
    "the old row is multiplied": ("tl.where(own, wide, old)", "old", "values"),
    "slots that are not in use are read": ("(j < used)[:, None] & ~own", "~own", "race|bounds"),
    "Gram entries of unused slots": ("window + j, dots, mask=j < used", "window + j, dots", "values|race"),
    "the Gram matrix is not symmetric": ("entries + j * window + slot", "entries + slot * window + j", "values"),
    "another sequence's row": (DATA, "data += row_offset\n\n", "values"),
    "a layer has no say": ("(layer < LAYERS)[:, None]", "(layer < LAYERS - 1)[:, None]", "values"),
    "another layer's row": ("tl.where(layer == other, rows[other], data)\n    " + DATA, "data\n    " + DATA, "values"),
    "a row refused before is judged again": ("width = tl.where(offered, dim, 0)", "width = dim", "values"),
    "all launches count the row": ("    if LAST:\n", "    if LAYERS > 0:\n", "values"),
}  # fmt: skip


def test_the_shipped_kernel_is_not_found_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_wrong_push(shipped, monkeypatch) is None


@pytest.mark.parametrize("name", chosen(MUTANTS))
def test_a_broken_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, broken, finding = MUTANTS[name]
    found = first_wrong_push(mutant(tmp_path, "sliding_window", text, broken), monkeypatch)
    assert found is not None and any(word in found for word in finding.split("|")), found
