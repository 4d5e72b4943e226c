"""Bad arguments of covariance: a typed error, and not a byte of the state changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rmtkernels import (
    DeviceError,
    DtypeError,
    RangeError,
    RmtkernelsError,
    ShapeError,
    StateError,
    StreamingCovariance,
    covariance_update_,
)
from tests.helpers import Covariance, covariance_of, normal, same_covariance

N, D = 6, 9
Arguments = dict[str, Any]


def arguments() -> Arguments:
    return {
        **covariance_of(normal(20, D))._asdict(),
        "batch": normal(N, D, seed=5),
        "weights": torch.ones(N),
        "mask": torch.ones(N, dtype=torch.bool),
        "decay": 1.0,
    }


def with_entry(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[3] = value
    return changed


MISTAKES: dict[str, tuple[type[RmtkernelsError], Callable[[Arguments], Arguments]]] = {
    "mean 2-D": (ShapeError, lambda a: {"mean": a["mean"][None]}),
    "mean float32": (DtypeError, lambda a: {"mean": a["mean"].float()}),
    "mean strided": (ShapeError, lambda a: {"mean": torch.zeros(2 * D, dtype=torch.float64)[::2]}),
    "scatter of another width": (ShapeError, lambda a: {"scatter": a["scatter"][:-1, :-1].contiguous()}),
    "scatter strided": (ShapeError, lambda a: {"scatter": torch.zeros(D, 2 * D)[:, ::2]}),
    "scatter transposed": (ShapeError, lambda a: {"scatter": torch.zeros(D, D).T}),
    "scatter bfloat16": (DtypeError, lambda a: {"scatter": a["scatter"].bfloat16()}),
    "scatter on another device": (DeviceError, lambda a: {"scatter": a["scatter"].to("meta")}),
    "totals short": (ShapeError, lambda a: {"totals": a["totals"][:4]}),
    "totals int64": (DtypeError, lambda a: {"totals": a["totals"].long()}),
    "totals on another device": (DeviceError, lambda a: {"totals": a["totals"].to("meta")}),
    "batch 1-D": (ShapeError, lambda a: {"batch": a["batch"][0]}),
    "batch 3-D": (ShapeError, lambda a: {"batch": a["batch"][None]}),
    "batch of another width": (ShapeError, lambda a: {"batch": a["batch"][:, 1:]}),
    "batch int32": (DtypeError, lambda a: {"batch": a["batch"].int()}),
    "batch complex": (DtypeError, lambda a: {"batch": a["batch"].to(torch.complex64)}),
    "batch on another device": (DeviceError, lambda a: {"batch": a["batch"].to("meta")}),
    "weights of another length": (ShapeError, lambda a: {"weights": a["weights"][1:]}),
    "weights 2-D": (ShapeError, lambda a: {"weights": a["weights"][:, None]}),
    "weights int64": (DtypeError, lambda a: {"weights": a["weights"].long()}),
    "weights on another device": (DeviceError, lambda a: {"weights": a["weights"].to("meta")}),
    "a negative weight": (RangeError, lambda a: {"weights": with_entry(a["weights"], -1e-30)}),
    "a weight that is NaN": (RangeError, lambda a: {"weights": with_entry(a["weights"], torch.nan)}),
    "an infinite weight": (RangeError, lambda a: {"weights": with_entry(a["weights"], torch.inf)}),
    "mask of another length": (ShapeError, lambda a: {"mask": a["mask"][1:]}),
    "mask int64": (DtypeError, lambda a: {"mask": a["mask"].long()}),
    "mask on another device": (DeviceError, lambda a: {"mask": a["mask"].to("meta")}),
    "decay 0": (RangeError, lambda a: {"decay": 0.0}),
    "decay above 1": (RangeError, lambda a: {"decay": 1.0000001}),
    "decay NaN": (RangeError, lambda a: {"decay": torch.nan}),
    "rows whose squares overflow in sum": (RangeError, lambda a: {"batch": normal(N, D) * 6e18}),
    "a gap of the means that overflows": (RangeError, lambda a: {"batch": torch.full((N, D), 6e18)}),
    "weights that overflow": (RangeError, lambda a: {"weights": torch.full((N,), 1e38)}),
    "weights whose sum overflows": (
        RangeError,
        lambda a: {"weights": torch.full((N,), 1e308, dtype=torch.float64), "batch": torch.zeros(N, D)},
    ),
    "weights times rows that overflow float64": (
        RangeError,
        lambda a: {"weights": torch.full((N,), 1e300, dtype=torch.float64), "batch": normal(N, D) * 1e10},
    ),
    "a state that is not finite": (RangeError, lambda a: {"scatter": torch.full((D, D), torch.nan)}),
    "a mean that is not finite": (RangeError, lambda a: {"mean": a["mean"] * torch.inf}),
    "a negative total": (RangeError, lambda a: {"totals": -a["totals"]}),
}


def state_of(a: Arguments) -> Covariance:
    return Covariance(a["mean"], a["scatter"], a["totals"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_the_state_kept(name: str, backend: str) -> None:
    error, change = MISTAKES[name]
    good = arguments()
    before = state_of(good).copy()
    changed = {**good, **change(good)}
    with pytest.raises(error):
        covariance_update_(**changed, backend=backend)
    assert same_covariance(state_of(good), before)


@pytest.mark.parametrize("name", [name for name in MISTAKES if "device" not in name])
def test_the_raw_operator_raises_too_and_keeps_the_state(name: str) -> None:
    good = arguments()
    before = state_of(good).copy()
    with pytest.raises(RuntimeError):
        torch.ops.rmtkernels.covariance_update_(**{**good, **MISTAKES[name][1](good)})
    assert same_covariance(state_of(good), before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_mistake_no_error(backend: str) -> None:
    covariance_update_(**arguments(), backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("before", [0, 20])
def test_squares_that_overflow_float64_are_refused(before: int, backend: str) -> None:
    state = covariance_of(normal(before, 1, dtype=torch.float64), dtype=torch.float64)
    kept = state.copy()
    rows = torch.tensor([[0.0], [1.3e154]], dtype=torch.float64).repeat(5, 1)  # each of the squares fits
    with pytest.raises(RangeError):
        covariance_update_(*state, rows, backend=backend)
    assert same_covariance(state, kept)


def test_a_freed_batch_is_refused() -> None:
    batch = torch.ones(4, D)
    batch.untyped_storage().resize_(0)
    good = arguments()
    with pytest.raises(RuntimeError, match="no memory"):
        covariance_update_(good["mean"], good["scatter"], good["totals"], batch)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ShapeError, {"dim": -1}),
        (DtypeError, {"dim": 4, "dtype": torch.bfloat16}),
        (RangeError, {"dim": 4, "decay": 0.0}),
        (RangeError, {"dim": 4, "decay": torch.nan}),
    ],
)
def test_a_state_checks_its_own_sizes(error: type[Exception], options: Arguments) -> None:
    with pytest.raises(error):
        StreamingCovariance(**options)


def filled(**options: Any) -> StreamingCovariance:
    state = StreamingCovariance(D, **options)
    state.update(normal(20, D))
    state.update(normal(20, D, seed=1))
    return state


@pytest.mark.parametrize(
    ("error", "other"),
    [
        (ShapeError, lambda: StreamingCovariance(D + 1)),
        (DtypeError, lambda: filled(dtype=torch.float64)),
        (DeviceError, lambda: StreamingCovariance(D, device="meta")),
        (StateError, lambda: filled(decay=0.9)),
    ],
)
def test_states_that_do_not_fit_are_not_merged(
    error: type[Exception], other: Callable[[], StreamingCovariance]
) -> None:
    state = filled()
    before = Covariance(state.mean, state.scatter, state.totals).copy()
    with pytest.raises(error):
        state.merge(other())
    assert same_covariance(Covariance(state.mean, state.scatter, state.totals), before)


def test_a_decayed_state_takes_no_other_in() -> None:
    state = filled(decay=0.5)
    with pytest.raises(StateError, match="decayed"):
        state.merge(filled())
    fresh = StreamingCovariance(D, decay=0.5)
    fresh.update(normal(20, D))  # nothing to decay yet
    fresh.merge(filled())
    assert fresh.rows == 60


def test_a_merge_that_would_overflow_is_refused() -> None:
    state, far = filled(), StreamingCovariance(D)
    far.update(torch.full((3, D), 6e18))
    wide = StreamingCovariance(D)
    wide.update(torch.tensor([[-2.5e18], [2.5e18]]).expand(2, D))  # twice it is too much, though the means are equal
    for one, other in ((state, far), (wide, wide)):
        before = Covariance(one.mean, one.scatter, one.totals).copy()
        with pytest.raises(RangeError):
            one.merge(other)
        assert same_covariance(Covariance(one.mean, one.scatter, one.totals), before)


@pytest.mark.parametrize(("rows", "ddof"), [(0, 0), (1, 1), (3, 3), (3, 4), (3, torch.nan)])
def test_a_covariance_of_too_few_rows_is_refused(rows: int, ddof: float) -> None:
    state = StreamingCovariance(D)
    state.update(normal(rows, D))
    with pytest.raises(StateError, match="total weight"):
        state.covariance(ddof=ddof)
