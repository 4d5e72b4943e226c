"""sliding_window on CUDA tensors, without a GPU: which backend runs, on fake tensors. On a GPU: tests/gpu."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rmtkernels import BackendError, DeviceError, ShapeError, _native, dispatch, window_gram, window_push_

OPERATORS = ("window_push_", "window_gram")


class Kernels(TorchDispatchMode):
    """Remembers which kernels ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.ran += [name for name in OPERATORS if function is getattr(torch.ops.rmtkernels, name).default]
        return function(*arguments, **(options or {}))


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake CUDA tensors, and a dispatcher that believes in the kernels."""
    for operator in OPERATORS:
        monkeypatch.setitem(dispatch._available, (operator, "cuda"), "available")
    with FakeTensorMode():
        yield


def state(dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[Tensor]:
    ring, gram = torch.zeros(2, 3, 4, 9, dtype=dtype, device=device), torch.zeros(2, 3, 4, 4, device=device)
    return [ring, gram, torch.zeros(3, 3, dtype=torch.int64, device=device)]


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("backend", [None, "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_run(backend: str | None, dtype: torch.dtype) -> None:
    with Kernels() as watched:
        window_push_(*state(dtype), [torch.zeros(3, 9, dtype=dtype, device="cuda")] * 2, backend=backend)
        gram, seen = window_gram(torch.zeros(3, 20, 9, dtype=dtype, device="cuda"), 4, 3, backend=backend)
    assert watched.ran == list(OPERATORS)
    assert gram.shape == (3, 6, 4, 4) and gram.dtype is torch.float32 and gram.device.type == "cuda"
    assert seen.shape == (3, 6) and seen.dtype is torch.int64 and seen.device.type == "cuda"


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize(
    ("error", "call"),
    [
        (DeviceError, lambda: window_push_(*state(), [torch.zeros(3, 9)] * 2)),
        (DeviceError, lambda: window_gram(torch.zeros(3, 5, 9, device="cuda"), 4, mask=torch.ones(3, 5).bool())),
        (ShapeError, lambda: window_gram(torch.zeros(3, 5, 9, device="cuda"), 129)),
        (BackendError, lambda: window_gram(torch.zeros(3, 5, 9, device="cuda"), 4, backend="cpu")),
    ],
)
def test_what_is_refused(error: type[Exception], call: Callable[[], object]) -> None:
    with pytest.raises(error):
        call()


def calls(operator: str, device: str) -> Callable[[], object]:
    if operator == "window_gram":
        return lambda: window_gram(torch.zeros(3, 5, 9, device=device), 4, backend="cuda")
    return lambda: window_push_(*state(device=device), [torch.zeros(3, 9, device=device)] * 2, backend="cuda")


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_explicit_choice_does_not_fall_back(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    with pytest.raises(BackendError, match="the tensors are on 'cpu'"):
        calls(operator, "cpu")()
    monkeypatch.setitem(dispatch._available, (operator, "cuda"), "not built")
    with FakeTensorMode(), Kernels() as watched, pytest.raises(BackendError, match="not built"):
        calls(operator, "cuda")()
    assert not watched.ran


@pytest.mark.skipif(_native.STATUS["_C_cuda"] != "loaded", reason="the CUDA library is not built")
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_kernels_are_registered(operator: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rmtkernels::{operator}", "CUDA")
