"""covariance on a GPU: against the oracle, bit for bit with itself, and without waiting for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rmtkernels
from rmtkernels import StreamingCovariance, covariance_update_
from rmtkernels.reference import covariance_update_ref_
from tests.helpers import COVARIANCE_LAYOUTS, UPPER, Covariance, normal, same_covariance, samples_in_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        rmtkernels.dispatch.backends("covariance_update_")["cuda"] != "available", reason="no CUDA device or kernel"
    ),
]

FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = [(rows, state) for rows in (FLOAT, DOUBLE, BFLOAT, HALF) for state in (FLOAT, DOUBLE)]


def empty(dim: int, dtype: torch.dtype = FLOAT) -> Covariance:
    scatter = torch.full((dim, dim), torch.nan, dtype=dtype, device="cuda")
    scatter[torch.ones_like(scatter, dtype=torch.bool).triu(1)] = UPPER
    mean = torch.full((dim,), torch.nan, dtype=DOUBLE, device="cuda")
    return Covariance(mean, scatter, torch.zeros(5, dtype=DOUBLE, device="cuda"))


def updated(state: torch.dtype, *batches: Tensor, **options: Any) -> Covariance:
    buffers = empty(batches[0].shape[1], state)
    for batch in batches:
        covariance_update_(*buffers, batch, **options, backend="cuda")
    return buffers


def oracle(*batches: Tensor, **options: Any) -> Covariance:
    state = empty(batches[0].shape[1], DOUBLE)
    for batch in batches:
        covariance_update_ref_(*state, batch, **options)
    return state


def assert_near(got: Covariance, want: Covariance, ratio: float = 1.0, limit: float = 1e-6) -> None:
    """`ratio`: how many deviations the mean is away from zero, whose own rounding counts in float64."""
    size = want.scatter.diagonal().clamp(min=0).sqrt()
    limit = limit if got.scatter.dtype is FLOAT else 1e-13 + 1e-15 * ratio
    error = (got.scatter.double() - want.scatter).tril().abs() - limit * size[:, None] * size
    assert error.max() <= 1e-30
    assert (got.scatter[torch.ones_like(got.scatter, dtype=torch.bool).triu(1)] == UPPER).all()
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-13, atol=1e-13 * float(size.max()))
    torch.testing.assert_close(got.totals, want.totals, rtol=1e-14, atol=0)


@pytest.mark.parametrize("types", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 65), (700, 129), (3000, 300), (513, 1030)], ids=str)
def test_agrees_with_the_oracle(shape: tuple[int, int], types: tuple[torch.dtype, torch.dtype]) -> None:
    rows, dim = shape
    batches = [(normal(rows, dim, seed=s) + 3 * s).to(types[0]).cuda() for s in range(3)]
    if rows > 1:
        batches[1][rows // 2, dim // 2] = torch.nan
    options = {"weights": normal(rows, seed=9).abs().cuda(), "mask": (normal(rows, seed=8) > -1).cuda(), "decay": 0.7}
    for chosen in ({}, options) if rows > 1 else ({},):
        state = updated(types[1], *batches, **chosen)
        assert_near(state, oracle(*batches, **chosen), 5)
        assert same_covariance(state, updated(types[1], *batches, **chosen))


@pytest.mark.parametrize("types", PAIRS, ids=str)
def test_every_width_and_length_up_to_a_tile_and_beyond(types: tuple[torch.dtype, torch.dtype]) -> None:
    for dim in (*range(1, 20), 31, 33, 63, 64, 65, 127, 128, 129, 255, 257):
        half = torch.randint(-5, 6, (dim + 33, dim), generator=torch.Generator().manual_seed(dim)).to(types[0]).cuda()
        state = updated(types[1], torch.cat([half, -half]))  # the mean is 0, every product a small integer
        want = (2 * half.double().T @ half.double()).tril()
        assert torch.equal(state.scatter.double().tril(), want), dim


@pytest.mark.parametrize("layout", COVARIANCE_LAYOUTS)
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_the_layout_of_rows_does_not_change_a_bit(layout: str, dtype: torch.dtype) -> None:
    batch = samples_in_layout(layout, 150, 53, 4, dtype, 1.0, 2.0)
    on_gpu = torch.empty_strided(batch.shape, batch.stride(), dtype=dtype, device="cuda")
    if 0 not in batch.stride():
        on_gpu.copy_(batch)
    else:
        on_gpu = batch[:1].cuda().expand_as(batch) if layout == "one_row" else batch[:, :1].cuda().expand_as(batch)
    assert same_covariance(updated(FLOAT, on_gpu), updated(FLOAT, batch.contiguous().cuda()))


@pytest.mark.parametrize("types", PAIRS, ids=str)
def test_rows_that_are_skipped_leave_the_bits_of_rows_that_never_came(types: tuple[torch.dtype, torch.dtype]) -> None:
    rows = (normal(6000, 90) + 1).to(types[0]).cuda()
    keep = (normal(6000, seed=3) > 0).cuda()
    want = updated(types[1], rows[keep])
    rows[~keep] = torch.nan
    weights = torch.where(keep, 1.0, torch.nan)
    rejected = updated(types[1], rows)
    assert rejected.totals[3] == (~keep).sum()
    rejected.totals[3] = 0
    for state in (updated(types[1], rows, mask=keep), updated(types[1], rows, weights=keep.double()), rejected):
        assert same_covariance(state, want)
    assert same_covariance(updated(types[1], rows, weights=weights, mask=keep), want)


@pytest.mark.parametrize("ratio", [1e4, 1e6])
@pytest.mark.parametrize("state", [FLOAT, DOUBLE])
def test_a_mean_far_from_zero_costs_no_digits(ratio: float, state: torch.dtype) -> None:
    batches = [(normal(5000, 200, seed=s) + ratio).cuda() for s in range(2)]
    assert_near(updated(state, *batches), oracle(*batches), ratio)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_16_bit_rows_keep_the_digits_that_their_mean_has(dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps
    steps = torch.randint(0, 3, (5000, 200), generator=torch.Generator().manual_seed(0))
    batch = ((1 + steps * unit) * 2.0 ** torch.linspace(-9, 9, 200).round()).to(dtype)
    batch[:, 3] = normal(5000).to(dtype)
    batch[:, 4] = (normal(5000, seed=1) + 4).to(dtype)
    batch[7, 5] *= 100
    assert_near(updated(FLOAT, batch.cuda()), oracle(batch.cuda()), 1e3)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_a_hundred_thousand_rows_keep_the_promise_on_precision(dtype: torch.dtype) -> None:
    rows = torch.randn(100_000, 257, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(dtype)
    rows *= torch.linspace(0.01, 10, 257, device="cuda").to(dtype)
    rows += 1
    assert_near(updated(FLOAT, rows), oracle(rows), 100)
    assert_near(updated(FLOAT, *rows.split(30_000)), oracle(rows), 100, limit=1.5e-6)


def test_a_wide_state_agrees_with_float64() -> None:
    rows = torch.randn(1200, 4100, generator=torch.Generator("cuda").manual_seed(0), device="cuda") + 5
    for dtype in (FLOAT, BFLOAT):
        assert_near(updated(FLOAT, rows.to(dtype)), oracle(rows.to(dtype)), 5)


def test_offsets_take_64_bits() -> None:
    """More elements than 2^31 in the batch, of which the last rows count."""
    rows, dim = (1 << 31) // 4096 + 300, 4096
    batch = torch.zeros(rows, dim, dtype=BFLOAT, device="cuda")
    tail = torch.randn(200, dim, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(BFLOAT)
    batch[-200:] = tail
    mask = torch.zeros(rows, dtype=torch.bool, device="cuda")
    mask[-200:] = True
    assert same_covariance(updated(FLOAT, batch, mask=mask), updated(FLOAT, tail))


def test_does_not_wait_and_can_be_captured() -> None:
    for dtype, state in ((FLOAT, FLOAT), (BFLOAT, FLOAT), (DOUBLE, DOUBLE)):
        batch, keep = (normal(2000, 300) + 1).to(dtype).cuda(), (normal(2000, seed=1) > 0).cuda()
        want = updated(state, batch, batch, mask=keep, decay=0.5)
        buffers = empty(300, state)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            covariance_update_(*buffers, batch, None, keep, decay=0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            covariance_update_(*buffers, batch, None, keep, decay=0.5)
        graph.replay()
        torch.cuda.synchronize()
        assert same_covariance(buffers, want)


def test_runs_on_the_current_stream() -> None:
    batch = normal(2000, 200).cuda()
    want, late, state = updated(FLOAT, batch), torch.zeros_like(batch), empty(200)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # another stream would read zeros meanwhile
        late.copy_(batch)
        covariance_update_(*state, late)
        torch.cuda.current_stream().synchronize()
    assert same_covariance(state, want)


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (rmtkernels.DeviceError, lambda a: {"batch": a["batch"].cpu()}),
        (rmtkernels.DeviceError, lambda a: {"scatter": a["scatter"].cpu()}),
        (rmtkernels.DeviceError, lambda a: {"mask": torch.ones(20, dtype=torch.bool)}),
        (rmtkernels.ShapeError, lambda a: {"batch": a["batch"][:, 1:]}),
        (rmtkernels.ShapeError, lambda a: {"scatter": a["scatter"].T}),
        (rmtkernels.DtypeError, lambda a: {"batch": a["batch"].int()}),
        (rmtkernels.RangeError, lambda a: {"decay": 0.0}),
        (rmtkernels.BackendError, lambda a: {"backend": "cpu"}),
    ],
)
def test_refusals_raise_and_keep_the_state(
    error: type[Exception], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    good = {**updated(FLOAT, normal(20, 7).cuda())._asdict(), "batch": normal(20, 7).cuda()}
    before = Covariance(good["mean"], good["scatter"], good["totals"]).copy()
    with pytest.raises(error):
        covariance_update_(**{**good, **change(good)})
    assert same_covariance(Covariance(good["mean"], good["scatter"], good["totals"]), before)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": torch.tensor([1.0, -1, 1, 1])},
        {"batch": torch.full((4, 5), 6e18)},
        {"batch": torch.full((4, 5), torch.nan)},
    ],
)
def test_what_depends_on_the_data_is_counted_and_changes_nothing_else(change: dict[str, Tensor]) -> None:
    state = updated(FLOAT, normal(20, 5).cuda())
    before = state.copy()
    arguments = {"batch": normal(4, 5), **change}
    covariance_update_(*state, **{name: tensor.cuda() for name, tensor in arguments.items()}, decay=0.5)
    before.totals[3] += 4
    assert same_covariance(state, before)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
def test_a_stream_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    states = [StreamingCovariance(65, dtype=dtype, device=device) for device in ("cuda", "cpu")]
    parts = [StreamingCovariance(65, dtype=dtype, device="cuda") for _ in range(2)]
    for step in range(6):
        rows = normal(500, 65, seed=step, dtype=DOUBLE) + step
        states[0].update(rows.cuda())
        states[1].update(rows)
        parts[step % 2].update(rows.cuda())
    parts[0].merge(parts[1])
    want = states[1].covariance(ddof=1)
    for state in (states[0], parts[0]):
        got = state.covariance(ddof=1).cpu()
        assert torch.equal(got, got.T)
        limit = 2e-6 if dtype is FLOAT else 1e-12
        torch.testing.assert_close(got, want, rtol=limit, atol=limit)
        assert (state.rows, state.rejected, state.weight) == (3000, 0, 3000.0)
    saved = states[0].state_dict()
    again = StreamingCovariance(65, dtype=dtype, device="cuda")
    again.load_state_dict(saved)
    again.update(normal(30, 65).cuda())
    states[0].update(normal(30, 65).cuda())
    assert torch.equal(again.covariance(), states[0].covariance())


def test_operator_checks() -> None:
    batch = normal(30, 9).cuda()
    arguments = (*updated(FLOAT, batch), batch, normal(30).abs().cuda(), (normal(30, seed=1) > 0).cuda(), 0.9)
    torch.library.opcheck(torch.ops.rmtkernels.covariance_update_.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    batch = normal(30, 9).cuda()
    state, want = empty(9), updated(FLOAT, batch * 2)
    compiled = torch.compile(lambda b: covariance_update_(*state, b * 2), backend="aot_eager", fullgraph=True)
    compiled(batch)
    assert same_covariance(state, want)
