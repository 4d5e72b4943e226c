"""EigenTrack and assisted decoding: accepted candidates are watched as if they had been fed one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, DynamicCache

from eigentrack import EigenTrack, Step, UnsupportedGenerationError
from tests.integration.conftest import tiny_llama
from tests.integration.test_monitor import WINDOW, oracle

REPEATING = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
LENGTH = REPEATING.shape[1]


def near_copy(model: Any) -> Any:
    """An assistant that often, but not always, agrees."""
    assistant = tiny_llama()
    assistant.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    with torch.no_grad():
        assistant.lm_head.weight += 0.01 * torch.randn_like(assistant.lm_head.weight)
    return assistant


def generate(model: Any, **options: Any) -> Tensor:
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(REPEATING, attention_mask=torch.ones_like(REPEATING), **options)


def helpers(model: Any) -> list[dict[str, Any]]:
    return [{"prompt_lookup_num_tokens": 4}, {"assistant_model": near_copy(model)}]


@pytest.mark.parametrize("which", [0, 1], ids=["prompt lookup", "assistant"])
@pytest.mark.parametrize("start", ["answer", "prompt"])
def test_assisted_decoding_is_watched_as_plain_decoding(llama: Any, start: str, which: int) -> None:
    with EigenTrack(llama, window=WINDOW, start=start) as plain:
        want = generate(llama)
    passes: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda m, a, given: passes.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with EigenTrack(llama, window=WINDOW, start=start) as track:
        output = generate(llama, **helpers(llama)[which])
    handle.remove()
    assert torch.equal(output, want)
    assert sum(passes) > output.shape[1] - 1, "no candidate was ever rejected"
    assert len(passes) < 40, "no candidate was ever accepted"
    assert torch.equal(track.tokens, plain.tokens) and track.steps == plain.steps
    torch.testing.assert_close(track.eigenvalues, plain.eigenvalues, rtol=1e-4, atol=1e-7)
    first = LENGTH if start == "answer" else 0
    values = oracle(llama, output[:, :-1], first, track.layers)
    torch.testing.assert_close(track.descriptors[0].double(), values, rtol=1e-3, atol=1e-4)


def test_sampled_candidates(llama: Any) -> None:
    torch.manual_seed(0)
    with EigenTrack(llama, window=WINDOW) as track:
        output = generate(llama, do_sample=True, **helpers(llama)[1])
    assert torch.equal(track.tokens, output[:, LENGTH:-1])
    values = oracle(llama, output[:, :-1], LENGTH, track.layers)
    torch.testing.assert_close(track.descriptors[0].double(), values, rtol=1e-3, atol=1e-4)


def test_reading_before_candidates_are_judged_spoils_nothing(llama: Any) -> None:
    """A streamer runs between the pass and the cropping of the cache."""

    lengths: list[int] = []

    class Reader:
        def put(self, tokens: Tensor) -> None:
            lengths.append(track.steps)

        def end(self) -> None:
            pass

    with EigenTrack(llama, window=WINDOW) as undisturbed:
        want = generate(llama, **helpers(llama)[1])
    with EigenTrack(llama, window=WINDOW) as track:
        output = generate(llama, streamer=Reader(), **helpers(llama)[1])
        inside = track.descriptors
    assert max(lengths) > 1 and torch.equal(output, want)
    assert torch.equal(track.tokens, undisturbed.tokens) and torch.equal(track.descriptors, inside)
    assert torch.equal(track.descriptors, undisturbed.descriptors)


def test_every_accepted_token_is_told_once(llama: Any) -> None:
    steps: list[Step] = []
    with EigenTrack(llama, window=WINDOW, on_token=steps.append) as track:
        output = generate(llama, **helpers(llama)[1])
    assert [step.index for step in steps] == list(range(track.steps))
    assert [int(step.tokens) for step in steps] == output[0, LENGTH:-1].tolist()


def test_the_next_request_and_the_next_turn(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    with EigenTrack(llama, window=WINDOW) as track:
        first = generate(llama, past_key_values=cache, **helpers(llama)[0])
        turn = torch.cat([first, torch.tensor([[9, 5, 6, 7]])], 1)
        output = llama.generate(
            turn, attention_mask=torch.ones_like(turn), past_key_values=cache, max_new_tokens=20, do_sample=False,
            eos_token_id=None, prompt_lookup_num_tokens=4,
        )  # fmt: skip
        assert torch.equal(track.tokens, output[:, turn.shape[1] : -1])
        generate(llama, **helpers(llama)[0])
        assert torch.equal(track.tokens, first[:, LENGTH:-1])


def test_nothing_of_a_request_is_held_when_it_is_over(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        generate(llama, **helpers(llama)[0])
    assert track._candidates is None


def test_an_interrupted_request_keeps_what_was_accepted(llama: Any) -> None:
    class BoomError(RuntimeError):
        pass

    def fail_late(step: Step) -> None:
        if step.index == 9:
            raise BoomError

    track = EigenTrack(llama, window=WINDOW, on_token=fail_late)
    with pytest.raises(BoomError), track:
        generate(llama, **helpers(llama)[0])
    assert torch.equal(track.tokens, generate(llama)[:, LENGTH : LENGTH + track.steps])


def test_models_that_cannot_be_asked_for_some_logits_are_refused() -> None:
    """Their candidates cannot be told from a prompt."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=2)
    model = BloomForCausalLM(config).eval()
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None, past_key_values=None, use_cache=None, return_dict=None: (
        forward(input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache)
    )
    with EigenTrack(model), pytest.raises(UnsupportedGenerationError, match="logits_to_keep"):
        generate(model, prompt_lookup_num_tokens=4)


def test_cropping_by_anybody_else_is_refused(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), EigenTrack(llama, window=WINDOW):
        for token in (5, 6, 7):
            llama(torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(UnsupportedGenerationError, match="crop"):
            llama(torch.tensor([[8]]), past_key_values=cache)


@pytest.mark.parametrize("start", ["answer", "prompt"])
def test_self_speculative_decoding_is_refused_and_the_model_keeps_its_depth(llama: Any, start: str) -> None:
    want = generate(llama)
    with pytest.raises(UnsupportedGenerationError, match="assistant_early_exit"), EigenTrack(llama, start=start):
        generate(llama, assistant_early_exit=2)
    assert torch.equal(generate(llama), want)
