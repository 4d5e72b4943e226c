"""lanczos on CUDA, as far as it shows without a GPU: its products on CPU tensors, its steps on fake ones."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rmtkernels import BackendError, _native, dispatch, lanczos_eigh, lanczos_multiply, lanczos_multiply_gram
from rmtkernels.ops import lanczos_multiply_cuda
from rmtkernels.ops.lanczos_basis import Basis
from rmtkernels.ops.lanczos_multiply import LinearMap, column_mean, two_parts
from rmtkernels.ops.lanczos_multiply_cuda import full_float32
from rmtkernels.reference import lanczos_multiply_gram_ref, lanczos_multiply_ref
from tests.helpers import generator, normal

DOUBLE = torch.float64
ROUNDING = {torch.float32: 3e-7, DOUBLE: 1e-15}
KERNEL = torch.ops.rmtkernels.lanczos_orthonormalize.default
MATMUL = torch.backends.cuda.matmul


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("vectors", [0, 1, 8, 11])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (13, 255), (5, 256), (30, 700), (600, 2049)])
def test_products(rows: int, cols: int, vectors: int, dtype: torch.dtype) -> None:
    matrix, block = normal(rows, cols, dtype=dtype), normal(vectors, cols, seed=1, dtype=dtype)
    padded = torch.full((rows, cols + 5), torch.nan, dtype=dtype)
    padded[:, 2:-3] = matrix
    got = lanczos_multiply_cuda.multiply(padded[:, 2:-3], block)
    bound = block.double().abs() @ matrix.double().abs().mT
    assert got.shape == (vectors, rows) and got.dtype == dtype
    assert ((got - lanczos_multiply_ref(matrix, block)).abs() <= ROUNDING[dtype] * bound).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("offset", [None, 0.0, 1e4])
@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (300, 505), (1009, 17)])
def test_gram_products(
    rows: int, cols: int, chunk: int, offset: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanczos_multiply_cuda, "CHUNK", chunk)
    samples, block = normal(rows, cols, dtype=dtype) + (offset or 0.0), normal(8, cols, seed=1, dtype=dtype)
    mean = None if offset is None else column_mean(samples)
    centred = (samples.double() if mean is None else samples.double() - mean).abs()
    bound = block.double().abs() @ centred.mT @ centred
    want = lanczos_multiply_gram_ref(samples, None if mean is None else two_parts(mean, DOUBLE), block)
    got = lanczos_multiply_cuda.multiply_gram(samples, None if mean is None else two_parts(mean, dtype), block)
    slack = 1e-11 if offset == 1e4 and dtype == DOUBLE else 0.0  # float64 holds the mean itself to 1e-12
    assert ((got - want).abs() <= (2 * ROUNDING[dtype] + 2e-15 + slack) * bound + slack * rows).all()


def test_tensorfloat_is_off_inside_and_as_it_was_outside() -> None:
    assert MATMUL.fp32_precision != "tf32"
    before = MATMUL.fp32_precision
    with full_float32:
        assert MATMUL.fp32_precision == before
    assert MATMUL.fp32_precision == before
    for name, on, off in (("allow_tf32", True, False), ("fp32_precision", "tf32", before)):
        setattr(MATMUL, name, on)
        try:
            with full_float32:
                assert MATMUL.fp32_precision == "ieee"
                with full_float32:
                    assert MATMUL.fp32_precision == "ieee"
                assert MATMUL.fp32_precision == "ieee"
            assert MATMUL.fp32_precision == "tf32" and getattr(MATMUL, name) == on
        finally:
            setattr(MATMUL, name, off)


def test_tensorfloat_comes_back_when_the_last_thread_leaves() -> None:
    before, entered, leave = MATMUL.fp32_precision, threading.Event(), threading.Event()

    def other() -> None:
        with full_float32:
            entered.set()
            leave.wait()

    MATMUL.fp32_precision = "tf32"
    try:
        thread = threading.Thread(target=other)
        with full_float32:
            thread.start()
            entered.wait()
        assert MATMUL.fp32_precision == "ieee"
        leave.set()
        thread.join()
        assert MATMUL.fp32_precision == "tf32"
    finally:
        MATMUL.fp32_precision = before


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.names.append(function._schema.name)
        return function(*arguments, **(options or {}))


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake CUDA tensors, and a dispatcher that believes in the kernels. What would wait for a device raises."""
    for operator in ("lanczos_multiply", "lanczos_multiply_gram"):
        monkeypatch.setitem(dispatch._available, (operator, "cuda"), "available")
    with FakeTensorMode(), torch.no_grad():
        yield


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def fake_basis(matrix: Tensor, gram: bool, backend: str) -> Basis:
    """On fake tensors that claim to be the CPU's: where torch has no CUDA, fake CUDA tensors cannot be indexed."""
    multiply = LinearMap(matrix, gram, gram, "reference")
    multiply.backend = backend
    return Basis(multiply, 100, torch.empty(8, 100, dtype=matrix.dtype), generator(0))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("gram", [False, True])
