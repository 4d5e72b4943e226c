"""Two ranks on the CPU: hidden states are equal on both behind the all-reduce, and rank 0 tells what one rank would."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.vllm.drive import driven
from tests.vllm.oracle import descriptors, distance

LAYERS = (0, 2, 3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random model whose heads two ranks can share (the demo's has nine), and where it lies."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model, folder = LlamaForCausalLM(config).eval(), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("ranks", [1, 2])
def test_rank_0_tells_what_transformers_tells(
    tmp_path: Path, environment: dict[str, str], small: tuple[Path, Any], ranks: int
) -> None:
    folder, model = small
    choose = random.Random(3)
    asked = [
        {
            "name": f"request {index}",
            "arrives": index,
            "prompt": [choose.randrange(512) for _ in range(choose.randint(2, 40))],
            "sampling": {"max_tokens": choose.randint(5, 50), "temperature": 1.0},
        }
        for index in range(12)
    ]
    engine = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "tensor_parallel_size": ranks,
        "kv_cache_memory_bytes": 32 << 20,
        "additional_config": {"eigentrack": {"descriptors": True, "layers": LAYERS}},
    }
    result = driven(tmp_path, {"engine": engine, "requests": asked}, environment)
    assert len(result["completions"]) == 12
    for completion in result["completions"]:
        expected = descriptors(model, completion["prompt"], completion["answer"], LAYERS)
        assert distance(torch.tensor(completion["readings"]["descriptors"]), expected) < 1e-3
