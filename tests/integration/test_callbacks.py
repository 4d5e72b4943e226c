"""Acting while the model generates: callbacks, stopping, and a monitor that forgets in mid-answer."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from eigentrack import CallbackError, EigenTrack, EigenTrackError, Step, UnsupportedGenerationError
from eigentrack.history import History
from eigentrack.step import read_step
from tests.helpers import same_bits
from tests.integration.conftest import tiny_gpt2
from tests.integration.test_monitor import WINDOW, generate, hooks_of, oracle, prompt


def until(index: int) -> Callable[[Step], bool]:
    return lambda step: step.index >= index


# Callbacks


@pytest.mark.parametrize("start", ["answer", "prompt"])
@pytest.mark.parametrize("spectra", ["per_layer", "joint"])
def test_each_step_is_told_once_and_as_it_is_kept(llama: Any, start: str, spectra: str) -> None:
    steps: list[Step] = []
    ids = torch.cat([torch.tensor([[0, 0]]), prompt(1, 3)], 1)
    ids = torch.cat([ids, prompt(1, 5, seed=4)])  # the first is padded
    with EigenTrack(llama, window=WINDOW, start=start, spectra=spectra, on_token=steps.append) as track:
        generate(llama, ids, 12)
    assert [step.index for step in steps] == list(range(track.steps))
    for t, step in enumerate(steps):
        assert same_bits(step.descriptors, track.descriptors[:, t])
        assert torch.equal(step.tokens, track.tokens[:, t])
        assert torch.equal(step.watched, track.watched[:, t])
        assert torch.equal(step.rows, track.watched[:, : t + 1].sum(1).clamp(max=WINDOW))
    assert track.descriptors.isnan().any() == (start == "prompt")
    assert steps[-1].rows.tolist() == [WINDOW, WINDOW]


def test_steps_come_while_the_model_generates(llama: Any) -> None:
    passes: list[int] = []
    handle = llama.register_forward_hook(lambda *_: passes.append(0))
    seen: list[int] = []
    with EigenTrack(llama, window=WINDOW, on_token=lambda step: seen.append(len(passes))):
        generate(llama, prompt(), 6)
    handle.remove()
    assert seen == [2, 3, 4, 5, 6]  # the first pass is the prompt's


def test_a_step_is_a_copy(llama: Any) -> None:
    def spoil(step: Step) -> None:
        for tensor in (step.tokens, step.descriptors, step.watched, step.rows):
            tensor.zero_()

    with EigenTrack(llama, window=WINDOW) as plain:
        generate(llama, prompt())
    with EigenTrack(llama, window=WINDOW, spectra="per_layer", layers=[-1], on_token=spoil) as one_layer:
        generate(llama, prompt())
    with EigenTrack(llama, window=WINDOW, on_token=spoil) as track:
        generate(llama, prompt())
    assert same_bits(track.descriptors, plain.descriptors) and torch.equal(track.tokens, plain.tokens)
    assert track.lengths.tolist() == one_layer.lengths.tolist() == [19]
    assert not (one_layer.descriptors == 0).all()


def test_an_exception_ends_the_generation_and_leaves_no_hook(llama: Any) -> None:
    class EnoughError(RuntimeError):
        pass

    def enough(step: Step) -> None:
        if step.index == 3:
            raise EnoughError

    track = EigenTrack(llama, window=WINDOW, on_token=enough)
    with pytest.raises(EnoughError), track:
        generate(llama, prompt())
    assert hooks_of(llama) == 0
    assert track.steps == 4 and not track.descriptors.isnan().any()
    track.on_token = None
    with track:
        generate(llama, prompt())
    assert track.steps == 19


def test_a_callback_set_in_mid_answer_hears_of_what_comes(llama: Any) -> None:
    steps: list[Step] = []
    with EigenTrack(llama, window=WINDOW) as track:

        def attach(step: Step) -> bool:
            track.on_token = steps.append
            return False

        generate(llama, prompt(), 8, stopping_criteria=[track.stop_when(attach)])
    assert [step.index for step in steps] == [1, 2, 3, 4, 5, 6]


def test_each_request_is_told_from_its_start(llama: Any) -> None:
    steps: list[Step] = []
    with EigenTrack(llama, window=WINDOW, on_token=steps.append):
        generate(llama, prompt(), 5)
        generate(llama, prompt(2), 4)
    assert [(step.index, len(step.tokens)) for step in steps] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
        (0, 2),
        (1, 2),
        (2, 2),
    ]


# Stopping


def test_stopping_ends_the_sequence_after_the_step(llama: Any) -> None:
    free = generate(llama, prompt())
    with EigenTrack(llama, window=WINDOW) as track:
        output = generate(llama, prompt(), stopping_criteria=[track.stop_when(until(4))])
    assert torch.equal(output, free[:, : 5 + 6]), "steps 0 to 4, and the token chosen when step 4 was seen"
    assert track.steps == 5


def test_the_prompt_may_stop_an_answer(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW, start="prompt") as track:
        output = generate(llama, prompt(), stopping_criteria=[track.stop_when(until(2))])
    assert output.shape[1] == 6 and track.steps == 5


@pytest.mark.parametrize("end", [2, None])
def test_one_sequence_of_a_batch(llama: Any, end: int | None) -> None:
    ids = prompt(3, seed=5)
    free = generate(llama, ids, 12, do_sample=False)
    with EigenTrack(llama, window=WINDOW) as track:

        def second(step: Step) -> Tensor:
            return torch.tensor([False, step.index == 3, False])  # true once: it stays ended

        criteria = [track.stop_when(second)]
        output = generate(llama, ids, 12, do_sample=False, eos_token_id=end, stopping_criteria=criteria)
    assert torch.equal(output[[0, 2]], free[[0, 2]])
    assert torch.equal(output[1, : 5 + 5], free[1, : 5 + 5])
    if end is not None:
        assert (output[1, 5 + 5 :] == 0).all(), "padding"
    assert track.lengths.tolist() == [11, 4, 11], "alone, it would never have fed what came after step 3"


def test_every_step_is_asked_about_once(llama: Any) -> None:
    asked: list[int] = []
    with EigenTrack(llama, window=WINDOW) as track:
        criteria = [track.stop_when(lambda step: asked.append(step.index) or False)]
        generate(llama, prompt(), 6, stopping_criteria=criteria)
        generate(llama, prompt(2), 4, stopping_criteria=criteria)
    assert asked == [0, 1, 2, 3, 4, 0, 1, 2]


def test_a_criterion_can_be_used_again(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        criteria = [track.stop_when(until(4))]
        first = generate(llama, prompt(), stopping_criteria=criteria)
        second = generate(llama, prompt(), stopping_criteria=criteria)
    assert torch.equal(first, second) and first.shape[1] == 11


@pytest.mark.parametrize("again", [False, True])
def test_a_second_turn_is_judged_by_its_own_steps(llama: Any, again: bool) -> None:
    asked: list[int] = []

    def judge(step: Step) -> bool:
        asked.append(step.index)
        return step.index in (7, 15)

    with EigenTrack(llama, window=WINDOW, start="prompt") as track:
        criterion = track.stop_when(judge)
        first = llama.generate(
            prompt(), max_new_tokens=20, min_new_tokens=20, stopping_criteria=[criterion], return_dict_in_generate=True
        )
        told = track.steps
        ids = torch.cat([first.sequences, prompt(1, 3, seed=4)], 1)
        criterion = criterion if again else track.stop_when(judge)
        second = generate(llama, ids, 20, past_key_values=first.past_key_values, stopping_criteria=[criterion])
    assert told == 8 and asked == list(range(16))
    assert second.shape[1] == 17, "steps 8 to 15, and the token chosen when step 15 was seen"


def test_an_answer_of_numpy(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        criteria = [track.stop_when(lambda step: np.bool_(step.index >= 4))]
        assert generate(llama, prompt(), stopping_criteria=criteria).shape[1] == 11


def test_two_criteria_beside_each_other(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        criteria = [track.stop_when(until(9)), track.stop_when(until(4))]
        assert generate(llama, prompt(), stopping_criteria=criteria).shape[1] == 11


@pytest.mark.parametrize(
    "answer",
    [None, 1, 0.5, "yes", torch.tensor([1, 0]), torch.tensor([True]), torch.ones(3, dtype=torch.bool), [True, False]],
)
def test_wrong_answers(llama: Any, answer: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track, pytest.raises(CallbackError, match=r"bool tensor \(2,\), got"):
        generate(llama, prompt(2), stopping_criteria=[track.stop_when(lambda step: answer)])
    assert hooks_of(llama) == 0


def test_a_scalar_tensor_is_for_all(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        criteria = [track.stop_when(lambda step: (step.index >= 4) & step.watched.all())]
        assert generate(llama, prompt(2), stopping_criteria=criteria).shape[1] == 11


def test_a_monitor_that_is_not_attached_stops_nothing_silently(llama: Any) -> None:
    track = EigenTrack(llama)
    with pytest.raises(EigenTrackError, match="with block"):
        generate(llama, prompt(), stopping_criteria=[track.stop_when(until(0))])


def test_a_criterion_of_another_model(llama: Any) -> None:
    other = tiny_gpt2()
    with EigenTrack(llama, window=WINDOW) as track:
        generate(llama, prompt(2), 4)
        with pytest.raises(UnsupportedGenerationError, match="batch of 2"):
            generate(other, prompt(3), 4, stopping_criteria=[track.stop_when(until(9))])


def test_transformers_is_imported_only_when_a_criterion_is_asked_for() -> None:
    code = "import sys, eigentrack; sys.exit('transformers' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Forgetting


def test_after_a_reset_the_next_token_is_the_first_of_an_empty_window(llama: Any) -> None:
    told: list[int] = []

    def forget(step: Step) -> None:
        told.append(step.index)
        if len(told) == 7:
            track.reset()

    with EigenTrack(llama, window=WINDOW, on_token=forget) as track:
        output = generate(llama, prompt())
    assert torch.equal(output, generate(llama, prompt()))
    assert told == [*range(7), *range(12)]
    assert torch.equal(track.tokens, output[:, 5 + 7 : -1])
    want = oracle(llama, output[:, :-1], 5 + 7, track.layers)
    torch.testing.assert_close(track.descriptors[0].double(), want, rtol=1e-3, atol=1e-4)


def test_sequences_that_have_ended_stay_so_after_a_reset(llama: Any) -> None:
    ids = prompt(2, seed=5)
    with EigenTrack(llama, window=WINDOW) as track:

        def judge(step: Step) -> Tensor:
            first = step.watched.all() and step.index == 3
            if first:
                track.reset()
            return torch.tensor([first, False])

        generate(llama, ids, 12, do_sample=False, stopping_criteria=[track.stop_when(judge)])
    assert track.steps == 7 and track.lengths.tolist() == [0, 7]


def test_a_reset_with_nothing_watched_is_nothing(llama: Any) -> None:
    track = EigenTrack(llama)
    track.reset()
    with track:
        track.reset()
        generate(llama, prompt())
    assert track.steps == 19
    track.reset()
    assert not track.watching


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_reset_from_within_a_prompt_forgets_all_that_was_fed(llama: Any, at: int) -> None:
    told: list[int] = []

    def forget(step: Step) -> None:
        told.append(step.index)
        if len(told) == at + 1:
            track.reset()

    with EigenTrack(llama, window=WINDOW, start="prompt", on_token=forget) as track:
        output = generate(llama, prompt(), 6)
    assert told == [*range(at + 1), *range(5)]
    assert torch.equal(track.tokens, output[:, 5:-1])


def test_resetting_and_stopping_at_one_step(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:

        def judge(step: Step) -> bool:
            track.reset()
            return False

        output = generate(llama, prompt(), 6, stopping_criteria=[track.stop_when(judge)])
    assert output.shape[1] == 11 and not track.watching


def test_a_callback_that_fails_at_the_end_of_the_block_leaves_nothing_held(llama: Any) -> None:
    def fail(step: Step) -> None:
        raise KeyError(step.index)

    cache = DynamicCache(config=llama.config)
    held, track = weakref.ref(cache), EigenTrack(llama, window=WINDOW)
    with pytest.raises(KeyError), track:  # noqa: PT012
        ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
        generate(llama, ids, prompt_lookup_num_tokens=3, do_sample=False, past_key_values=cache)
        del cache
        track.on_token = fail
    gc.collect()
    assert held() is None and track._windows._state is None


class Sizes(TorchDispatchMode):
    """The most elements that an operation reads that is no view."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.largest = max([self.largest, *(x.numel() for x in args if isinstance(x, Tensor))])
        return func(*args, **(kwargs or {}))


def test_a_step_costs_the_same_however_long_the_history() -> None:
    history = History(2, 1, 3, WINDOW, torch.device("cpu"), capacity=4096)
    history.steps, history.seen[:] = 4096, 100
    with Sizes() as sizes:
        assert read_step(history, 4095).rows.tolist() == [WINDOW, WINDOW]
    assert sizes.largest <= 2 * max(3, WINDOW)
