"""Tiny random models of many families, two blocks deep."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

IMAGE_TOKEN = 63
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


def _only(*names: str) -> dict[str, Any]:
    return {name: SMALL[name] for name in names}


def _gpt2() -> Any:
    return hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **_only("vocab_size", "pad_token_id"))


def _llava() -> Any:
    """The vision tower is much larger than the language model."""
    vision = hf.CLIPVisionConfig(**VISION)
    text = hf.LlamaConfig(**SMALL)
    return hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=4)


def _gemma3_vision() -> Any:
    vision = hf.SiglipVisionConfig(**VISION)
    text = hf.Gemma3TextConfig(**SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    return hf.Gemma3Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, mm_tokens_per_image=4, boi_token_id=61,
        eoi_token_id=62,
    )  # fmt: skip


DECODERS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: hf.LlamaConfig(**SMALL),
    "Qwen2": lambda: hf.Qwen2Config(**SMALL),
    "Qwen3": lambda: hf.Qwen3Config(**SMALL),
    "Mistral": lambda: hf.MistralConfig(**SMALL, sliding_window=8),
    "Gemma 2": lambda: hf.Gemma2Config(**SMALL, sliding_window=8),
    "Gemma 3": lambda: hf.Gemma3TextConfig(
        **SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "GPT-2": _gpt2,
    "GPT-NeoX": lambda: hf.GPTNeoXConfig(
        **{k: v for k, v in SMALL.items() if "key_value" not in k and k != "head_dim"}
    ),
    "Phi": lambda: hf.PhiConfig(**SMALL),
    "Mixtral": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "Qwen3-MoE": lambda: hf.Qwen3MoeConfig(**SMALL, **EXPERTS, moe_intermediate_size=32),
}
VISION_LANGUAGE: dict[str, Callable[[], Any]] = {"Llava": _llava, "Gemma 3 with images": _gemma3_vision}


def build(family: str) -> Any:
    torch.manual_seed(0)
    if family in VISION_LANGUAGE:
        return hf.AutoModelForImageTextToText.from_config(VISION_LANGUAGE[family]()).eval()
    return hf.AutoModelForCausalLM.from_config(DECODERS[family]()).eval()
