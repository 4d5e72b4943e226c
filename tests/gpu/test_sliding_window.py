"""sliding_window on a GPU: both operators, in CUDA C++ and Triton, against the oracle and themselves, bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import rmtkernels
from rmtkernels import dispatch, window_gram, window_push_
from rmtkernels.reference import window_gram_ref, window_push_ref_
from tests.helpers import LAYOUTS, State, empty_state, normal, rows_in_layout, same_bits, same_state

pytestmark = pytest.mark.gpu

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
TYPES = [FLOAT, BFLOAT, HALF]
LIMIT = 1e-6  # of the norms of the rows


def by_backend(operator: str, *names: str) -> pytest.MarkDecorator:
    """A test for each backend that the operator has here."""
    available = {name: dispatch.backends(operator)[name] for name in names or ("cuda", "triton")}
    marks = [
        pytest.param(name, marks=pytest.mark.skipif(status != "available", reason=f"{operator}: {status}"))
        for name, status in available.items()
    ]
    return pytest.mark.parametrize("backend", marks)


def on_gpu(tensor: Tensor) -> Tensor:
    """A copy on the GPU, of the same strides."""
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    whole = tensor.as_strided((size,), (1,)).cuda()
    return whole.as_strided(tensor.shape, tensor.stride())


def to_gpu(state: State) -> State:
    return State(*(tensor.cuda() for tensor in state))


def assert_entries(got: Tensor, want: Tensor) -> None:
    """Gram matrices within rounding of their rows' norms; NaN in the same places."""
    size = want.double().diagonal(dim1=-2, dim2=-1).nan_to_num().sqrt()
    assert torch.equal(got.isnan(), want.isnan())
    error = (got.double() - want.double()).abs().nan_to_num() - LIMIT * size[..., :, None] * size[..., None, :]
    assert error.numel() == 0 or error.max() <= 1e-30
    assert same_bits(got, got.mT)


