"""The Triton kernels on a GPU: against the oracles, bit for bit with themselves, and as the decode path needs them."""

import itertools
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import rmtkernels
from rmtkernels import (
    covariance_update_,
    dispatch,
    lanczos_eigh,
    lowrank_linear,
    spectrum_descriptors,
    spectrum_descriptors_,
    spectrum_eigvalsh,
    window_gram,
    window_push_,
)
from rmtkernels.reference import lanczos_orthonormalize_ref, lowrank_linear_ref
from rmtkernels.reference.covariance import covariance_update_ref_
from rmtkernels.reference.sliding_window import window_gram_ref, window_push_ref_
from rmtkernels.triton import INTERPRETED
from tests.gpu.test_lanczos import check_orthonormal, orthonormalize_arguments
from tests.helpers import State, empty_covariance, empty_state, gram_of, normal, same_bits, same_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or dispatch.backends("lowrank_linear")["triton"] != "available", reason="no GPU or no Triton"
    ),
]

FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
PAIRS = [(FLOAT, FLOAT), (FLOAT, BFLOAT), (BFLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF)]
ROUNDING = {FLOAT: 2.0**-24, BFLOAT: 2.0**-8, HALF: 2.0**-11}


def layer(rows: int, d_in: int, k: int, d_out: int, dtype: torch.dtype, weights: torch.dtype) -> list[Tensor]:
    x = normal(rows, d_in, seed=1, dtype=dtype)
    down, up = normal(k, d_in, seed=2) / max(d_in, 1) ** 0.5, normal(d_out, k, seed=3) / max(k, 1) ** 0.5
    return [t.cuda() for t in (x, down.to(weights), up.to(weights), normal(d_out, seed=4, dtype=weights))]


def assert_product(y: Tensor, arguments: list[Tensor]) -> None:
    x, down, up, _ = arguments
    exact, size = lowrank_linear_ref(*arguments), lowrank_linear_ref(*(t.abs() for t in arguments))
    between = ROUNDING[x.dtype if x.dtype == down.dtype else FLOAT]
    hidden = (x.double() @ down.double().T).abs() @ up.double().abs().T
    bound = between * hidden + (sum(down.shape) / 8 + 40) * 2.0**-24 * size + 1.01 * ROUNDING[x.dtype] * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("types", PAIRS, ids=str)
@pytest.mark.parametrize(
    "shape", [(300, 1024, 200, 1100), (1, 600, 137, 2100), (131, 263, 16, 31), (2, 0, 3, 4), (2, 5, 0, 4)], ids=str
)
def test_lowrank_linear_agrees_with_the_oracle(shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype]) -> None:
    arguments = layer(*shape, *types)
    y = lowrank_linear(*arguments, backend="triton")
    assert_product(y, arguments)
    assert same_bits(y, lowrank_linear(*arguments, backend="triton"))
    x, *weights = arguments
    assert same_bits(lowrank_linear(x[-1:], *weights, backend="triton"), y[-1:])


@pytest.mark.parametrize(("k", "dtype"), [(33, BFLOAT), (64, HALF), (512, BFLOAT), (64, FLOAT), (256, FLOAT)])
def test_lowrank_linear_of_every_rank(k: int, dtype: torch.dtype) -> None:
    arguments = layer(150, 520, k, 330, dtype, dtype)
    assert_product(lowrank_linear(*arguments, backend="triton"), arguments)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_lowrank_linear_gradients(dtype: torch.dtype) -> None:
    arguments = [t.requires_grad_() for t in layer(300, 520, 100, 330, dtype, dtype)]
    exact = [t.detach().double().requires_grad_() for t in arguments]
    lowrank_linear(*arguments, backend="triton").float().square().sum().backward()
    functional.linear(functional.linear(exact[0], exact[1]), exact[2], exact[3]).square().sum().backward()
    for got, want in zip(arguments, exact, strict=True):
        assert got.grad is not None and want.grad is not None and got.grad.dtype == dtype
        error = (got.grad.double() - want.grad).norm() / want.grad.norm()
        assert error <= (2e-6 if dtype == FLOAT else 8e-3)


