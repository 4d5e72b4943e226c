"""Ways to run a model that others provide: pipeline, attention implementations, PEFT, quantisation. Readings against
float64 windows of what hooks of the test's own collect in the same run."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from eigentrack import EigenTrack
from eigentrack.taps import find_blocks
from tests.integration.conftest import VOCABULARY, tiny_llama
from tests.integration.test_compatibility import Watched, compare
from tests.integration.test_monitor import WINDOW, hooks_of

IDS = torch.tensor([[5, 9, 17, 33], [6, 7, 8, 9]])
NEW = 9


def generate(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    mask = torch.ones_like(ids)
    text: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    return text


def check(model: Any, run: Callable[[], torch.Tensor]) -> None:
    """Runs unwatched and watched: one text, and readings that are those of its hidden states."""
    before, hooks = run(), hooks_of(model)
    blocks = find_blocks(model)
    collected: list[list[torch.Tensor]] = [[] for _ in blocks]
    handles = [
        block.register_forward_hook(lambda m, a, out, to=to: to.append(out[0] if isinstance(out, tuple) else out))
        for block, to in zip(blocks, collected, strict=True)
    ]
    with EigenTrack(model, layers="all", window=WINDOW, end_tokens=[]) as track:
        text = run()
    for handle in handles:
        handle.remove()
    assert torch.equal(text, before), "the monitor changed the output"
    assert hooks_of(model) == hooks
    fed = text[:, :-1]
    states = [torch.cat(parts, 1)[:, -fed.shape[1] :] for parts in collected]  # virtual tokens are in front
    first = fed.shape[1] - (NEW - 1)
    compare(
        [Watched(track, row, fed[row : row + 1], [s[row : row + 1] for s in states], first) for row in range(len(fed))]
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_attention_implementation(attention: str) -> None:
    model = tiny_llama(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    with torch.compiler.set_stance("force_eager"):  # flex attention compiles itself, which takes half a minute
        check(model, lambda: generate(model))


PEFT: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda peft: peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "IA3": lambda peft: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "prefix tuning": lambda peft: peft.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt tuning": lambda peft: peft.PromptTuningConfig(num_virtual_tokens=3),
}


@pytest.mark.parametrize("method", PEFT)
def test_models_wrapped_by_peft(method: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = PEFT[method](peft)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    check(model, lambda: generate(model))


def test_the_adapter_is_seen_and_can_be_switched_off() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    readings = []
    for watched in (model, tiny_llama()):
        with model.disable_adapter(), EigenTrack(watched, layers="all", window=WINDOW) as track:
            generate(watched)
        readings.append(track.eigenvalues)
    assert torch.equal(*readings), "without its adapter the model is the base model"
    with EigenTrack(model, layers="all", window=WINDOW) as track:
        generate(model)
    assert not torch.equal(track.eigenvalues, readings[0])


def test_a_quantised_model() -> None:
    """Dynamic int8 by PyTorch: other weights inside, hidden states as before."""
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None:
        pytest.skip("this PyTorch has no torch.ao.quantization.quantize_dynamic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch moves it to another package
        model = quantize(tiny_llama(), {torch.nn.Linear}, dtype=torch.qint8)
        assert "quantized" in type(model.model.layers[0].mlp.down_proj).__module__
        check(model, lambda: generate(model))


def test_a_pipeline() -> None:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w3", pad_token="w0", padding_side="left")
    model = tiny_llama()
    talk = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = [" ".join(f"w{token}" for token in row) for row in IDS.tolist()]
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "batch_size": 2}

    def run() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about max_length
            answers = talk(prompts, **how)
        texts = [re.findall(r"w\d+", answer[0]["generated_text"]) for answer in answers]
        return torch.tensor([[words[word] for word in text] for text in texts])

    check(model, run)