def assert_windows(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[1].cpu(), want[1].cpu())
    assert_entries(got[0].cpu(), want[0].cpu())


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(map(same_bits, a, b))


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_backend("window_push_")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 2, 5, 33), (2, 5, 33, 520), (130, 2, 9, 1504), (1, 3, 128, 72)], ids=str
)
def test_push_agrees_with_the_oracle(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layers, batch, window, dim = shape
    want = empty_state(layers, batch, window, dim, dtype)
    got = to_gpu(want)
    for step in range(min(window, 9) + 2):
        rows = [normal(batch, 2, dim, seed=100 * step + layer, dtype=dtype) for layer in range(layers)]
        if step == 3:
            rows[-1][0, 1, -1] = torch.nan
        mask = None if step % 3 else normal(batch, 2, seed=step) > -1
        window_push_ref_(*want, rows, mask)
        window_push_(*got, [row.cuda() for row in rows], None if mask is None else mask.cuda(), backend=backend)
        assert same_bits(got.ring.cpu(), want.ring) and same_bits(got.seen.cpu(), want.seen)
        assert_entries(got.gram.cpu(), want.gram)


def pushed_thrice(state: State, rows: list[Tensor], backend: str) -> State:
    state = State(*(tensor.clone() for tensor in state))
    for scale in (1.0, 0.5, 2.0):
        window_push_(*state, [row * scale for row in rows], backend=backend)
    return state


@by_backend("window_push_")
def test_push_has_the_same_bits_in_any_run_and_company(backend: str) -> None:
    rows = [normal(5, 4096, seed=layer, dtype=BFLOAT).cuda() for layer in range(8)]
    empty = to_gpu(empty_state(8, 5, 32, 4096, BFLOAT))
    want = pushed_thrice(empty, rows, backend)
    assert all(same_state(pushed_thrice(empty, rows, backend), want) for _ in range(20))
    for b in range(5):
        alone = pushed_thrice(empty.of_sequence(b), [row[b : b + 1] for row in rows], backend)
        assert same_state(alone, want.of_sequence(b))


@by_backend("window_push_", "cuda")
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_push_takes_any_strides_without_changing_a_bit(backend: str, layout: str, dtype: torch.dtype) -> None:
    rows = rows_in_layout(layout, 3, 1 if layout == "flat" else 4, 40, 7, dtype, 1.0)
    states = [to_gpu(empty_state(1, 3, 5, 40, dtype)) for _ in range(2)]
    for state, tensor in zip(states, (on_gpu(rows), rows.contiguous().cuda()), strict=True):
        window_push_(*state, [tensor], backend=backend)
    assert same_state(*states)


@by_backend("window_push_")
def test_push_neither_waits_nor_allocates_and_can_be_captured(backend: str) -> None:
    rows = [normal(2, 256, seed=layer).cuda() for layer in range(3)]
    state = to_gpu(empty_state(3, 2, 4, 256))
    window_push_(*state, rows, backend=backend)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    with waiting_forbidden():
        window_push_(*state, rows, backend=backend)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    want = State(*(tensor.clone() for tensor in state))
    for _ in range(3):
        window_push_(*want, rows, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        window_push_(*state, rows, backend=backend)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert same_state(state, want)


@by_backend("window_push_")
@pytest.mark.parametrize(
    ("error", "change"),
    [
        (rmtkernels.DeviceError, lambda a: {"rows": [row.cpu() for row in a["rows"]]}),
        (rmtkernels.DeviceError, lambda a: {"seen": a["seen"].cpu()}),
        (rmtkernels.DeviceError, lambda a: {"mask": torch.ones(3, dtype=torch.bool)}),
        (rmtkernels.ShapeError, lambda a: {"gram": a["gram"].mT}),
        (rmtkernels.ShapeError, lambda a: {"rows": a["rows"][:1]}),
        (rmtkernels.DtypeError, lambda a: {"rows": [row.half() for row in a["rows"]]}),
        (rmtkernels.BackendError, lambda a: {"backend": "cpu"}),
    ],
)
def test_push_refuses_and_keeps_the_state(
    backend: str, error: type[Exception], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    state, rows = to_gpu(empty_state(2, 3, 4, 9)), [normal(3, 9).cuda() for _ in range(2)]
    window_push_(*state, rows, backend=backend)
    before = State(*(tensor.clone() for tensor in state))
    good = {**state._asdict(), "rows": rows, "backend": backend}
    with pytest.raises(error):
        window_push_(**{**good, **change(good)})
    assert same_state(state, before)


# batch, steps, dim, window, stride
SHAPES = [
    (1, 1, 1, 1, 1), (2, 5, 7, 2, 1), (3, 67, 19, 31, 3), (2, 300, 67, 32, 7), (2, 66, 33, 33, 5), (1, 135, 40, 64, 7),
    (1, 300, 24, 128, 30), (2, 20, 9, 128, 4), (1, 40, 1045, 5, 2), (4, 200, 4096, 32, 11), (1, 150, 2056, 100, 50),
]  # fmt: skip


def rows_and_mask(batch: int, steps: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows far from zero, of which some are masked and some are not finite."""
    hidden = (normal(batch, steps, dim) + 0.5).to(dtype)
    hidden[:, 2::9, dim // 2] = torch.nan
    hidden[-1:, 4::11, 0] = -torch.inf
    return hidden, (normal(steps, batch, seed=1) > -1.2).T


@by_backend("window_gram")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_agrees_with_the_oracle(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *sizes, window, stride = shape
    hidden, mask = rows_and_mask(*sizes, dtype)
    for chosen in (mask, None):
        got = window_gram(hidden.cuda(), window, stride, None if chosen is None else chosen.cuda(), backend=backend)
        assert_windows(got, window_gram_ref(hidden, window, stride, chosen, dtype=torch.float64))


@by_backend("window_gram")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gram_is_exact_on_integers_for_every_window(backend: str, dtype: torch.dtype) -> None:
    hidden = torch.randint(-5, 6, (2, 390, 530), generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = hidden.double()
    for window in (*range(1, 20), 31, 32, 33, 48, 63, 64, 65, 96, 127, 128):
        gram, _ = window_gram(hidden.cuda(), window, 130, backend=backend)
        for w, end in enumerate((130, 260, 390)):
            slots = torch.arange(end - window, end) % window
            rows = torch.empty(2, window, 530, dtype=torch.float64)
            rows[:, slots] = exact[:, end - window : end]
            assert torch.equal(gram[:, w].cpu().double(), rows @ rows.mT), window


@by_backend("window_gram")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gram_of_a_long_sequence_is_that_of_the_cpu(backend: str, dtype: torch.dtype) -> None:
    hidden = (normal(2, 5000, 256) + 1).to(dtype)
    mask = normal(2, 5000, seed=4) > -1
    assert_windows(
        window_gram(hidden.cuda(), 32, 3, mask.cuda(), backend=backend), window_gram(hidden, 32, 3, mask, backend="cpu")
    )


@by_backend("window_gram")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gram_has_the_same_bits_in_any_run_and_company(backend: str, dtype: torch.dtype) -> None:
    hidden = normal(4, 700, 1100, dtype=dtype).cuda()
    gram, seen = window_gram(hidden, 40, 5, backend=backend)
    assert all(same(window_gram(hidden, 40, 5, backend=backend), (gram, seen)) for _ in range(10))
    for b in range(4):
        alone = window_gram(hidden[b : b + 1], 40, 5, backend=backend)
        assert same(alone, (gram[b : b + 1], seen[b : b + 1]))


@by_backend("window_gram")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gram_of_skipped_rows_is_that_of_rows_that_never_came(backend: str, dtype: torch.dtype) -> None:
    hidden, keep = normal(1, 9000, 40, dtype=dtype).cuda(), (normal(1, 9000, seed=3) > 0).cuda()
    want = window_gram(hidden[keep][None], 40, backend=backend)
    hidden[~keep] = torch.nan
    for mask in (keep, None):
        gram, seen = window_gram(hidden, 40, 1, mask, backend=backend)
        assert same((gram[keep][None], seen[keep][None]), want)


@by_backend("window_gram", "cuda")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:-1])
def test_gram_takes_any_strides_without_changing_a_bit(backend: str, layout: str, dtype: torch.dtype) -> None:
    for dim in (64, 53):
        hidden = rows_in_layout(layout, 2, 150, dim, 3, dtype, 1.0)
        got = window_gram(on_gpu(hidden), 20, 10, backend=backend)
        assert same(got, window_gram(hidden.contiguous().cuda(), 20, 10, backend=backend))


@by_backend("window_gram", "cuda")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gram_of_equal_rows_has_equal_entries(backend: str, dtype: torch.dtype) -> None:
    gram, _ = window_gram(normal(1, 1, 1100, dtype=dtype).expand(1, 300, 1100).cuda(), 100, 300, backend=backend)
    assert (gram == gram[0, 0, 0, 0]).all()


@by_backend("window_gram", "cuda")
@pytest.mark.parametrize("dim", [50, 523])
def test_gram_takes_the_rows_that_push_takes(backend: str, dim: int) -> None:
    """Also where a norm just fits float32. What was taken has finite entries, in whatever order they are summed."""
    size = torch.finfo(FLOAT).max ** 0.5
    scale = size / dim**0.5 * (1 + 2e-8 * torch.arange(-40, 40, dtype=torch.float64))
    hidden = scale[None, :, None].expand(1, 80, dim).float().cuda()
    gram, seen = window_gram(hidden, 80, 80, backend=backend)
    state = to_gpu(empty_state(1, 1, 80, dim))
    window_push_(*state, [hidden], backend=backend)
    assert 0 < seen[0, 0] < 80 and torch.equal(seen[0], state.seen[:, 0])
    assert gram.isfinite().all()


@by_backend("window_gram")
def test_gram_reads_beyond_32_bits(backend: str) -> None:
    """More elements than 2^31 in the sequence, of which the last rows count."""
    steps, dim = (1 << 31) // 4096 + 300, 4096
    hidden = torch.zeros(1, steps, dim, dtype=BFLOAT, device="cuda")
    tail = torch.randn(1, 200, dim, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(BFLOAT)
    hidden[:, -200:] = tail
    mask = torch.zeros(1, steps, dtype=torch.bool, device="cuda")
    mask[:, -200:] = True
    gram, seen = window_gram(hidden, 32, steps, mask, backend=backend)
    assert same((gram, seen), window_gram(tail, 32, 200, backend=backend))


@by_backend("window_gram")
def test_gram_writes_beyond_32_bits(backend: str) -> None:
    """More entries than 2^31 in the windows."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("takes 10 GB of the GPU's memory")
    hidden = normal(1, (1 << 31) // 128**2 + 500, 8, dtype=BFLOAT).cuda()
    gram, seen = window_gram(hidden, 128, backend=backend)
    assert seen[0, -1] == hidden.shape[1]
    last, _ = window_gram(hidden, 128, hidden.shape[1], backend=backend)
    assert same_bits(gram[:, -1:], last)


@by_backend("window_gram")
def test_gram_does_not_wait_and_can_be_captured(backend: str) -> None:
    for dtype in TYPES:
        hidden, keep = normal(2, 300, 520, dtype=dtype).cuda(), (normal(2, 300, seed=1) > 0).cuda()
        want = window_gram(hidden, 32, 3, keep, backend=backend)
        with waiting_forbidden():
            got = window_gram(hidden, 32, 3, keep, backend=backend)
        assert same(got, want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = window_gram(hidden, 32, 3, keep, backend=backend)
        hidden.mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, window_gram(hidden, 32, 3, keep, backend=backend))


@by_backend("window_gram")
def test_gram_runs_on_the_current_stream(backend: str) -> None:
    hidden = normal(2, 300, 520).cuda()
    want, late = window_gram(hidden, 32, backend=backend), torch.zeros_like(hidden)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # another stream would read zeros meanwhile
        late.copy_(hidden)
        got = window_gram(late, 32, backend=backend)
        torch.cuda.current_stream().synchronize()
    assert same(got, want)


@by_backend("window_gram")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gram_runs_on_the_device_of_its_rows(backend: str) -> None:
    hidden = normal(2, 300, 520)
    other = window_gram(hidden.to("cuda:1"), 32, backend=backend)
    assert other[0].device.index == 1
    assert_windows(other, window_gram(hidden, 32, backend="cpu"))


@by_backend("window_gram")
@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (rmtkernels.ShapeError, {"window": 129}),
        (rmtkernels.ShapeError, {"stride": 0}),
        (rmtkernels.DeviceError, {"mask": torch.ones(2, 5, dtype=torch.bool)}),
        (rmtkernels.DtypeError, {"hidden": torch.zeros(2, 5, 4, dtype=torch.float64)}),
        (rmtkernels.BackendError, {"backend": "cpu"}),
    ],
)
def test_gram_refuses(backend: str, error: type[Exception], changes: dict[str, Any]) -> None:
    good = {"hidden": normal(2, 5, 4).cuda(), "window": 3, "stride": 1, "backend": backend}
    with pytest.raises(error):
        window_gram(**{**good, **changes})


@by_backend("window_gram", "cuda")
def test_a_mask_on_the_host_is_refused_by_the_kernel_too(backend: str) -> None:
    with pytest.raises(RuntimeError, match="mask must be"):
        torch.ops.rmtkernels.window_gram(normal(2, 5, 4).cuda(), 3, 1, torch.ones(2, 5, dtype=torch.bool))


@by_backend("window_gram", "cuda")
def test_gram_passes_the_operator_checks(backend: str) -> None:
    hidden, mask = normal(2, 30, 9, dtype=BFLOAT).cuda(), (normal(2, 30, seed=1) > 0).cuda()
    torch.library.opcheck(torch.ops.rmtkernels.window_gram.default, (hidden, 4, 3, mask))


@by_backend("window_gram")
def test_gram_compiles_without_a_graph_break(backend: str) -> None:
    hidden = normal(2, 30, 9).cuda()

    def doubled(rows: Tensor) -> tuple[Tensor, Tensor]:
        return window_gram(rows * 2, 4, 3, backend=backend)

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    assert same(compiled(hidden), doubled(hidden))
