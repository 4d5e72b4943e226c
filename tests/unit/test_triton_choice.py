"""When the Triton kernels are chosen, on fake tensors of a GPU that is not there, and that Triton stays unimported."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rmtkernels import BackendError, dispatch, lowrank_linear
from rmtkernels.triton import FORMS, PRODUCTS

LIMITS = sys.modules["rmtkernels.ops.lowrank_linear"]
CUDA = torch.device("cuda")
BFLOAT = torch.bfloat16


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake CUDA tensors, and a dispatcher that believes in both kernels."""
    for operator in FORMS:
        monkeypatch.setitem(dispatch._available, (operator, "cuda"), "available")
        monkeypatch.setitem(dispatch._available, (operator, "triton"), "available")
    with FakeTensorMode(), torch.no_grad():
        yield


class Form(TorchDispatchMode):
    """Remembers whether the Triton form ran."""

    ran = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.ran |= function is torch.ops.rmtkernels.lowrank_linear_triton.default
        return function(*arguments, **(options or {}))


def takes_triton(rows: int, k: int, dtype: torch.dtype = BFLOAT, **options: Any) -> bool:
    shapes = ((rows, 96), (k, 96), (48, k))
    with Form() as watched:
        y = lowrank_linear(*(torch.empty(*shape, dtype=dtype, device=CUDA) for shape in shapes), **options)
    assert y.shape == (rows, 48)
    return watched.ran


@pytest.mark.usefixtures("pretended_gpu")
def test_lowrank_linear_takes_triton_within_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, k = LIMITS.MIN_ROWS_TRITON, LIMITS.MAX_RANK_TRITON
    assert takes_triton(rows, k)
    assert not takes_triton(rows - 1, k)
    assert not takes_triton(rows, k + 1)
    assert not takes_triton(rows, k, torch.float16) and not takes_triton(rows, k, torch.float32)
    assert not takes_triton(rows, k, backend="cuda")
    assert takes_triton(1, 100, torch.float32, backend="triton")
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda device: True
    )  # torch.autocast refuses where there is no GPU
    assert not takes_triton(rows, k)


@pytest.mark.usefixtures("pretended_gpu")
def test_a_derivative_is_left_to_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    # Autograd aborts on fake CUDA tensors where torch has no CUDA: a stand-in records nothing.
    monkeypatch.setattr(LIMITS, "_two_products", lambda x, down, up, bias: x.new_empty(len(x), len(up)))
    x, down, up = (
        torch.empty(*shape, dtype=BFLOAT, device=CUDA, requires_grad=True) for shape in ((2**15, 8), (4, 8), (5, 4))
    )
    ran: list[Tensor] = []
    monkeypatch.setattr(LIMITS, "_triton", lambda x, *rest: ran.append(x) or x)
    lowrank_linear(x, down, up)
    assert len(ran) == 1
    with torch.enable_grad():
        lowrank_linear(x, down, up)
    assert len(ran) == 1


def test_on_a_gpu_cuda_comes_first_then_triton_then_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = "spectrum_eigvalsh"
    monkeypatch.setattr(dispatch, "_warned", set())
    for cuda, triton, want in (
        ("available", "available", "cuda"),
        ("not built", "available", "triton"),
        ("available", "Triton is not installed", "cuda"),
    ):
        monkeypatch.setitem(dispatch._available, (operator, "cuda"), cuda)
        monkeypatch.setitem(dispatch._available, (operator, "triton"), triton)
        assert dispatch.select(operator, CUDA) == want
    with pytest.raises(BackendError, match="Triton is not installed"):
        dispatch.select(operator, CUDA, "triton")
    monkeypatch.setitem(dispatch._available, (operator, "cuda"), "not built")
    with pytest.warns(RuntimeWarning, match="reference: cuda: not built"):
        assert dispatch.select(operator, CUDA) == "reference"


@pytest.mark.parametrize("operator", [*FORMS, *PRODUCTS])
def test_every_form_takes_the_place_of_a_cuda_kernel_that_is_not_built(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch._available, (operator, "cuda"), "not built")
    monkeypatch.setitem(dispatch._available, (operator, "triton"), "available")
    assert dispatch.select(operator, CUDA) == "triton"


@pytest.mark.skipif(dispatch.triton.INTERPRETED, reason="the interpreter takes tensors of the CPU")
def test_forced_triton_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(BackendError, match="backend 'triton' was asked for, but the tensors are on 'cpu'"):
        lowrank_linear(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(4, 1), backend="triton")
    assert dispatch.triton.status("nothing") == "no triton kernel yet"
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match=r"no GPU|not installed"):
            dispatch.select("lowrank_linear", CUDA, "triton")


def test_triton_is_not_imported_before_a_kernel_runs() -> None:
    program = (
        "import sys, torch, rmtkernels as r\n"
        "before = 'triton' in sys.modules\n"
        "r.spectrum_eigvalsh(torch.eye(3)); r.dispatch.backends('lowrank_linear')\n"
        "print(before, 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
