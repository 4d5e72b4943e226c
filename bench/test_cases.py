"""The same cases for pytest-benchmark: `python -m pytest bench/ -k spectrum`. Results are checked first; peers are left
to `python -m bench run`, which times them in turn with ours."""

from typing import Any

import pytest
import torch

from bench.cases import REGISTRY


@pytest.mark.parametrize("name", REGISTRY)
def test_case(name: str, benchmark: Any) -> None:
    threads, setup = REGISTRY[name]
    torch.set_num_threads(threads)
    prepared = setup()
    prepared.verify()
    benchmark.group = name.partition(".")[0]
    benchmark(prepared.ours)
