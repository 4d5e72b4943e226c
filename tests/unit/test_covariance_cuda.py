"""covariance_update_ on CUDA tensors, without a GPU: which backend runs, on fake tensors. On a GPU: tests/gpu."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rmtkernels import BackendError, DeviceError, _native, covariance_update_, dispatch
from tests.helpers import covariance_of, normal, same_covariance

kernel = torch.ops.rmtkernels.covariance_update_


class Kernel(TorchDispatchMode):
    """Remembers whether the kernel ran."""

    ran = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.ran |= function is kernel.default
        return function(*arguments, **(options or {}))


def arguments(dim: int = 64, **options: Any) -> list[Tensor]:
    double = {"dtype": torch.float64, "device": "cuda"}
    state = [torch.zeros(dim, **double), torch.zeros(dim, dim, device="cuda"), torch.zeros(5, **double)]
    return [*state, torch.zeros(20, dim, device="cuda", **options)]


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake CUDA tensors, and a dispatcher that believes in the kernel."""
    monkeypatch.setitem(dispatch._available, ("covariance_update_", "cuda"), "available")
    with FakeTensorMode():
        yield


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("backend", [None, "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_kernel_runs(backend: str | None, dtype: torch.dtype) -> None:
    with Kernel() as watched:
        covariance_update_(*arguments(dtype=dtype), decay=0.5, backend=backend)
    assert watched.ran


@pytest.mark.usefixtures("pretended_gpu")
def test_tensors_of_two_devices_are_refused() -> None:
    mean, scatter, totals, batch = arguments()
    with pytest.raises(DeviceError):
        covariance_update_(mean, scatter, totals, torch.zeros(batch.shape))
    with pytest.raises(BackendError, match="the tensors are on 'cuda'"):
        covariance_update_(mean, scatter, totals, batch, backend="cpu")


def test_an_explicit_choice_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    state = covariance_of(normal(20, 9))
    before = state.copy()
    with pytest.raises(BackendError, match="the tensors are on 'cpu'"):
        covariance_update_(*state, normal(20, 9), backend="cuda")
    assert same_covariance(state, before)
    monkeypatch.setitem(dispatch._available, ("covariance_update_", "cuda"), "not built")
    with FakeTensorMode(), Kernel() as watched, pytest.raises(BackendError, match="not built"):
        covariance_update_(*arguments(), backend="cuda")
    assert not watched.ran


@pytest.mark.skipif(_native.STATUS["_C_cuda"] != "loaded", reason="the CUDA library is not built")
def test_the_kernel_is_registered() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("rmtkernels::covariance_update_", "CUDA")