def test_lowrank_linear_offsets_take_64_bits() -> None:
    rows, d_in = 2**20 + 1, 2**11
    x = torch.zeros(rows, d_in, dtype=BFLOAT, device="cuda")
    x[-1] = 1
    down, up = torch.ones(16, d_in, dtype=BFLOAT, device="cuda"), torch.ones(3, 16, dtype=BFLOAT, device="cuda")
    y = lowrank_linear(x, down, up, backend="triton")
    assert (y[-1] == 16 * d_in).all() and not y[:-1].any()


def test_lowrank_linear_takes_the_kernel_by_itself_where_it_is_faster() -> None:
    limits = sys.modules["rmtkernels.ops.lowrank_linear"]
    arguments = layer(limits.MIN_ROWS_TRITON, 256, limits.MAX_RANK_TRITON, 128, BFLOAT, BFLOAT)
    with torch.no_grad():
        assert same_bits(lowrank_linear(*arguments), lowrank_linear(*arguments, backend="triton"))
    assert lowrank_linear(arguments[0].requires_grad_(), *arguments[1:]).grad_fn is not None


def lapack(matrices: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.eigvalsh(matrices.double().numpy()))


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
def test_eigenvalues_of_every_size(dtype: torch.dtype) -> None:
    for n in range(1, 65):
        full, thin = normal(3, n, n, seed=n, dtype=DOUBLE), normal(3, n, max(1, n // 3), seed=n, dtype=DOUBLE)
        matrices = torch.cat([full + full.mT, thin @ thin.mT]).to(dtype)
        values, exact = spectrum_eigvalsh(matrices.cuda(), backend="triton").cpu(), lapack(matrices)
        bound = 2e-15 * exact.abs().amax(-1, keepdim=True) * n**0.5
        bound = bound + 2.0**-24 * exact.abs() if dtype == FLOAT else bound
        assert (values.diff(dim=-1) >= 0).all()
        assert ((values.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("order", [1, -1])
def test_small_eigenvalues_of_a_graded_matrix_keep_their_digits(order: int) -> None:
    decades = torch.arange(60, dtype=DOUBLE) / 59 * 6
    scale = 10.0 ** -(decades if order == 1 else decades.flip(0))
    x = normal(60, 60, dtype=DOUBLE)
    matrix = scale[:, None] * (torch.eye(60, dtype=DOUBLE) + (x + x.T) / 2000) * scale
    want = spectrum_eigvalsh(matrix)
    assert ((spectrum_eigvalsh(matrix.cuda(), backend="triton").cpu() - want).abs() <= 1e-11 * want).all()


def test_a_bad_entry_spoils_its_matrix_alone_and_bits_do_not_depend_on_the_company() -> None:
    matrices = normal(40, 33, 33, dtype=DOUBLE).cuda()
    values = spectrum_eigvalsh(matrices, backend="triton")
    for i in (0, 7, 39):
        assert same_bits(spectrum_eigvalsh(matrices[i], backend="triton"), values[i])
    matrices[3, 9, 2] = torch.nan
    spoilt = spectrum_eigvalsh(matrices, backend="triton")
    assert spoilt[3].isnan().all() and same_bits(spoilt[4:], values[4:]) and same_bits(spoilt[:3], values[:3])


@pytest.mark.parametrize("dim", [3, 200, 4096])
@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 33, 64])
def test_descriptors_are_those_of_the_cpu(window: int, dim: int) -> None:
    rows = normal(3, 4, window, min(dim, 300), dtype=DOUBLE) + 2 * normal(3, 4, window, 1, seed=9, dtype=DOUBLE)
    gram, _ = gram_of(rows * torch.tensor([1.0, 0.1, 30.0], dtype=DOUBLE)[:, None, None, None])
    seen = torch.tensor([window, max(1, window - 2), 0, 10**6 + 1])
    for center, joint, normalize, noise in itertools.product(
        (True, False), (None, "none", "trace"), (None, "rms"), ("median", "trace")
    ):
        options = {"center": center, "joint": joint, "normalize": normalize, "noise": noise}
        got = [x.cpu() for x in spectrum_descriptors(gram.cuda(), seen.cuda(), dim, backend="triton", **options)]
        want = spectrum_descriptors(gram, seen, dim, **options)
        assert ((got[1].double() - want[1]).abs() <= 1e-7 * want[1] + 1e-13 * want[1][..., :1].double()).all()
        torch.testing.assert_close(got[0], want[0], rtol=3e-7, atol=3e-7)


def test_descriptors_have_the_same_bits_in_any_run_and_company_do_not_wait_and_can_be_captured() -> None:
    gram = gram_of(normal(4, 33, 64, 100))[0].cuda()
    seen = torch.randint(0, 90, (33,), generator=torch.Generator().manual_seed(0)).cuda()
    want = spectrum_descriptors(gram, seen, 100, backend="triton")
    out = tuple(torch.full_like(x, torch.nan) for x in want)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [spectrum_descriptors(gram, seen, 100, backend="triton") for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same_bits(got, right) for run in runs for got, right in zip(run, want, strict=True))
    for layer, b in itertools.product(range(4), range(0, 33, 8)):
        part = gram[layer : layer + 1, b : b + 1].contiguous()
        alone = spectrum_descriptors(part, seen[b : b + 1], 100, backend="triton")
        assert all(same_bits(a[0, 0], w[layer, b]) for a, w in zip(alone, want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        spectrum_descriptors_(*out, gram, seen, 100, backend="triton")
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(same_bits, out, want))


def assert_same(got: State, want: State) -> None:
    assert same_bits(got.ring.cpu(), want.ring) and same_bits(got.seen.cpu(), want.seen)
    unused, gram = want.gram.isnan(), got.gram.cpu()
    assert (gram.isnan() == unused).all()
    norms = want.gram.diagonal(dim1=-2, dim2=-1).nan_to_num().sqrt()
    bound = 2.0**-21 * norms[..., None] * norms[..., None, :]
    assert ((gram - want.gram).abs() <= bound).logical_or(unused).all()


def on_gpu(state: State) -> State:
    return State(*(tensor.cuda() for tensor in state))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF])
@pytest.mark.parametrize(("layers", "batch", "window", "dim"), [(1, 1, 1, 1), (3, 2, 5, 33), (70, 2, 9, 1504)])
def test_window_push_agrees_with_the_oracle(layers: int, batch: int, window: int, dim: int, dtype: torch.dtype) -> None:
    want = empty_state(layers, batch, window, dim, dtype)
    got = on_gpu(want)
    for step in range(window + 2):
        shape = (batch, 2, dim) if step % 2 else (batch, dim)
        rows = [normal(*shape, seed=100 * step + layer, dtype=dtype) for layer in range(layers)]
        if step == 3:
            rows[-1][0, ..., -1] = torch.nan
        mask = None if step % 3 else normal(*shape[:-1], seed=step) > -1
        window_push_ref_(*want, rows, mask)
        cuda_rows = [row.cuda() if i % 3 else row.cuda().mT.contiguous().mT for i, row in enumerate(rows)]
        window_push_(*got, cuda_rows, None if mask is None else mask.cuda(), backend="triton")
        assert_same(got, want)


def pushed_thrice(state: State, rows: list[Tensor]) -> State:
    state = state.copy()
    for scale in (1.0, 0.5, 2.0):
        window_push_(*state, [row * scale for row in rows], backend="triton")
    return state


def test_window_push_has_the_same_bits_in_any_run_and_company() -> None:
    rows = [normal(5, 4096, seed=layer, dtype=BFLOAT).cuda() for layer in range(8)]
    empty = on_gpu(empty_state(8, 5, 32, 4096, BFLOAT))
    want = pushed_thrice(empty, rows)
    assert all(same_state(pushed_thrice(empty, rows), want) for _ in range(20))
    for b in range(5):
        alone = pushed_thrice(empty.of_sequence(b), [row[b : b + 1] for row in rows])
        assert same_state(alone, want.of_sequence(b))


def neither_waits_nor_allocates(call: Callable[[], object]) -> None:
    call()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated


def test_window_push_neither_waits_nor_allocates_and_can_be_captured() -> None:
    rows = [normal(2, 256, seed=layer).cuda() for layer in range(3)]
    state = on_gpu(empty_state(3, 2, 4, 256))
    neither_waits_nor_allocates(lambda: window_push_(*state, rows, backend="triton"))
    want = state.copy()
    for _ in range(3):
        window_push_(*want, rows, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        window_push_(*state, rows, backend="triton")
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert same_state(state, want)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF])
@pytest.mark.parametrize(
    ("batch", "steps", "dim", "window", "stride"), [(1, 1, 1, 1, 1), (2, 75, 1504, 33, 2), (3, 140, 70, 128, 5)]
)
def test_window_gram_agrees_with_the_oracle(
    batch: int, steps: int, dim: int, window: int, stride: int, dtype: torch.dtype
) -> None:
    hidden, mask = normal(batch, steps, dim, dtype=dtype), normal(batch, steps, seed=1) > -1.5
    hidden[-1, steps // 2, -1] = torch.inf
    gram, seen = window_gram(hidden.cuda(), window, stride, mask.cuda(), backend="triton")
    want, want_seen = window_gram_ref(hidden, window, stride, mask, dtype=DOUBLE)
    norms = want.diagonal(dim1=-2, dim2=-1).sqrt()
    assert torch.equal(seen.cpu(), want_seen)
    assert ((gram.cpu() - want).abs() <= 2.0**-21 * norms[..., None] * norms[..., None, :]).all()


def test_window_gram_has_the_same_bits_in_any_run_and_company_and_does_not_wait() -> None:
    hidden = normal(4, 300, 1024, dtype=BFLOAT).cuda()
    want = window_gram(hidden, 32, 4, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [window_gram(hidden, 32, 4, backend="triton") for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same_bits(got, right) for run in runs for got, right in zip(run, want, strict=True))
    for b in range(4):
        alone = window_gram(hidden[b : b + 1], 32, 4, backend="triton")
        assert all(same_bits(got, right[b : b + 1]) for got, right in zip(alone, want, strict=True))


@pytest.mark.parametrize(("state", "dtype"), [(FLOAT, FLOAT), (FLOAT, BFLOAT), (DOUBLE, DOUBLE)])
def test_covariance_update_agrees_with_the_oracle(state: torch.dtype, dtype: torch.dtype) -> None:
    empty = empty_covariance(200, state)
    got, want = [t.cuda() for t in empty], [empty.mean.clone(), empty.scatter.double(), empty.totals.clone()]
    for step, rows in enumerate((5, 1000, 3)):
        batch = (normal(rows, 200, seed=step, dtype=DOUBLE) + 3).to(dtype)
        batch[0, 7] = torch.nan
        weights = normal(rows, seed=9 + step).abs()
        covariance_update_(*got, batch.cuda(), weights.cuda(), decay=0.9, backend="triton")
        covariance_update_ref_(*want, batch, weights, decay=0.9)
    size = want[1].diagonal().sqrt()
    error = ((got[1].cpu().double() - want[1]).abs() / (size[:, None] * size)).tril()
    assert error.max() <= (1e-6 if state == FLOAT else 1e-13)
    assert (got[1].cpu().triu(1) == empty.scatter.triu(1)).all()
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[2].cpu(), want[2], rtol=1e-12, atol=0)


def test_covariance_update_does_not_wait() -> None:
    state, batch = [t.cuda() for t in empty_covariance(64)], normal(300, 64).cuda()
    covariance_update_(*state, batch, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        covariance_update_(*state, batch, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
@pytest.mark.parametrize(
    "shape", [(1, 0, 1), (8, 0, 64), (20, 9, 4096), (8, 448, 4096), (3, 2047, 2048), (208, 5, 300)]
)
def test_lanczos_orthonormalize_matches_the_oracle(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    arguments = orthonormalize_arguments(*shape, dtype)
    operator = torch.ops.rmtkernels.lanczos_orthonormalize_triton
    got = operator(*arguments)
    check_orthonormal(arguments, *got)
    if shape[0] < shape[2] - shape[1]:
        eps = torch.finfo(dtype).eps
        for one, other in zip(got, lanczos_orthonormalize_ref(*arguments[:2]), strict=True):
            assert (one - other).abs().max() <= 3000 * eps * max(1.0, float(other.abs().max())) if one.numel() else True
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = operator(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(same_bits, got, again))


def test_lanczos_orthonormalize_replaces_rows_that_depend_on_others() -> None:
    for dtype in (FLOAT, DOUBLE):
        arguments = orthonormalize_arguments(8, 100, 3000, dtype)
        rows, basis = arguments[:2]
        rows[3], rows[5], rows[6] = rows[1], 0, basis[:8].sum(0)
        unit, triangle, products = torch.ops.rmtkernels.lanczos_orthonormalize_triton(*arguments)
        check_orthonormal(arguments, unit, triangle, products)
        assert (triangle.diagonal()[[3, 5, 6]] <= arguments[3]).all()


def test_a_lanczos_search_by_triton() -> None:
    vectors = torch.linalg.qr(normal(700, 700, dtype=DOUBLE))[0]
    exact = torch.arange(1, 701, dtype=DOUBLE) ** -0.5
    matrix = (vectors * exact @ vectors.mT).cuda()
    found = lanczos_eigh(((matrix + matrix.mT) / 2), 20, backend="triton")
    assert found.complete and ((found.eigenvalues.cpu() - exact[:20]).abs() <= 1e-10).all()


def test_runs_on_the_current_stream() -> None:
    matrices = normal(64, 32, 32).cuda()
    want, late = spectrum_eigvalsh(matrices, backend="triton"), torch.zeros_like(matrices)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # another stream would read zeros meanwhile
        late.copy_(matrices)
        got = spectrum_eigvalsh(late, backend="triton")
        torch.cuda.current_stream().synchronize()
    assert same_bits(got, want)


def test_tensors_of_another_device_are_refused() -> None:
    x, down, up, bias = layer(3, 8, 4, 5, FLOAT, FLOAT)
    with pytest.raises(rmtkernels.DeviceError):
        lowrank_linear(x, down.cpu(), up, bias, backend="triton")
    with pytest.raises(rmtkernels.BackendError, match="the tensors are on 'cpu'"):
        spectrum_eigvalsh(torch.eye(3), backend="triton")
    state = on_gpu(empty_state(1, 1, 2, 4))
    with pytest.raises(rmtkernels.DeviceError):
        window_push_(*state, [torch.zeros(1, 4)], backend="triton")


def test_compiles_without_a_graph_break() -> None:
    arguments = layer(300, 64, 20, 40, BFLOAT, BFLOAT)
    matrices = normal(4, 16, 16).cuda()

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return lowrank_linear(*tensors[:4], backend="triton"), spectrum_eigvalsh(tensors[4], backend="triton")

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert all(map(same_bits, compiled(*arguments, matrices), both(*arguments, matrices)))
    rows = torch.empty(2**16, 64, dtype=BFLOAT, device="cuda")  # the automatic choice is traced, too
    automatic = torch.compile(lambda x: lowrank_linear(x, *arguments[1:]), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert automatic(rows).shape == (2**16, 40)


def test_without_the_cuda_library_triton_is_the_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for operator in ("spectrum_eigvalsh", "spectrum_descriptors_", "window_push_", "window_gram", "lanczos_multiply"):
        monkeypatch.setitem(dispatch._available, (operator, "cuda"), "not built")
        assert dispatch.select(operator, torch.device("cuda")) == "triton"
    matrices = normal(4, 16, 16).cuda()
    assert same_bits(spectrum_eigvalsh(matrices), spectrum_eigvalsh(matrices, backend="triton"))
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(RuntimeWarning, match="takes N up to 64"):
        spectrum_eigvalsh(normal(2, 65, 65).cuda())
    with pytest.warns(RuntimeWarning, match="takes N up to 64"):
        spectrum_descriptors(torch.eye(65).cuda()[None, None], torch.tensor([65]).cuda(), 100)
