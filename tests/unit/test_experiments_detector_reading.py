"""What the detector's experiments keep of a model: against plain passes over each text, and against EigenTrack."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from bench.experiments.detector.reading import TOP, Reader
from bench.experiments.detector.windows import descriptors
from eigentrack import EigenTrack

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
ANSWERS = [[[20, 21, 22, 23, 24], [25, 26, 27]], [[30, 31, 32, 33]]]
CASES = [(0, 0), (0, 1), (1, 0)]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "eager"
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def read(model: Any) -> list[list[dict[str, Tensor]]]:
    return Reader(model).read(PROMPTS, ANSWERS)


@pytest.mark.parametrize(("prompt", "answer"), CASES)
def test_a_batch_is_read_as_each_text_alone(
    model: Any, read: list[list[dict[str, Tensor]]], prompt: int, answer: int
) -> None:
    found, fed, behind = read[prompt][answer], ANSWERS[prompt][answer], len(PROMPTS[prompt])
    with torch.no_grad():
        output = model(torch.tensor([PROMPTS[prompt] + fed]), output_hidden_states=True, output_attentions=True)
    hidden = torch.stack([output.hidden_states[0][0], output.hidden_states[3][0]], 1)  # the embedding and block 2
    torch.testing.assert_close(found["hidden"][:, :2], hidden[behind:], rtol=1e-4, atol=1e-5)
    context = hidden[:behind] / hidden[:behind].square().mean(2, keepdim=True).sqrt()
    torch.testing.assert_close(found["prompt"][:, :2].float(), context, rtol=1e-2, atol=1e-2)

    logs = output.logits[0, behind - 1 : -1].log_softmax(1)
    torch.testing.assert_close(found["choice"][:, 0], logs[range(len(fed)), fed], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["choice"][:, 1], -(logs.exp() * logs).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["choice"][:, 2], logs.exp().amax(1), rtol=1e-4, atol=1e-4)

    weights = torch.stack([one[0] for one in output.attentions])  # (blocks, heads, T, T)
    torch.testing.assert_close(found["attention"][..., 0], weights[:, :, behind:, 0].permute(2, 0, 1))
    to_prompt = weights[:, :, behind:, 1:behind].sum(3).permute(2, 0, 1)
    torch.testing.assert_close(found["attention"][..., 1], to_prompt, rtol=1e-4, atol=1e-5)

    length = weights.shape[-1]
    laplacian = weights.sum(2) / (length - torch.arange(length)) - weights.diagonal(dim1=2, dim2=3)
    largest = torch.nn.functional.pad(laplacian.sort(2, descending=True).values, (0, TOP - length))
    torch.testing.assert_close(found["laplacian"], largest, rtol=1e-4, atol=1e-5)


def test_an_own_answer_is_generates(model: Any) -> None:
    read = Reader(model).read(PROMPTS, [[], []])
    for prompt, (found,) in zip(PROMPTS, read, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
        tokens = [token for token in wanted[0, len(prompt) :].tolist() if token not in (0, 2)]
        assert found["tokens"].tolist() == tokens


def test_descriptors_are_the_monitor_s(model: Any, read: list[list[dict[str, Tensor]]]) -> None:
    with EigenTrack(model, window=3, end_tokens=[]) as track, torch.no_grad():
        cache = model(torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
        for token in ANSWERS[0][0]:
            model(torch.tensor([[token]]), past_key_values=cache)
    got = descriptors(read[0][0]["hidden"][:, 1:], window=3)
    torch.testing.assert_close(got, track.descriptors[0], rtol=2e-3, atol=2e-3)


def test_hooks_are_gone(model: Any) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    before = hooks()  # transformers keeps some of its own
    Reader(model).read(PROMPTS, ANSWERS)
    assert hooks() == before
