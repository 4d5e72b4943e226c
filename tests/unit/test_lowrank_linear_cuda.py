"""lowrank_linear on CUDA: when the kernel runs (on fake tensors, without a GPU), and on a GPU what it computes."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rmtkernels import BackendError, _native, dispatch, lowrank_linear
from rmtkernels.reference import lowrank_linear_ref
from tests.helpers import normal, same_bits

LIMITS = sys.modules["rmtkernels.ops.lowrank_linear"]
kernel = torch.ops.rmtkernels.lowrank_linear
FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
PAIRS = [(FLOAT, FLOAT), (FLOAT, BFLOAT), (BFLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF)]


class Kernel(TorchDispatchMode):
    """Remembers whether the kernel ran."""

    ran = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.ran |= function is kernel.default
        return function(*arguments, **(options or {}))


def runs_the_kernel(*arguments: Any, backend: str | None = None) -> bool:
    with Kernel() as watched:
        y = lowrank_linear(*arguments, backend=backend)
    assert y.device.type == "cuda" and y.shape == (*arguments[0].shape[:-1], arguments[2].shape[0])
    return watched.ran


def tensors(rows: int, dtype: torch.dtype, weights: torch.dtype, k: int = 24, **options: Any) -> list[Tensor]:
    return [
        torch.empty(rows, 2048, dtype=dtype, device="cuda"),
        *(torch.empty(*shape, dtype=weights, device="cuda", **options) for shape in ((k, 2048), (2048, k), (2048,))),
    ]


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake CUDA tensors, and a dispatcher that believes in the kernel."""
    monkeypatch.setitem(dispatch._available, ("lowrank_linear", "cuda"), "available")
    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.mark.usefixtures("pretended_gpu")
def test_the_kernel_runs_up_to_its_limits() -> None:
    for types in PAIRS[:3]:
        assert runs_the_kernel(*tensors(LIMITS.MAX_ROWS_CUDA, *types))
        assert not runs_the_kernel(*tensors(LIMITS.MAX_ROWS_CUDA + 1, *types))
    rows, most_k = LIMITS.MAX_ROWS_CUDA_HALF, LIMITS.MAX_WEIGHTS_CUDA_HALF // 4096
    for types in PAIRS[3:]:
        assert runs_the_kernel(*tensors(rows, *types, k=most_k + 1))
        assert not runs_the_kernel(*tensors(rows + 1, *types, k=most_k + 1))
        assert runs_the_kernel(*tensors(2 * rows, *types, k=most_k))
        assert not runs_the_kernel(*tensors(2 * rows + 1, *types, k=most_k))
    assert not runs_the_kernel(*tensors(1, DOUBLE, DOUBLE))


@pytest.mark.usefixtures("pretended_gpu")
def test_the_kernel_does_not_run_where_a_derivative_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Autograd aborts on fake CUDA tensors where torch has no CUDA: a stand-in records nothing.
    monkeypatch.setattr(LIMITS, "_two_products", lambda x, down, up, bias: x.new_empty(len(x), len(up)))
    arguments = tensors(1, FLOAT, FLOAT, requires_grad=True)
    assert runs_the_kernel(*arguments)
    with torch.enable_grad():
        assert not runs_the_kernel(*arguments)
        assert not runs_the_kernel(*arguments, backend="cuda")


@pytest.mark.usefixtures("pretended_gpu")
def test_an_explicit_choice_does_not_fall_back() -> None:
    assert runs_the_kernel(*tensors(500, BFLOAT, BFLOAT), backend="cuda")
    with dispatch.use_backend("cuda"):
        assert runs_the_kernel(*tensors(500, FLOAT, FLOAT))
        with pytest.raises(BackendError, match="float64"):
            lowrank_linear(*tensors(1, DOUBLE, DOUBLE))
    with pytest.raises(BackendError, match="the tensors are on 'cuda'"):
        lowrank_linear(*tensors(1, FLOAT, FLOAT), backend="cpu")


def test_without_the_kernel_cuda_tensors_get_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._available, ("lowrank_linear", "cuda"), "not built")
    with FakeTensorMode(), torch.no_grad():
        assert not runs_the_kernel(*tensors(1, FLOAT, FLOAT))
        with pytest.raises(BackendError, match="not built"):
            lowrank_linear(*tensors(1, FLOAT, FLOAT), backend="cuda")


@pytest.mark.skipif(_native.STATUS["_C_cuda"] != "loaded", reason="the CUDA library is not built")
def test_the_kernel_is_registered() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("rmtkernels::lowrank_linear", "CUDA")


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def cuda_case(rows: int, d_in: int, k: int, d_out: int, dtype: torch.dtype, weights: torch.dtype) -> list[Tensor]:
    x = normal(rows, d_in, seed=1, dtype=dtype)
    down, up = normal(k, d_in, seed=2) / max(d_in, 1) ** 0.5, normal(d_out, k, seed=3) / max(k, 1) ** 0.5
    return [t.cuda() for t in (x, down.to(weights), up.to(weights), normal(d_out, seed=4, dtype=weights))]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("types", PAIRS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 4096, 256, 4096), (3, 600, 137, 2100), (17, 263, 100, 31), (2, 0, 3, 4), (2, 5, 0, 4), (0, 5, 3, 4)]
)
def test_gpu_agrees_with_the_oracle(shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype]) -> None:
    case = cuda_case(*shape, *types)
    y, exact = kernel(*case), lowrank_linear_ref(*case)
    size = lowrank_linear_ref(*(t.abs() for t in case))
    rounding = {FLOAT: 0.0, BFLOAT: 2.0**-8, HALF: 2.0**-11}[types[0]]
    bound = (sum(shape[1:3]) / 8 + 40) * 2.0**-24 * size
    assert ((y.double() - exact).abs() <= bound + rounding * (exact.abs() + bound)).all()
    assert same_bits(y, kernel(*case))
    if shape[0]:
        assert same_bits(y, torch.cat([kernel(row[None], *case[1:]) for row in case[0]]))


@pytest.mark.gpu
@on_gpu
def test_gpu_offsets_take_64_bits() -> None:
    """More weights than 2^31, of which the last ones count."""
    rows, k, d_out = 2, 32768, 65600
    up = torch.zeros(d_out, k, dtype=BFLOAT, device="cuda")
    up[-1] = 1
    eye = torch.ones(k, 1, dtype=BFLOAT, device="cuda")
    y = kernel(torch.ones(rows, 1, device="cuda"), eye, up)
    assert (y[:, -1] == k).all() and not y[:, :-1].any()


@pytest.mark.gpu
@on_gpu
def test_gpu_streams_and_graphs() -> None:
    case = cuda_case(4, 2048, 128, 2048, BFLOAT, BFLOAT)
    want = kernel(*case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = kernel(*case)
    stream.synchronize()
    assert same_bits(y, want)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel(*case)
    case[0].mul_(2)
    case[3].mul_(2)
    graph.replay()
    assert same_bits(y, 2 * want)
