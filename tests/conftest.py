"""Fixtures for every folder: instruction set, threads, and fresh memory that is not zero by luck."""

from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

import rmtkernels

# Derandomised: a failure is the code's fault and comes again. Fixtures used beside @given hold no state of examples.
hypothesis.settings.register_profile(
    "rmtkernels",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("rmtkernels")


@pytest.fixture(params=["avx2", "baseline"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; a processor without AVX2 can only run the other."""
    name: str = request.param
    if name == "avx2" and "avx2" not in rmtkernels.cpu_isas():
        pytest.skip("this processor has no AVX2")
    before = rmtkernels.cpu_isa()
    rmtkernels.set_cpu_isa(name)
    yield name
    rmtkernels.set_cpu_isa(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN (integers: of the largest value), so that an unwritten output is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
