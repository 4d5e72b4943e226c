"""window_push_ and window_gram in the checked interpreter: against the oracle, skipped rows, layouts, planted bugs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from rmtkernels import DtypeError, ShapeError, window_gram, window_push_
from rmtkernels.reference.sliding_window import window_gram_ref, window_push_ref_
from rmtkernels.triton import sliding_window as shipped
from rmtkernels.triton import sliding_window_gram as shipped_gram
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


@contextmanager
def empty_memory_is_nan() -> Iterator[None]:
    """What PyTorch allocates and nobody writes is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_windows(hidden: Tensor, window: int, stride: int, mask: Tensor | None, module: ModuleType | None) -> None:
    """The operator's windows, or a module's, are the oracle's to the rounding of float32 products."""
    with empty_memory_is_nan():
        gram, seen = (
            window_gram(hidden, window, stride, mask, backend="triton")
            if module is None
            else module.window_gram(hidden, window, stride, mask)
        )
    want, want_seen = window_gram_ref(hidden, window, stride, mask, dtype=torch.float64)
    norms = want.diagonal(dim1=-2, dim2=-1).sqrt()
    assert torch.equal(seen, want_seen)
    assert ((gram - want).abs() <= 2.0**-22 * norms[..., None] * norms[..., None, :]).all()
    assert same_bits(gram, gram.mT)


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize(
    ("steps", "dim", "window", "stride", "dtype"),
    [(1, 1, 1, 1, FLOAT), (7, 5, 3, 2, BFLOAT), (40, 9, 35, 6, HALF), (3, 140, 128, 1, FLOAT)],
)
def test_windows_agree_with_the_oracle(
    steps: int, dim: int, window: int, stride: int, dtype: torch.dtype, layout: str
) -> None:
    hidden = rows_in_layout(layout, 2, steps, dim, seed=steps, dtype=dtype, scale=1.0)
    mask = None if steps % 2 else (normal(steps, 2, seed=3) > -0.5).T
    assert_windows(hidden, window, stride, mask, None)


def test_windows_skip_what_is_not_finite_and_what_is_masked() -> None:
    hidden = normal(3, 12, 10)
    hidden[0, 3, 7], hidden[0, 4, 0], hidden[1, :, 2], hidden[2, 11] = torch.nan, -torch.inf, 1e25, 1e19
    hidden[2, 0] = (3.4028234663852886e38 / 10) ** 0.5 * 0.999
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, 8:11] = mask[2, 5] = False
    assert_windows(hidden, 4, 3, mask, None)
    gram, seen = window_gram(hidden, 4, 3, mask, backend="triton")
    assert seen[1].tolist() == [0] * 4 and not gram[1].any()


def test_windows_move_rows_once_for_each_pair_of_tiles(counts: Counts) -> None:
    batch, steps, dim, window = 2, 96, 64, 33
    window_gram(normal(batch, steps, dim), window, 8, backend="triton")
    tiles, pairs, windows = steps // shipped_gram.TILE, 5, steps // 8
    band = sum(min(row + 1, window) for row in range(steps))
    used = sum(min(8 * (w + 1), window) ** 2 for w in range(windows))
    programs = windows * -(-window // shipped_gram.SLOTS)
    rows = steps * dim + 2 * pairs * shipped_gram.TILE * (dim + 2)
    assert tiles == 3 and counts.product_flops == batch * pairs * 2 * shipped_gram.TILE**2 * dim
    assert counts.stored == batch * (8 * steps + 4 * band + 4 * windows * window**2)
    assert counts.loaded == batch * (4 * rows + 8 * 2 * tiles + 8 * programs + 4 * used)


def test_windows_of_a_sequence_do_not_depend_on_the_others() -> None:
    hidden = normal(3, 9, 20, dtype=BFLOAT)
    together = window_gram(hidden, 4, 2, backend="triton")
    for b in range(3):
        assert all(
            map(same_bits, window_gram(hidden[b : b + 1], 4, 2, backend="triton"), (x[b : b + 1] for x in together))
        )
    assert window_gram(hidden[:0], 4, 2, backend="triton")[0].shape == (0, 4, 4, 4)
    assert window_gram(hidden[:, :1], 4, 2, backend="triton")[0].shape == (3, 0, 4, 4)


def test_window_gram_opcheck_and_typed_errors() -> None:
    operator = torch.ops.rmtkernels.window_gram_triton.default
    torch.library.opcheck(operator, (normal(2, 7, 9, dtype=BFLOAT), 4, 3, normal(2, 7) > 0))
    for error, change in (
        (ShapeError, {"window": 129}),
        (ShapeError, {"stride": 0}),
        (DtypeError, {"mask": torch.ones(2, 7)}),
    ):
        with pytest.raises(error):
            operator(**{"hidden": normal(2, 7, 9), "window": 4, **change})


ROW_MASK = "mask=(row < count)[:, None] & (i < dim)[None, :],"
GRAM_MUTANTS = {
    "columns past the row are multiplied": (ROW_MASK, "mask=(row < count)[:, None] & (i <= dim)[None, :],", "bounds"),
    "skipped rows are multiplied": ("data + row_step[:, None] *", "data + row[:, None] *", "values"),
    "a mask is not heard": ("offered & (tl.load(at, mask=inside, other=0).to(tl.int32) != 0)", "inside", "values"),
    "what is not finite is accepted": ("(offered & finite)", "offered", "values"),
    "the band is a column too wide": ("(lag < window))", "(lag <= window))", "place|race"),
    "both halves of a tile are stored": ("& (lag >= 0)", "", "place"),
    "tiles before are left out": ("triton.cdiv(window - 1, TILE) + 1", "1", "values"),
    "products in TF32": ('input_precision="ieee"', 'input_precision="tf32"', "values"),
    "slots are turned": ("(newest + window - i)", "(newest + window + 1 - i)", "values"),
    "slots not in use are read": ("inside & (row >= 0) & (column >= 0)", "inside", "bounds"),
    "another window's place": ("gram + (number * window + i)", "gram + i", "race"),
    "another window's rows": ("tl.load(seen + number)", "tl.load(seen)", "values"),
}  # fmt: skip


def test_the_shipped_windows_are_not_found_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_wrong_window(shipped_gram, monkeypatch) is None


def first_wrong_window(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What finds it, if windows of sequences with skipped rows are not the oracle's; in smaller tiles than shipped."""
    monkeypatch.setattr(module, "TILE", 16)
    hidden, mask = normal(2, 21, 33), normal(2, 21, seed=1) > -1
    hidden[1, 2, 3] = torch.inf
    mask[1, 2] = mask[1, -1] = True
    try:
        assert_windows(hidden, 7, 3, mask, module)
    except InterpreterError as error:
        return str(error)
    except AssertionError:
        return "values"
    return None


@pytest.mark.parametrize("name", chosen(GRAM_MUTANTS))
def test_a_broken_window_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, broken, finding = GRAM_MUTANTS[name]
    found = first_wrong_window(mutant(tmp_path, "sliding_window_gram", text, broken), monkeypatch)
    assert found is not None and any(word in found for word in finding.split("|")), found
