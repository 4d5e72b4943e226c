"""Tiny random models, and the demo's real one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from eigentrack.loading import demo_model, load_causal_lm

VOCABULARY, DEPTH, WIDTH = 64, 6, 32


def tiny_llama(depth: int = DEPTH, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=4,
        n_positions=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


MODELS: dict[str, Callable[[], Any]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two OpenMP threads collapse as soon as anything else runs."""
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.fixture
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="session")
def real() -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M."""
    return load_causal_lm(demo_model())
