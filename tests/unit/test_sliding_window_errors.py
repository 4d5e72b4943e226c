"""Bad arguments of sliding_window: a typed error, and not a byte of the state changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import rmtkernels
from rmtkernels import DeviceError, DtypeError, RmtkernelsError, ShapeError, window_gram, window_push_
from tests.helpers import State, empty_state, normal, pushed, same_state

L, B, N, D = 2, 3, 4, 9
Arguments = dict[str, Any]


def arguments() -> Arguments:
    state = pushed(empty_state(L, B, N, D), [normal(B, 2, D, seed=s) for s in range(L)])
    return {
        **state._asdict(),
        "rows": [normal(B, D, seed=5 + s) for s in range(L)],
        "mask": torch.ones(B, dtype=torch.bool),
    }


def steps(count: int) -> list[torch.Tensor]:
    return [normal(B, count, D, seed=s) for s in range(L)]


MISTAKES: dict[str, tuple[type[RmtkernelsError], Callable[[Arguments], Arguments]]] = {
    "ring 3-D": (ShapeError, lambda a: {"ring": a["ring"][0]}),
    "ring strided": (ShapeError, lambda a: {"ring": a["ring"].mT.contiguous().mT}),
    "ring float64": (DtypeError, lambda a: {"ring": a["ring"].double()}),
    "ring on another device": (DeviceError, lambda a: {"ring": a["ring"].to("meta")}),
    "window 0": (ShapeError, lambda a: {"ring": a["ring"][:, :, :0], "gram": a["gram"][:, :, :0, :0]}),
    "window 129": (ShapeError, lambda a: empty_state(L, B, 129, D)._asdict()),
    "gram too small": (ShapeError, lambda a: {"gram": a["gram"][:, :, :, :3].contiguous()}),
    "gram strided": (ShapeError, lambda a: {"gram": torch.zeros(L, B, N, 2 * N)[..., ::2]}),
    "gram float64": (DtypeError, lambda a: {"gram": a["gram"].double()}),
    "gram on another device": (DeviceError, lambda a: {"gram": a["gram"].to("meta")}),
    "seen one column": (ShapeError, lambda a: {"seen": a["seen"][:, 0]}),
    "seen of another batch": (ShapeError, lambda a: {"seen": a["seen"][:2].clone()}),
    "seen int32": (DtypeError, lambda a: {"seen": a["seen"].int()}),
    "seen on another device": (DeviceError, lambda a: {"seen": a["seen"].to("meta")}),
    "rows of one layer too few": (ShapeError, lambda a: {"rows": a["rows"][:1]}),
    "rows of one layer too many": (ShapeError, lambda a: {"rows": [*a["rows"], a["rows"][0]]}),
    "no rows": (ShapeError, lambda a: {"rows": []}),
    "rows of another batch": (ShapeError, lambda a: {"rows": [row[:2] for row in a["rows"]]}),
    "rows of another width": (ShapeError, lambda a: {"rows": [row[:, 1:] for row in a["rows"]]}),
    "rows 1-D": (ShapeError, lambda a: {"rows": [row[0] for row in a["rows"]]}),
    "rows 4-D": (ShapeError, lambda a: {"rows": [row[:, None, None] for row in a["rows"]]}),
    "second layer of another width": (ShapeError, lambda a: {"rows": [a["rows"][0], a["rows"][1][:, 1:]]}),
    "second layer with more steps": (ShapeError, lambda a: {"rows": [steps(2)[0], steps(3)[1]], "mask": None}),
    "second layer 3-D": (ShapeError, lambda a: {"rows": [a["rows"][0], a["rows"][1][:, None]]}),
    "rows float64": (DtypeError, lambda a: {"rows": [row.double() for row in a["rows"]]}),
    "second layer half": (DtypeError, lambda a: {"rows": [a["rows"][0], a["rows"][1].half()]}),
    "second layer on another device": (DeviceError, lambda a: {"rows": [a["rows"][0], a["rows"][1].to("meta")]}),
    "mask of another batch": (ShapeError, lambda a: {"mask": a["mask"][:2]}),
    "mask 2-D for one step": (ShapeError, lambda a: {"mask": a["mask"][:, None]}),
    "mask 1-D for many steps": (ShapeError, lambda a: {"rows": steps(2)}),
    "mask transposed": (ShapeError, lambda a: {"rows": steps(2), "mask": torch.ones(2, B, dtype=torch.bool)}),
    "mask int64": (DtypeError, lambda a: {"mask": a["mask"].long()}),
    "mask on another device": (DeviceError, lambda a: {"mask": a["mask"].to("meta")}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_the_state_kept(name: str) -> None:
    error, change = MISTAKES[name]
    good = arguments()
    before = State(good["ring"], good["gram"], good["seen"]).copy()
    changed = change(good)
    with pytest.raises(error):
        window_push_(**{**good, **changed})
    assert same_state(State(good["ring"], good["gram"], good["seen"]), before)


@pytest.mark.parametrize("name", [name for name in MISTAKES if "device" not in name])
def test_the_raw_operator_raises_too_and_keeps_the_state(name: str) -> None:
    good = arguments()
    before = State(good["ring"], good["gram"], good["seen"]).copy()
    changed = {**good, **MISTAKES[name][1](good)}
    with pytest.raises(RuntimeError):
        torch.ops.rmtkernels.window_push_(**changed)
    assert same_state(State(good["ring"], good["gram"], good["seen"]), before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_mistake_no_error(backend: str) -> None:
    window_push_(**arguments(), backend=backend)


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (ShapeError, {"hidden": normal(3, 4)}),
        (ShapeError, {"window": 0}),
        (ShapeError, {"window": 129}),
        (ShapeError, {"window": -1}),
        (ShapeError, {"stride": 0}),
        (ShapeError, {"mask": torch.ones(2, dtype=torch.bool)}),
        (ShapeError, {"mask": torch.ones(5, 2, dtype=torch.bool)}),
        (DtypeError, {"mask": torch.ones(2, 5)}),
        (DtypeError, {"hidden": normal(2, 5, 4).double()}),
        (DtypeError, {"hidden": torch.zeros(2, 5, 4, dtype=torch.int32)}),
    ],
)
def test_window_gram_names_mistakes(error: type[Exception], changes: Arguments) -> None:
    good: Arguments = {"hidden": normal(2, 5, 4), "window": 3, "stride": 1, "mask": None}
    with pytest.raises(error):
        window_gram(**{**good, **changes})
    with pytest.raises(RuntimeError):
        torch.ops.rmtkernels.window_gram(**{**good, **changes})


def test_window_gram_names_a_mask_on_another_device() -> None:
    with pytest.raises(DeviceError):
        window_gram(normal(2, 5, 4), 3, mask=torch.ones(2, 5, dtype=torch.bool, device="meta"))


def test_more_rows_than_can_be_counted_are_refused() -> None:
    state = rmtkernels.SlidingWindow(1, 4, 4, 0)
    with pytest.raises(RuntimeError, match="too many"):
        state.update([torch.zeros(4, 1, 0).expand(4, 2**61, 0)])


@pytest.mark.parametrize("shape", [(4, 2**61, 0), (1, 2**20, 2**42)])
def test_sequences_whose_products_cannot_be_counted_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="too many"):
        window_gram(torch.zeros(1, 1, min(shape[2], 1)).expand(shape), 3)


def test_freed_rows_are_refused() -> None:
    state = rmtkernels.SlidingWindow(1, 2, 4, 8)
    row = torch.ones(2, 8)
    row.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory"):
        state.update([row])
    assert state.rows.tolist() == [0, 0]


def test_a_state_checks_its_own_sizes() -> None:
    with pytest.raises(rmtkernels.ShapeError):
        rmtkernels.SlidingWindow(1, 1, 129, 4)
    with pytest.raises(rmtkernels.DtypeError):
        rmtkernels.SlidingWindow(1, 1, 8, 4, dtype=torch.float64)
    assert rmtkernels.SlidingWindow(1, 2, 8, 4).seen.tolist() == [[0, 0, -1]] * 2