def test_no_step_waits_for_the_device(gram: bool, dtype: torch.dtype) -> None:
    """Fake tensors have no data: what would wait for it raises."""
    with FakeTensorMode(), torch.no_grad():
        basis = fake_basis(torch.empty(700 if gram else 100, 100, dtype=dtype), gram, "cuda")
        with Calls() as calls:
            while len(basis.rest):
                basis.step()
    assert basis.size == 100 and basis.steps == 13
    assert calls.names.count("rmtkernels::lanczos_orthonormalize") == 12  # the last step has filled the space
    assert calls.names.count(f"rmtkernels::lanczos_multiply{'_gram' if gram else ''}") == 13
    assert not any("qr" in name for name in calls.names)


def test_the_reference_backend_leaves_the_kernels_alone() -> None:
    with FakeTensorMode(), torch.no_grad():
        basis = fake_basis(torch.empty(100, 100), False, "reference")
        with Calls() as calls:
            basis.step()
    assert not any(name.startswith("rmtkernels::") for name in calls.names)


@pytest.mark.usefixtures("pretended_gpu")
def test_an_explicit_choice_does_not_fall_back() -> None:
    with Calls() as calls:
        lanczos_multiply(fake(9, 7), fake(3, 7), backend="cuda")
        lanczos_multiply_gram(fake(9, 7), fake(3, 7), backend="cuda")
    assert [name for name in calls.names if "::lanczos" in name] == [
        "rmtkernels::lanczos_multiply",
        "rmtkernels::lanczos_multiply_gram",
    ]
    with pytest.raises(BackendError, match="the tensors are on 'cuda'"):
        lanczos_eigh(fake(9, 9), 3, backend="cpu")


def test_without_the_kernels_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._available, ("lanczos_multiply", "cuda"), "not built")
    with FakeTensorMode(), pytest.raises(BackendError, match="not built"):
        lanczos_eigh(fake(9, 9), 3, backend="cuda")
    with pytest.raises(BackendError, match="the tensors are on 'cpu'"):
        lanczos_eigh(torch.eye(9), 3, backend="cuda")


@pytest.mark.skipif(_native.STATUS["_C_cuda"] != "loaded", reason="the CUDA library is not built")
def test_the_kernels_are_registered() -> None:
    for operator in ("lanczos_orthonormalize", "lanczos_multiply", "lanczos_multiply_gram"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rmtkernels::{operator}", "CUDA")


@pytest.mark.parametrize(("count", "size"), [(8, 0), (8, 66), (20, 60)])
def test_fake_results_have_the_shapes_of_real_ones(count: int, size: int) -> None:
    with FakeTensorMode():
        unit, triangle, products = KERNEL(fake(count, 70), fake(size, 70), fake(count, 70), fake(dtype=DOUBLE), 3)
    assert unit.shape == (min(count, 70 - size), 70) and unit.dtype == torch.float32
    assert triangle.shape == (count, count) and products.shape == (count, size)
    assert triangle.dtype == products.dtype == DOUBLE
