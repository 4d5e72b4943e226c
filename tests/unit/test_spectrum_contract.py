"""spectrum_descriptors as an operator: bits, buffers, bad input, typed errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import rmtkernels
from rmtkernels import DESCRIPTORS, DeviceError, DtypeError, ShapeError, spectrum_descriptors, spectrum_descriptors_
from rmtkernels.laws import marchenko_pastur_edges, marchenko_pastur_median
from rmtkernels.ops.law_table import law_table, law_table_size
from tests.helpers import gram_of, normal, same_bits

pytestmark = pytest.mark.usefixtures("isa", "nan_memory")

F = len(DESCRIPTORS)


@pytest.mark.parametrize("joint", [None, "none", "trace"])
def test_windows_of_one_batch_give_the_same_bits_alone(joint: str | None) -> None:
    gram, _ = gram_of(normal(2, 23, 16, 40))
    seen = torch.tensor([16, 3, 0, 1, 16, 16, 2, 15, 99, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 5, 5, 5, 5])
    together = spectrum_descriptors(gram, seen, 40, joint=joint)
    for b in range(23):
        alone = spectrum_descriptors(gram[:, b : b + 1], seen[b : b + 1], 40, joint=joint)
        assert all(same_bits(one, many[:, b : b + 1]) for one, many in zip(alone, together, strict=True))
    if joint is None:
        for layer in range(2):
            alone = spectrum_descriptors(gram[layer : layer + 1], seen, 40)
            assert all(same_bits(one, many[layer : layer + 1]) for one, many in zip(alone, together, strict=True))


def test_a_partly_filled_window_gives_the_bits_of_a_full_one_of_that_size() -> None:
    gram, _ = gram_of(normal(1, 1, 20, 40))
    for rows in range(21):
        padded = spectrum_descriptors(gram, torch.tensor([rows]), 40)
        if rows:
            tight = spectrum_descriptors(gram[..., :rows, :rows], torch.tensor([rows]), 40)
            assert same_bits(padded[0], tight[0])
            assert same_bits(padded[1][..., :rows], tight[1])
        assert (padded[1][..., rows:] == 0).all()


def test_threads_and_repetition_do_not_change_a_bit(set_threads: Callable[[int], None]) -> None:
    gram, seen = gram_of(normal(4, 33, 32, 64))
    seen[::3] = 17
    results = []
    for threads in (1, 2, 2, 3):
        set_threads(threads)
        results.append(spectrum_descriptors(gram, seen, 64))
    for values, eigenvalues in results[1:]:
        assert same_bits(values, results[0][0])
        assert same_bits(eigenvalues, results[0][1])


def test_eigenvalues_descend_and_are_never_negative() -> None:
    gram, seen = gram_of(normal(2, 9, 24, 5))  # rank 5: the other eigenvalues are rounding of either sign
    for center in (False, True):
        eigenvalues = spectrum_descriptors(gram, seen, 5, center=center)[1]
        assert (eigenvalues >= 0).all()
        assert (eigenvalues.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("joint", [None, "none", "trace"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (5, 2)])
def test_a_bad_gram_matrix_spoils_its_own_window_alone(
    joint: str | None, center: bool, bad: float, place: tuple[int, int]
) -> None:
    clean, seen = gram_of(normal(3, 10, 6, 9))
    want = spectrum_descriptors(clean, seen, 9, center=center, joint=joint)
    gram = clean.clone()
    i, j = place
    gram[1, 4, i, j] = gram[1, 4, j, i] = bad
    values, eigenvalues = spectrum_descriptors(gram, seen, 9, center=center, joint=joint)
    layer = 1 if joint is None else 0
    assert values[layer, 4].isnan().all()
    assert eigenvalues[layer, 4, : 6 - center].isnan().all()
    values[layer, 4], eigenvalues[layer, 4] = want[0][layer, 4], want[1][layer, 4]
    assert same_bits(values, want[0])
    assert same_bits(eigenvalues, want[1])


def test_out_buffers_may_be_strided_and_nothing_else_is_written() -> None:
    gram, seen = gram_of(normal(2, 3, 6, 9))
    want = spectrum_descriptors(gram, seen, 9)
    history = torch.full((3, 5, 2, F + 4), torch.nan)  # (B, time, L, ...), as a monitor keeps it
    spectra = torch.full((3, 5, 2, 8), torch.nan)
    spectrum_descriptors_(
        history[:, 2, :, 1 : F + 1].transpose(0, 1), spectra[:, 2, :, :6].transpose(0, 1), gram, seen, 9
    )
    assert same_bits(history[:, 2, :, 1 : F + 1].transpose(0, 1), want[0])
    assert same_bits(spectra[:, 2, :, :6].transpose(0, 1), want[1])
    assert (~history.isnan()).sum() == want[0].numel()
    assert (~spectra.isnan()).sum() == want[1].numel()


def test_seen_may_be_a_column_and_gram_a_view() -> None:
    gram, seen = gram_of(normal(2, 3, 6, 9))
    want = spectrum_descriptors(gram, seen, 9)
    column = torch.stack([seen, -seen, seen * 0], 1)[:, 0]
    padded = torch.full((2, 3, 6, 12), torch.nan)
    padded[..., ::2] = gram
    got = spectrum_descriptors(padded[..., ::2], column, 9)
    assert all(map(same_bits, got, want))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("layers", "batch", "joint"), [(0, 3, None), (2, 0, None), (2, 0, "none"), (2, 0, "trace")])
def test_no_windows(backend: str, layers: int, batch: int, joint: str | None) -> None:
    gram, seen = torch.zeros(layers, batch, 4, 4), torch.zeros(batch, dtype=torch.int64)
    values, eigenvalues = spectrum_descriptors(gram, seen, 5, joint=joint, backend=backend)
    assert values.shape == (1 if joint else layers, batch, F)
    assert eigenvalues.shape == (1 if joint else layers, batch, 4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_results_carry_no_gradient_and_inputs_are_left(backend: str) -> None:
    gram, seen = gram_of(normal(1, 2, 6, 9))
    before = gram.clone()
    results = spectrum_descriptors(gram.requires_grad_(), seen, 9, backend=backend)
    assert not any(result.requires_grad for result in results)
    assert same_bits(gram.detach(), before)
    assert seen.tolist() == [6, 6]


def good() -> dict[str, Any]:
    gram, seen = gram_of(normal(2, 3, 6, 9))
    return {
        "descriptors": torch.full((2, 3, F), torch.nan),
        "eigenvalues": torch.full((2, 3, 6), torch.nan),
        "gram": gram,
        "seen": seen,
        "dim": 9,
    }


MISTAKES: list[tuple[type[Exception], dict[str, Any]]] = [
    (ShapeError, {"gram": torch.zeros(3, 6, 6)}),
    (ShapeError, {"gram": torch.zeros(2, 3, 6, 5)}),
    (ShapeError, {"gram": torch.zeros(2, 3, 0, 0)}),
    (ShapeError, {"gram": torch.zeros(2, 3, 129, 129)}),
    (DtypeError, {"gram": torch.zeros(2, 3, 6, 6, dtype=torch.float64)}),
    (ShapeError, {"seen": torch.zeros(2, dtype=torch.int64)}),
    (ShapeError, {"seen": torch.zeros(3, 3, dtype=torch.int64)}),
    (DtypeError, {"seen": torch.zeros(3, dtype=torch.int32)}),
    (DeviceError, {"seen": torch.zeros(3, dtype=torch.int64, device="meta")}),
    (ShapeError, {"dim": 0}),
    (ShapeError, {"dim": -4}),
    (ShapeError, {"joint": "sum"}),
    (ShapeError, {"joint": "none", "gram": torch.zeros(0, 3, 6, 6)}),
    (ShapeError, {"joint": "trace"}),
    (ShapeError, {"normalize": "l2"}),
    (ShapeError, {"noise": "quantile"}),
    (ShapeError, {"descriptors": torch.zeros(2, 3, F + 1)}),
    (ShapeError, {"descriptors": torch.zeros(2, F, 3).mT}),
    (DtypeError, {"descriptors": torch.zeros(2, 3, F, dtype=torch.float64)}),
    (DeviceError, {"descriptors": torch.zeros(2, 3, F, device="meta")}),
    (ShapeError, {"eigenvalues": torch.zeros(1, 3, 6)}),
    (DtypeError, {"eigenvalues": torch.zeros(2, 3, 6, dtype=torch.float16)}),
    (DeviceError, {"eigenvalues": torch.zeros(2, 3, 6, device="meta")}),
]


@pytest.mark.parametrize(("error", "changes"), MISTAKES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_mistakes_are_named_and_nothing_is_written(
    error: type[Exception], changes: dict[str, Any], backend: str | None
) -> None:
    arguments = good()
    with pytest.raises(error):
        spectrum_descriptors_(**{**arguments, **changes}, backend=backend)
    assert arguments["descriptors"].isnan().all()
    assert arguments["eigenvalues"].isnan().all()


def test_a_gram_matrix_that_is_not_contiguous_is_refused_by_the_out_variant() -> None:
    arguments = good()
    arguments["gram"] = torch.zeros(2, 3, 6, 12)[..., ::2]
    with pytest.raises((ShapeError, RuntimeError)):
        spectrum_descriptors_(**arguments)
    assert arguments["descriptors"].isnan().all()


@pytest.mark.parametrize(
    "changes",
    [
        *(
            changes
            for error, changes in MISTAKES
            if error is not DeviceError and not {"joint", "normalize", "noise"} & set(changes)
        ),
        {"joint": 1},
        {"joint": 3},
        {"joint": -1},
        {"noise": 2},
        {"noise": -1},
        {"laws": torch.ones(law_table_size(6) - 1, dtype=torch.float64)},
        {"laws": torch.ones(law_table_size(6))},
    ],
)
def test_the_raw_operator_raises_too(changes: dict[str, Any]) -> None:
    laws = torch.tensor(law_table(6, 9))
    arguments = {**good(), "laws": laws, "center": True, "joint": 0, "normalize": False, "noise": 0}
    torch.ops.rmtkernels.spectrum_descriptors_(**arguments)
    with pytest.raises(RuntimeError):
        torch.ops.rmtkernels.spectrum_descriptors_(**{**arguments, **changes})


@pytest.mark.parametrize("name", ["descriptors", "eigenvalues"])
def test_outputs_whose_rows_share_memory_are_refused(name: str) -> None:
    gram, seen = torch.eye(4).expand(2, 1, 4, 4).contiguous(), torch.tensor([4])
    out = {"descriptors": torch.zeros(2, 1, len(rmtkernels.DESCRIPTORS)), "eigenvalues": torch.zeros(2, 1, 4)}
    out[name] = out[name][:1].expand(2, -1, -1)
    with pytest.raises(RuntimeError, match="no two rows in one place"):
        rmtkernels.spectrum_descriptors_(out["descriptors"], out["eigenvalues"], gram, seen, 8)


def test_freed_memory_is_refused() -> None:
    gram = torch.eye(4)[None, None].clone()
    gram.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory"):
        rmtkernels.spectrum_descriptors(gram, torch.tensor([4]), 8)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("center", [True, False])
def test_nan_off_a_zero_diagonal_is_not_lost(backend: str, center: bool) -> None:
    gram = torch.zeros(1, 2, 3, 3)
    gram[0, 0, 2, 0] = gram[0, 0, 0, 2] = torch.nan
    values, _ = rmtkernels.spectrum_descriptors(gram, torch.tensor([3, 3]), 8, center=center, backend=backend)
    assert values[0, 0].isnan().all() and not values[0, 1].isnan().any()


def test_a_call_inside_a_tracer_leaves_no_trace_in_later_calls() -> None:
    gram, seen = torch.eye(7)[None, None].clone(), torch.tensor([7])
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        rmtkernels.spectrum_descriptors(gram, seen, 999)
    with pytest.raises(RuntimeError, match="functionalizing"):  # torch itself cannot, for operators that mutate
        torch.func.functionalize(lambda g: rmtkernels.spectrum_descriptors(g, seen, 997)[0])(gram)
    for dim in (999, 997):
        got, _ = rmtkernels.spectrum_descriptors(gram, seen, dim)
        want, _ = rmtkernels.spectrum_descriptors(gram, seen, dim, backend="reference")
        torch.testing.assert_close(got, want)


def test_the_median_is_that_of_the_degrees_of_freedom() -> None:
    """Centring costs one: with few columns the medians of 3 and of 4 eigenvalues differ, and so do the edges."""
    rows, dim = 4, 4
    edge, wrong = (marchenko_pastur_edges(3 / dim)[1] / marchenko_pastur_median(n / dim) for n in (rows - 1, rows))
    between = (edge + wrong) / 2
    assert edge < between < wrong, "the wrong median is the smaller one"
    noise = np.random.default_rng(0).standard_normal((rows, rows - 1))
    basis = np.linalg.qr(np.column_stack([np.ones(rows), noise]))[0][:, 1:]
    gram = torch.from_numpy((basis * np.array([between, 1.0, 1.0]) * dim) @ basis.T).float()[None, None]
    values, lam = rmtkernels.spectrum_descriptors(gram, torch.tensor([rows]), dim)
    assert lam[0, 0].tolist() == pytest.approx([between, 1, 1, 0], rel=1e-5)
    assert values[0, 0, DESCRIPTORS.index("above_edge")] == 1


@pytest.mark.parametrize(("left", "zero"), [(2.0**-19, False), (2.0**-21, True)])
def test_what_centring_leaves_of_equal_rows_is_zero_below_the_resolution(left: float, zero: bool) -> None:
    rows = 8
    noise = torch.eye(rows, dtype=torch.float64) * left * rows / (rows - 1)
    gram = (torch.ones(rows, rows, dtype=torch.float64) + noise)[None, None]
    for backend in ("cpu", "reference"):
        _, lam = rmtkernels.spectrum_descriptors(gram.float(), torch.tensor([rows]), 16, backend=backend)
        assert (lam == 0).all() == zero
