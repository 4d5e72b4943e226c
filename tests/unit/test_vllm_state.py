"""eigentrack.vllm.state: windows of many requests in one call are those of each request alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eigentrack.detector import Detector
from eigentrack.errors import TapError
from eigentrack.files import Settings
from eigentrack.options import chosen_options, settings_of_monitor
from eigentrack.vllm.config import Watch
from eigentrack.vllm.slots import Push, Slots
from eigentrack.vllm.state import State
from eigentrack.vllm.taps import Taps, parts_of
from rmtkernels import SlidingWindow, spectrum_descriptors

LAYERS, WIDTH, WINDOW = 3, 24, 8


def settings(spectra: str) -> Settings:
    options = chosen_options(nn.Identity(), None, {"window": WINDOW, "spectra": spectra})
    return settings_of_monitor("tiny", [f"layer{i}" for i in range(LAYERS)], range(LAYERS), (), options)


def fitted(made: Settings) -> Detector:
    torch.manual_seed(0)
    detector = Detector(made.names, settings=made, hidden=4, projection=4)
    sequences = [torch.randn(9, len(made.names)) + index % 2 for index in range(8)]
    detector.fit(sequences, [index % 2 for index in range(8)], items=range(8), epochs=2, progress=False)
    return detector


def alone(rows: Tensor, made: Settings, detector: Detector) -> tuple[Tensor, Tensor]:
    """(T, F) descriptors and (T,) risks of one request, (T, L, D) rows."""
    window = SlidingWindow(LAYERS, 1, WINDOW, WIDTH)
    joint = made.layer_scale if made.spectra == "joint" else None
    found = []
    for row in rows:
        window.update(list(row[:, None]))
        one = spectrum_descriptors(
            window.gram, window.rows, WIDTH, joint=joint, normalize=made.normalize, noise=made.noise
        )[0]
        one = one.transpose(0, 1).flatten(1)[0]
        found.append(one if window.seen[0, 2] >= 0 else torch.full_like(one, torch.nan))
    descriptors = torch.stack(found)
    return descriptors, detector.score([descriptors])[0]


@pytest.mark.parametrize("spectra", ["per_layer", "joint"])
@pytest.mark.parametrize("summed", [True, False], ids=["one tensor", "with residual"])
def test_each_request_is_as_if_it_were_alone(spectra: str, summed: bool, nan_memory: None) -> None:
    made = settings(spectra)
    detector = fitted(made)
    slots = Slots(4)
    state = State(Watch(made, detector, None, True, 4, WIDTH, torch.float32), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    texts = {f"r{i}": torch.randn(5 + 3 * i, LAYERS, WIDTH, generator=generator) for i in range(7)}
    texts["r2"][4, 1, 3] = torch.nan  # not finite: this token has no risk, the others go on
    told: dict[str, list[Tensor]] = {name: [] for name in texts}
    waiting, running = list(texts), []
    for name in texts:
        slots.begin(name, 0)
    slots.begin("prompt", 1000)
    turns = 0
    while waiting or running:
        running += [waiting.pop(0) for _ in range(min(len(waiting), 4 - len(running)))]
        running = running[1:] + running[:1]
        order = running if turns % 5 else running[:-1]  # one is passed over now and then
        turns += 1
        if not order:
            continue
        junk = torch.full((LAYERS, 3, WIDTH), 1e9)
        rows = [texts[name][len(told[name])][:, None] for name in order] + [junk]  # (L, 1, D) each; as a padded batch
        batch = list(order)
        if turns % 3 == 0:  # a chunk of somebody's prompt lies among them
            batch.insert(turns % len(batch), "prompt")
            rows.insert(turns % len(order), junk)
        computed = {name: len(told[name]) for name in order} | {"prompt": 0}
        push = slots.push(batch, dict.fromkeys(order, 1) | {"prompt": 3}, computed)
        padded = torch.cat(rows, 1)
        state.begin(push)
        for layer in range(LAYERS):
            residual = torch.randn(padded[layer].shape, generator=generator)
            residual[padded[layer].isnan()] = 0
            state.collect(layer, (padded[layer],) if summed else (padded[layer] - residual, residual))
        values = state.finish().values
        for name, slot in zip(push.requests, push.slots, strict=True):
            told[name].append(values[slot].clone())
        over = [name for name in running if len(told[name]) == len(texts[name])]
        slots.end(over)
        running = [name for name in running if name not in over]
    for name, rows in texts.items():
        descriptors, risk = alone(rows, made, detector)
        found = torch.stack(told[name])
        torch.testing.assert_close(found[:, 1:], descriptors, rtol=1e-3, atol=1e-3, equal_nan=True)
        torch.testing.assert_close(found[:, 0], risk, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert told["r2"][4].isnan().all() and not told["r2"][5].isnan().any()


def test_what_changes_between_steps_is_planned_anew() -> None:
    made = settings("per_layer")
    state = State(Watch(made, None, None, True, 2, WIDTH, torch.float32), torch.device("cpu"))
    steps = [
        (Push(["a"], rows=[0], slots=[0]), [1, 0]),
        (Push(["a"], rows=[0], slots=[0]), [2, 0]),
        (Push(["b"], rows=[0], slots=[0], emptied=[0]), [1, 0]),  # it took the slot of a, which has just ended
        (Push(["b"], rows=[0], slots=[0]), [2, 0]),
        (Push(["b"], rows=[1], slots=[0]), [3, 0]),
        (Push(["c"], rows=[1], slots=[1]), [3, 1]),
    ]
    hidden = torch.randn(2, WIDTH)
    for push, rows in steps:
        state.begin(push)
        for layer in range(LAYERS):
            state.collect(layer, (hidden,))
        state.finish()
        assert state.windows.rows.tolist() == rows
        newest = state.windows.ring[0, push.slots[0], rows[push.slots[0]] - 1]
        assert newest.equal(hidden[push.rows[0]])


def test_it_says_what_it_takes() -> None:
    made = settings("per_layer")
    small, large = (
        State(Watch(made, None, None, True, slots, WIDTH, torch.float32), torch.device("cpu")).nbytes
        for slots in (4, 8)
    )
    assert large == 2 * small > 4 * LAYERS * WINDOW * WIDTH * 4


class Allocations(TorchDispatchMode):
    """Which operators return memory that they were not given."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        returned = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
        self.by += [str(func) for leaf in leaves if leaf.untyped_storage().data_ptr() not in given]
        return returned


