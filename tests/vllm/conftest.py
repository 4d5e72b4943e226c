"""A real vLLM on the CPU with the demo's model. `make test-vllm` builds the environment that it needs."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from eigentrack.loading import demo_model, load_causal_lm

# vLLM has an environment of its own; `make test` runs these tests there, through tools/prove.py.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference() -> Any:
    """SmolLM2-135M in transformers."""
    return load_causal_lm(demo_model())[0]


@pytest.fixture(scope="session")
def model_folder(reference: Any) -> Path:
    """The same model on disk."""
    return Path(reference.name_or_path)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of processes that run vLLM."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | quiet | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
