"""Operators under torch.compile, fake tensors and opcheck: the same shapes, the same bits, the same state."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import rmtkernels
from rmtkernels import (
    DESCRIPTORS,
    StreamingCovariance,
    covariance_update_,
    dispatch,
    lanczos_multiply,
    lanczos_multiply_gram,
    lowrank_linear,
    spectrum_descriptors,
    spectrum_descriptors_,
    spectrum_eigvalsh,
    window_gram,
    window_push_,
)
from rmtkernels.ops.law_table import law_table
from tests.helpers import (
    Covariance,
    State,
    covariance_of,
    empty_covariance,
    empty_state,
    gram_of,
    normal,
    pushed,
    same_bits,
    same_covariance,
    same_state,
)

OPS = torch.ops.rmtkernels
F = len(DESCRIPTORS)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def push_arguments(steps: int | None, dtype: torch.dtype, masked: bool) -> tuple[Any, ...]:
    shape = (3, 9) if steps is None else (3, steps, 9)
    state = pushed(empty_state(2, 3, 4, 9, dtype), [normal(3, 5, 9, seed=s, dtype=dtype) for s in range(2)])
    mask = normal(*shape[:-1], seed=8) > -0.5 if masked else None
    return (*state, [normal(*shape, seed=5 + s, dtype=dtype) for s in range(2)], mask)


def descriptor_arguments(joint: int, center: bool) -> tuple[Any, ...]:
    gram, seen = gram_of(normal(2, 3, 6, 9))
    spectra = 1 if joint else 2
    out = torch.zeros(spectra, 3, F), torch.zeros(spectra, 3, 6)
    return (*out, gram, seen - 2, torch.tensor(law_table(6, 9 * (2 if joint else 1))), 9, center, joint, center, 1)


def update_arguments(rows: int, state: torch.dtype, dtype: torch.dtype, weighted: bool) -> tuple[Any, ...]:
    weights, mask = (normal(rows, seed=6).abs(), normal(rows, seed=8) > -0.5) if weighted else (None, None)
    return (*covariance_of(normal(20, 9), dtype=state), normal(rows, 9, seed=5, dtype=dtype), weights, mask, 0.9)


def lowrank_arguments(shape: tuple[int, ...], x_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, ...]:
    weights = (normal(3, 9, seed=2, dtype=dtype), normal(5, 3, seed=3, dtype=dtype), normal(5, seed=4, dtype=dtype))
    return (normal(*shape, 9, seed=1, dtype=x_dtype), *weights)


OPCHECKS: list[tuple[str, tuple[Any, ...]]] = [
    ("window_push_", push_arguments(None, torch.float32, False)),
    ("window_push_", push_arguments(None, torch.bfloat16, True)),
    ("window_push_", push_arguments(3, torch.float16, True)),
    ("window_push_", push_arguments(0, torch.float32, False)),
    ("window_gram", (normal(2, 7, 9), 4)),
    ("window_gram", (normal(2, 7, 9, dtype=torch.bfloat16), 4, 3, normal(2, 7) > 0)),
    ("window_gram", (normal(2, 2, 9), 4, 3)),
    ("spectrum_eigvalsh", (normal(5, 6, 6),)),
    ("spectrum_eigvalsh", (normal(2, 3, 6, 6, dtype=torch.float64).mT,)),
    ("spectrum_eigvalsh", (torch.zeros(0, 3, 3),)),
    ("spectrum_descriptors_", descriptor_arguments(0, True)),
    ("spectrum_descriptors_", descriptor_arguments(1, False)),
    ("spectrum_descriptors_", descriptor_arguments(2, True)),
    ("covariance_update_", update_arguments(7, torch.float32, torch.float32, False)),
    ("covariance_update_", update_arguments(7, torch.float64, torch.bfloat16, True)),
    ("covariance_update_", update_arguments(0, torch.float32, torch.float16, True)),
    ("spectrum_laws", (torch.zeros(2), 6, 9)),
    ("lowrank_linear", lowrank_arguments((2, 3), torch.float32, torch.float32)),
    ("lowrank_linear", lowrank_arguments((), torch.float32, torch.bfloat16)),
    ("lowrank_linear", (*lowrank_arguments((5,), torch.bfloat16, torch.bfloat16)[:3], None)),
    ("lowrank_linear", (normal(9, 4).T, *lowrank_arguments((4,), torch.bfloat16, torch.float32)[1:3])),
    ("lowrank_linear", lowrank_arguments((0,), torch.float32, torch.float32)),
    ("lanczos_multiply", (normal(7, 9), normal(3, 9))),
    ("lanczos_multiply", (normal(9, 9, dtype=torch.float64), normal(10, 9, dtype=torch.float64))),
    ("lanczos_multiply_gram", (normal(7, 9), None, normal(3, 9))),
    ("lanczos_multiply_gram", (normal(7, 9), normal(2, 9), normal(8, 9))),
]


@pytest.mark.parametrize(("operator", "arguments"), OPCHECKS)
def test_opcheck(operator: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(OPS, operator).default, arguments)


def shapes_of(results: Any) -> list[tuple[torch.Size, torch.dtype, tuple[int, ...]]]:
    tensors = [results] if isinstance(results, Tensor) else list(results)
    return [(tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors]


@pytest.mark.parametrize(
    "call",
    [
        lambda: window_gram(torch.zeros(2, 7, 9), 4, 3),
        lambda: window_gram(torch.zeros(2, 2, 9, dtype=torch.float16), 4, 3),
        lambda: spectrum_eigvalsh(torch.zeros(2, 3, 6, 6, dtype=torch.float64)),
        lambda: spectrum_eigvalsh(torch.zeros(4, 2, 3, 3).permute(1, 0, 3, 2)),
        lambda: lanczos_multiply(torch.zeros(7, 9), torch.zeros(3, 9)),
        lambda: lanczos_multiply_gram(torch.zeros(7, 9).mT, torch.zeros(3, 7), mean=torch.zeros(7).double()),
        lambda: spectrum_descriptors(torch.zeros(2, 3, 6, 6), torch.zeros(3, dtype=torch.int64), 9),
        lambda: spectrum_descriptors(torch.zeros(2, 3, 6, 6), torch.zeros(3, dtype=torch.int64), 9, joint="trace"),
        lambda: spectrum_descriptors(torch.zeros(2, 3, 6, 6).mT, torch.zeros(3, dtype=torch.int64), 9),
        lambda: lowrank_linear(torch.zeros(2, 3, 9), torch.zeros(4, 9), torch.zeros(5, 4)),
        lambda: lowrank_linear(torch.zeros(9, 3).T.bfloat16(), torch.zeros(4, 9), torch.zeros(5, 4), torch.zeros(5)),
        lambda: lowrank_linear(torch.zeros(0, 9), torch.zeros(4, 9), torch.zeros(5, 4)),
        lambda: lowrank_linear(torch.zeros(500, 9), torch.zeros(4, 9), torch.zeros(5, 4)),
    ],
)
def test_fake_results_look_like_real_ones(call: Callable[[], Any]) -> None:
    with FakeTensorMode():
        fake = shapes_of(call())
    assert fake == shapes_of(call())


def test_fake_and_real_calls_do_not_poison_each_other() -> None:
    """What is kept between calls must be neither fake where real tensors come, nor real where fake ones do."""
    gram, seen = gram_of(normal(1, 2, 6, 9))
    for dim in (1234567, 1234568):  # of sizes that no other test has used
        if dim % 2:
            spectrum_descriptors(gram, seen, dim)
        with FakeTensorMode():
            spectrum_descriptors(torch.zeros(1, 2, 6, 6), torch.zeros(2, dtype=torch.int64), dim)
        values, eigenvalues = spectrum_descriptors(gram, seen, dim)
        assert type(values) is Tensor
        assert eigenvalues.sum() > 0


def decode(state: State, tokens: Tensor, out: Tensor, spectra: Tensor) -> Tensor:
    """A decode loop as a model has it: every step pushes, and writes into buffers made before."""
    for t in range(tokens.shape[1]):
        window_push_(state.ring, state.gram, state.seen, [tokens[:, t], tokens[:, t] * 2])
        spectrum_descriptors_(out[t], spectra[t], state.gram, state.seen[:, 0], 9)
    return out[..., 0].sum() + state.gram.nan_to_num(0.0).sum()


def test_a_compiled_decode_loop_leaves_the_same_state() -> None:
    tokens = normal(3, 7, 9)

    def run(function: Callable[..., Tensor]) -> tuple[State, Tensor, Tensor, Tensor]:
        state = empty_state(2, 3, 4, 9)
        out, spectra = torch.full((7, 2, 3, F), torch.nan), torch.full((7, 2, 3, 4), torch.nan)
        return state, out, spectra, function(state, tokens, out, spectra)

    want = run(decode)
    got = run(torch.compile(decode, fullgraph=True, backend="aot_eager"))
    assert same_state(got[0], want[0])
    assert all(map(same_bits, got[1:], want[1:]))
    assert not got[1].isnan().any()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lambda h, m: window_gram(h, 4, 2, m), (normal(2, 9, 11, dtype=torch.bfloat16), normal(2, 9) > -0.5)),
        (lambda a: spectrum_eigvalsh(a + 1), (normal(3, 2, 12, 12),)),
        (lambda a, v: lanczos_multiply(a * 2, v), (normal(12, 30), normal(4, 30))),
        (lambda x, v: lanczos_multiply_gram(x, v, mean=x.double().mean(0)), (normal(40, 30), normal(4, 30))),
        (lambda g, s: spectrum_descriptors(g, s, 9), gram_of(normal(2, 3, 6, 9))),
        (lambda g, s: spectrum_descriptors(g * 2, s, 9, joint="trace", center=False), gram_of(normal(2, 3, 6, 9))),
        (lambda x, *weights: lowrank_linear(x * 2, *weights), lowrank_arguments((2, 3), torch.float32, torch.bfloat16)),
        (lambda x, *weights: lowrank_linear(x * 2, *weights), lowrank_arguments((700,), torch.float32, torch.float32)),
    ],
)
@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiled_functions_give_the_same_bits(
    function: Callable[..., Any], arguments: tuple[Tensor, ...], backend: str
) -> None:
    want = function(*arguments)
    got = torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    pairs = [(got, want)] if isinstance(want, Tensor) else zip(got, want, strict=True)
    assert all(same_bits(a, b) for a, b in pairs)


def test_the_first_use_of_an_operator_may_be_a_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_available", {})
    for function, arguments in (
        (lambda s, rows: window_push_(s.ring, s.gram, s.seen, rows), (empty_state(1, 2, 3, 4), [normal(2, 4)])),
        (lambda h: window_gram(h, 3), (normal(1, 5, 4),)),
        (lambda s, batch: covariance_update_(s.mean, s.scatter, s.totals, batch), (empty_covariance(4), normal(5, 4))),
        (spectrum_eigvalsh, (normal(4, 4),)),
        (lanczos_multiply, (normal(5, 4), normal(2, 4))),
        (lambda g, s: spectrum_descriptors(g, s, 4), gram_of(normal(1, 1, 3, 4))),
        (lowrank_linear, lowrank_arguments((2,), torch.float32, torch.float32)),
    ):
        torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)


def test_the_backend_chosen_while_tracing_is_used() -> None:
    with rmtkernels.use_backend("cpu"):
        compiled = torch.compile(spectrum_eigvalsh, fullgraph=True, backend="aot_eager")
        assert same_bits(compiled(normal(2, 5, 5)), spectrum_eigvalsh(normal(2, 5, 5)))


def test_dynamic_shapes_compile_once_for_all_batch_sizes() -> None:
    def monitor(hidden: Tensor) -> tuple[Tensor, Tensor]:
        gram, seen = window_gram(hidden, 5)
        return spectrum_descriptors(gram[None, :, -1], seen[:, -1], 9)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(monitor, fullgraph=True, backend=counter, dynamic=True)
    for batch, steps in ((2, 8), (3, 8), (7, 12), (4, 30), (5, 6)):  # sizes that are equal by chance would be tied
        hidden = normal(batch, steps, 9, seed=batch)
        assert all(map(same_bits, compiled(hidden), monitor(hidden)))
    assert counter.frame_count == 1


def test_a_compiled_push_survives_changing_batch_sizes() -> None:
    def push(ring: Tensor, gram: Tensor, seen: Tensor, rows: list[Tensor]) -> None:
        window_push_(ring, gram, seen, rows)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(push, fullgraph=True, backend=counter, dynamic=True)
    for batch in (5, 7, 8, 10):
        rows = [normal(batch, 9, seed=s) for s in range(2)]
        state = empty_state(2, batch, 4, 9)
        compiled(*state, rows)
        assert same_state(state, pushed(empty_state(2, batch, 4, 9), rows))
    assert counter.frame_count == 1


def test_a_compiled_stream_leaves_the_same_covariance() -> None:
    def watch(state: Covariance, hidden: Tensor, keep: Tensor) -> None:
        for layer in hidden:
            covariance_update_(*state, layer * 2, mask=keep, decay=0.9)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(watch, fullgraph=True, backend=counter, dynamic=True)
    for rows in (6, 9, 40, 300):  # sizes that are equal by chance would be tied
        hidden, keep = normal(3, rows, 7, seed=rows), normal(rows) > -0.5
        got, want = empty_covariance(7), empty_covariance(7)
        compiled(got, hidden, keep)
        watch(want, hidden, keep)
        assert same_covariance(got, want)
    assert counter.frame_count == 1


def test_a_state_is_updated_within_a_compiled_function() -> None:
    state, want = StreamingCovariance(6), StreamingCovariance(6)

    def watch(hidden: Tensor) -> Tensor:
        state.update(hidden)
        return hidden + 1

    compiled = torch.compile(watch, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        compiled(normal(8, 6, seed=seed))
        want.update(normal(8, 6, seed=seed))
    assert want.rows == 24 and same_bits(state.scatter, want.scatter) and same_bits(state.totals, want.totals)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [3, 700])
def test_a_compiled_low_rank_layer_has_the_same_gradients(backend: str, rows: int) -> None:
    arguments = [t.requires_grad_() for t in lowrank_arguments((rows,), torch.float32, torch.float32)]
    compiled = torch.compile(lowrank_linear, fullgraph=True, backend=backend)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            want, got = lowrank_linear(*arguments), compiled(*arguments)
        assert got.requires_grad == grad
        torch.testing.assert_close(got, want)
        if grad:
            wanted = torch.autograd.grad(want.square().sum(), arguments)
            torch.testing.assert_close(torch.autograd.grad(got.square().sum(), arguments), wanted)


@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_low_rank_layer_needs_one_graph_for_small_batches_and_one_for_large(grad: bool) -> None:
    weights = normal(3, 512, seed=2), normal(5, 3, seed=3), normal(5, seed=4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowrank_linear, fullgraph=True, backend=counter, dynamic=True)
    for rows in (2, 3, 4, 7, 8, 9, 15, 16, 17, 40, 300, 6, 21):
        x = normal(rows, 512, seed=rows).requires_grad_(grad)
        assert same_bits(compiled(x, *weights).detach(), lowrank_linear(x, *weights).detach())
    assert counter.frame_count <= (1 if grad else 3)


class Watched(nn.Module):
    """A small network whose middle layer a hook watches; pushing is the hook's only effect."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9))
        self.state = empty_state(1, 3, 4, 9)
        self.body[1].register_forward_hook(self.watch)

    def watch(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        window_push_(self.state.ring, self.state.gram, self.state.seen, [output])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_hook_whose_only_effect_is_a_push_survives_compilation(backend: str, grad: bool) -> None:
    eager, watched = Watched(), Watched()
    compiled = torch.compile(watched, fullgraph=True, backend=backend)
    for step in range(6):
        x = normal(3, 9, seed=step)
        with torch.set_grad_enabled(grad):
            want, got = eager(x), compiled(x)
        torch.testing.assert_close(got, want)
    assert torch.equal(watched.state.seen, eager.state.seen)
    assert watched.state.seen[:, 0].tolist() == [6, 6, 6]
    if backend == "aot_eager":
        assert same_state(watched.state, eager.state)
    torch.testing.assert_close(watched.state.gram, eager.state.gram)  # inductor's tanh rounds otherwise
    if grad:
        compiled(x).sum().backward()
        assert watched.body[0].weight.grad is not None