@pytest.mark.parametrize("spectra", ["per_layer", "joint"])
def test_a_step_allocates_nothing_but_what_the_detector_returns(spectra: str) -> None:
    made = settings(spectra)
    found: dict[bool, list[str]] = {}
    for watched in (False, True):
        detector = fitted(made) if watched else None
        state = State(Watch(made, detector, None, True, 4, WIDTH, torch.float32), torch.device("cpu"))
        rows = torch.randn(3, WIDTH)

        def step(state: State = state, rows: Tensor = rows) -> None:
            for chosen in ([0, 1], [0, 2]):
                state.begin(Push(["a", "b"], rows=chosen, slots=[3, 1], emptied=[3]))
                for layer in range(LAYERS):
                    state.collect(layer, (rows, rows))
                state.finish()

        step()  # the laws' table is made once
        with Allocations() as allocations:
            step()
        found[watched] = allocations.by
    assert found[False] == []
    assert 0 < len(found[True]) <= 16  # two steps


class Block(nn.Module):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, hidden + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden, _ = block(hidden)
        return hidden


def tapped(model: Model) -> Taps:
    state = State(Watch(settings("per_layer"), None, None, True, 2, WIDTH, torch.float32), torch.device("cpu"))
    state.begin(Push())
    return Taps(model, LAYERS, range(LAYERS), state, WIDTH)


def test_blocks_are_heard_in_the_pass_that_was_announced_and_in_no_other() -> None:
    model, seen = Model(), list[int]()
    taps = tapped(model)

    def before() -> bool:
        seen.append(taps.collected)
        return True

    model(torch.zeros(5, WIDTH))
    assert taps.collected == 0 and taps.through
    taps.listen(before, lambda: seen.append(taps.collected))
    assert not taps.through
    for _ in range(2):
        model(torch.zeros(5, WIDTH))
        assert taps.collected == LAYERS and seen == [0, LAYERS] and taps.through


def test_a_pass_without_rows_has_no_end() -> None:
    model, seen = Model(), list[str]()
    taps = tapped(model)
    taps.listen(lambda: False, lambda: seen.append("end"))
    model(torch.zeros(5, WIDTH))
    assert taps.collected == 0 and taps.through and not seen


def test_a_pass_that_leaves_out_blocks_is_not_through() -> None:
    model = Model()
    taps = tapped(model)
    taps.listen(lambda: True, lambda: None)
    model.blocks[0](torch.zeros(5, WIDTH))
    assert taps.collected == 1 and not taps.through


def test_a_model_of_another_depth_is_refused() -> None:
    state = State(Watch(settings("per_layer"), None, None, True, 2, WIDTH, torch.float32), torch.device("cpu"))
    with pytest.raises(TapError, match="has 3 blocks where its config has 4"):
        Taps(Model(), 4, range(LAYERS), state, WIDTH)


@pytest.mark.parametrize("output", [torch.zeros(2, 5, WIDTH), torch.zeros(5, 7), (torch.zeros(5, WIDTH),) * 3, None])
def test_blocks_that_return_something_else_are_refused(output: object) -> None:
    with pytest.raises(TapError, match="must return"):
        parts_of(output, WIDTH)
