"""EigenTrack in several threads: each monitor sees the request of the thread that entered it."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eigentrack import EigenTrack
from tests.helpers import same_bits
from tests.integration.conftest import tiny_llama
from tests.integration.test_monitor import WINDOW, generate, hooks_of, prompt

THREADS = 8


def in_threads(work: Callable[[int], None]) -> None:
    """Runs work(0) ... work(7) at the same time, and raises what one of them raises."""
    errors: list[BaseException] = []
    together = threading.Barrier(THREADS)

    def run(index: int) -> None:
        try:
            together.wait()
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def request(model: Any, index: int) -> Tensor:
    """Greedy, for the generator of random numbers is shared by all threads."""
    return generate(model, prompt(1 + index % 3, 4 + index, seed=index), 12 + index, do_sample=False)


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "eight models"])
def test_eight_threads_with_a_monitor_each(shared: bool) -> None:
    eight_threads(shared, rounds=3)


def eight_threads(shared: bool, rounds: int) -> None:
    """Each with monitors that come and go while others generate; each of them sees what one alone would see."""
    models = [tiny_llama()] * THREADS if shared else [tiny_llama() for _ in range(THREADS)]
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in range(THREADS)]

    def work(index: int) -> None:
        for _ in range(rounds):
            seen[index].append(watched(models[index], index))

    in_threads(work)
    assert all(hooks_of(model) == 0 for model in models)
    for index in range(THREADS):
        alone = watched(models[index], index)
        assert len(seen[index]) == rounds
        assert all(same_bits(*pair) for found in seen[index] for pair in zip(found, alone, strict=True))


def watched(model: Any, index: int) -> tuple[Tensor, ...]:
    """What was generated, and what a monitor of that saw."""
    with EigenTrack(model, window=WINDOW, layers=[index % 6, -1 - index % 2]) as track:
        output = request(model, index)
    return output, track.tokens, track.descriptors, track.eigenvalues


def test_a_thread_without_a_monitor_is_watched_by_the_one_that_started_it(llama: Any) -> None:
    """generate() runs in a thread of its own when tokens are streamed to the one that entered the monitor."""
    from transformers.generation.streamers import BaseStreamer

    heard: list[int] = []
    seen: list[int] = []

    class Streamer(BaseStreamer):
        def put(self, tokens: Tensor) -> None:
            heard.extend(tokens.flatten().tolist())

        def end(self) -> None:
            pass

    with EigenTrack(llama, window=WINDOW, on_token=lambda step: seen.append(int(step.tokens))) as track:
        worker = threading.Thread(
            target=generate, args=(llama, prompt(), 12), kwargs={"do_sample": False, "streamer": Streamer()}
        )
        worker.start()
        worker.join()
    assert track.tokens[0].tolist() == seen == heard[5:-1]
    with EigenTrack(llama, window=WINDOW) as alone:
        generate(llama, prompt(), 12, do_sample=False)
    assert torch.equal(track.descriptors, alone.descriptors)


def test_a_text_iterator_streamer(real: tuple[Any, Any]) -> None:
    from transformers import TextIteratorStreamer

    model, tokenizer = real
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    with EigenTrack(model) as track:
        options = {**inputs, "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
        worker = threading.Thread(target=model.generate, kwargs=options)
        worker.start()
        text = "".join(streamer)
        worker.join()
    assert track.steps == 7
    assert text.startswith(tokenizer.decode(track.tokens[0]))


def test_a_thread_with_a_monitor_of_its_own_is_nobody_elses(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as outer:
        mine = generate(llama, prompt(seed=1), 10)
        others: list[EigenTrack] = []

        def work() -> None:
            with EigenTrack(llama, window=WINDOW) as inner:
                generate(llama, prompt(seed=2), 14)
            others.append(inner)

        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    assert torch.equal(outer.tokens, mine[:, 5:-1])
    assert others[0].steps == 13


def test_a_copy_of_the_model_is_not_watched(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        output = generate(llama, prompt(), 10)
        before = track.descriptors
        twin = copy.deepcopy(llama)
        assert torch.equal(generate(twin, prompt(), 10), output)
        assert torch.equal(track.descriptors, before)
        part_of_twin = twin.model.layers[2]

        def run_it_too(module: Any, args: Any, output: Any) -> None:
            part_of_twin(
                args[0], position_embeddings=llama.model.rotary_emb(args[0], torch.arange(args[0].shape[1])[None])
            )

        llama.model.layers[0].register_forward_hook(run_it_too)
        generate(llama, prompt(), 10)  # a copied block that runs in the middle of a pass is no block of the model
        assert torch.equal(track.descriptors, before)
    assert hooks_of(llama) == 1
    assert torch.equal(generate(twin, prompt(), 10), output)


@pytest.mark.filterwarnings("ignore:EigenTrack saw no forward pass")
def test_a_pass_between_a_hook_and_its_keywords_is_left_alone(llama: Any) -> None:
    """PyTorch registers a hook, then notes that it wants keywords; a pass of another thread can come in between."""
    ids = prompt()
    expected = llama(ids).logits
    with EigenTrack(llama, window=WINDOW):
        for marked in (llama._forward_pre_hooks_with_kwargs, llama._forward_hooks_with_kwargs):
            marked.clear()
        assert torch.equal(llama(ids).logits, expected)
