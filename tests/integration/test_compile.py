"""EigenTrack and torch.compile: what is compiled inside the block is watched as in eager mode, graph and all."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

from eigentrack import EigenTrack, EigenTrackError, TapError, UnsupportedGenerationError, UnsupportedModelError
from tests.integration.conftest import tiny_llama
from tests.integration.test_monitor import WINDOW, assert_same_spectra, hooks_of, oracle, prompt

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [0, 1, 2]}


@pytest.fixture(autouse=True)
def no_graphs_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def llama() -> Any:
    return tiny_llama(depth=2)


def by_hand(call: Callable[..., Any], cache: Any, ids: Tensor, new_tokens: int = 10) -> Tensor:
    """Greedy decoding without generate(); like it, the last token is not fed."""
    tokens = [ids]
    with torch.no_grad():
        result = call(ids, past_key_values=cache, use_cache=True)
        for _ in range(new_tokens - 1):
            tokens.append(result.logits[:, -1:, 3:].argmax(-1) + 3)
            result = call(tokens[-1], past_key_values=result.past_key_values)
    return torch.cat([*tokens, result.logits[:, -1:, 3:].argmax(-1) + 3], 1)


def kept(model: Any, backend: str, ids: Tensor) -> Tensor:
    return by_hand(torch.compile(model, fullgraph=True, backend=backend), DynamicCache(config=model.config), ids)


def kept_with_a_static_cache(model: Any, backend: str, ids: Tensor) -> Tensor:
    cache = StaticCache(config=model.config, max_cache_len=32)
    return by_hand(torch.compile(model, fullgraph=True, backend=backend), cache, ids)


def by_forward(model: Any, backend: str, ids: Tensor) -> Tensor:
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    return model.generate(ids, max_new_tokens=10, **GREEDY)


def in_place(model: Any, backend: str, ids: Tensor) -> Tensor:
    model.compile(fullgraph=True, backend=backend)
    return model.generate(ids, max_new_tokens=10, **GREEDY)


def by_generate(model: Any, backend: str, ids: Tensor) -> Tensor:
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return model.generate(ids, max_new_tokens=10, cache_implementation="static", compile_config=config, **GREEDY)


WAYS = [kept, kept_with_a_static_cache, by_forward, in_place, by_generate]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", WAYS)
def test_compiled_inside_the_block(llama: Any, way: Callable[..., Tensor], backend: str) -> None:
    ids = prompt(2)
    with EigenTrack(llama, window=WINDOW) as track:
        output = way(llama, backend, ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    plain = tiny_llama(depth=2)
    with EigenTrack(plain, window=WINDOW) as eager:
        want = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, **GREEDY)
    assert torch.equal(output, want) and torch.equal(track.tokens, eager.tokens)
    assert torch.equal(track.lengths, eager.lengths) and track.steps == 9
    if "static" in way.__name__ or way is by_generate:  # a compiled model masks a static cache in its own way
        assert_same_spectra(track.eigenvalues.flatten(0, 1), eager.eigenvalues.flatten(0, 1))
    else:
        assert torch.equal(track.eigenvalues, eager.eigenvalues)
        assert torch.equal(track.descriptors, eager.descriptors)


@pytest.mark.parametrize("way", [kept_with_a_static_cache, by_generate])
def test_inductor(llama: Any, way: Callable[..., Tensor]) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        output = way(llama, "inductor", prompt())
    want = oracle(tiny_llama(depth=2), output[:, :-1], 5, track.layers)
    torch.testing.assert_close(track.descriptors[0].double(), want, rtol=1e-3, atol=1e-4)


def test_a_prompt_is_watched_in_a_compiled_pass(llama: Any) -> None:
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    ids = prompt(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with EigenTrack(llama, window=WINDOW, start="prompt") as track:
        compiled(ids, attention_mask=mask).logits.sum().backward()
    with EigenTrack(plain := tiny_llama(depth=2), window=WINDOW, start="prompt") as eager:
        plain(ids, attention_mask=mask).logits.sum().backward()
    assert torch.equal(track.eigenvalues.nan_to_num(), eager.eigenvalues.nan_to_num())
    assert track.lengths.tolist() == [5, 7]
    assert torch.equal(llama.lm_head.weight.grad, plain.lm_head.weight.grad)


@pytest.mark.parametrize("cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=64)])
def test_nothing_is_compiled_again_per_token(llama: Any, cache: Any) -> None:
    compiled = torch.compile(llama, fullgraph=True, backend="eager")
    with EigenTrack(llama, window=WINDOW) as track:
        by_hand(compiled, cache(config=llama.config), prompt(), 5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            by_hand(compiled, cache(config=llama.config), prompt(), 30)
    assert track.steps == 29


def test_a_graph_outlives_its_monitor(llama: Any) -> None:
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    track = EigenTrack(llama, window=WINDOW)
    with track:
        first = by_hand(compiled, None, prompt())
    before = track.descriptors
    assert hooks_of(llama) == 0
    assert torch.equal(by_hand(compiled, None, prompt()), first)
    assert torch.equal(track.descriptors, before)
    gone = weakref.ref(track)
    del track
    gc.collect()
    assert gone() is None
    assert torch.equal(by_hand(compiled, None, prompt()), first)


def test_monitors_of_many_models_share_graphs() -> None:
    """torch.compile gives up after 8 variants of one function: a monitor must not be one of them."""
    for seed in range(10):
        model = tiny_llama(depth=2)
        with EigenTrack(model, window=WINDOW) as track:
            output = kept(model, "eager", prompt(seed=seed))
        assert torch.equal(track.tokens, output[:, 5:-1])


def test_beam_search_on_a_compiled_model_is_refused(llama: Any) -> None:
    llama.compile(fullgraph=True, backend="eager")
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(skip_nnmodule_hook_guards=False),
        EigenTrack(llama, window=WINDOW),
        pytest.raises(UnsupportedGenerationError, match="num_beams"),
    ):
        llama.generate(prompt(), max_new_tokens=10, num_beams=3, **GREEDY)


def test_assisted_decoding_of_a_compiled_model_is_refused(llama: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    with EigenTrack(llama, window=WINDOW):
        llama.compile(backend="eager")
        with pytest.raises(UnsupportedGenerationError, match="compile"):
            llama.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=10, do_sample=False)


def test_compiled_models_are_refused() -> None:
    whole, in_place, block, by_forward, by_generate_ = (tiny_llama(depth=2) for _ in range(5))
    in_place.compile()
    block.model.layers[0].compile()
    by_forward.model.forward = torch.compile(by_forward.model.forward)
    by_generate(by_generate_, "eager", prompt())
    for model in (torch.compile(whole), in_place, block, by_forward, by_generate_):
        with pytest.raises(UnsupportedModelError, match="compiled"), EigenTrack(model):
            pass
    assert hooks_of(whole) == 0


def test_a_compiled_form_kept_by_the_caller_is_found(llama: Any) -> None:
    compiled = torch.compile(llama, backend="eager")
    with EigenTrack(llama, start="prompt", window=WINDOW) as track:  # it has not run yet: the hooks are compiled too
        compiled(prompt())
    assert track.steps == 5
    with pytest.raises(UnsupportedModelError, match="compiled"), EigenTrack(llama):
        pass


def test_graphs_that_guard_hooks_let_monitors_come_and_go(llama: Any) -> None:
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False), torch.no_grad():
        compiled = torch.compile(llama, fullgraph=True, backend="eager")
        compiled(prompt())
        for length in (5, 6):
            with EigenTrack(llama, start="prompt", window=WINDOW) as track:
                compiled(prompt(length=length))
            assert track.steps == length
        compiled(prompt())


def test_a_block_whose_passes_were_not_seen_says_so(llama: Any) -> None:
    run = torch.compile(lambda ids: llama(ids).logits, backend="eager")  # nothing on the model shows it
    with torch.no_grad():
        run(prompt())
        with pytest.warns(RuntimeWarning, match="no forward pass"), EigenTrack(llama, start="prompt") as track:
            run(prompt())
    with pytest.raises(EigenTrackError, match="no forward pass"):
        _ = track.descriptors


def test_modules_that_do_not_run_are_named(llama: Any) -> None:
    llama.spare = torch.nn.Linear(32, 32)
    compiled = torch.compile(llama, backend="eager")
    watched = [llama.model.layers[0], llama.spare]
    with pytest.raises(TapError, match="spare"), EigenTrack(llama, start="prompt", modules=watched):
        compiled(prompt())


def test_graphs_of_unwatched_models_of_the_same_class(llama: Any) -> None:
    """generate() compiles a graph that torch.compile takes for every model of the class; it must not go unnoticed."""
    by_generate(tiny_llama(depth=2), "eager", prompt())
    with pytest.raises(TapError, match="another model of this class"), EigenTrack(llama, window=WINDOW):
        by_generate(llama, "eager", prompt())
    torch._dynamo.reset()
    fresh = tiny_llama(depth=2)
    with EigenTrack(fresh, window=WINDOW) as track:
        output = by_generate(fresh, "eager", prompt())
    assert torch.equal(track.tokens, output[:, 5:-1])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        by_generate(tiny_llama(depth=2), "eager", prompt())
        other = tiny_llama(depth=2)
        with EigenTrack(other, window=WINDOW) as track:
            output = by_generate(other, "eager", prompt())
    assert torch.equal(track.tokens, output[:, 5:-1])


@pytest.mark.parametrize("cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=32)])
def test_steps_of_a_wrapper_compiled_before_do_not_go_by_in_silence(llama: Any, cache: Any) -> None:
    step = torch.compile(lambda ids, cache: llama(ids, past_key_values=cache).logits, backend="eager")

    def answer(count: int) -> Any:
        text = cache(config=llama.config)
        llama(prompt(), past_key_values=text)
        for seed in range(count):
            step(prompt(length=1, seed=seed), text)
        return text

    with torch.no_grad():
        answer(3)
        track = EigenTrack(llama, window=WINDOW)
        with pytest.warns(RuntimeWarning, match="did not see"), track:  # noqa: PT031
            text = answer(3)
            with pytest.raises(EigenTrackError, match="did not see"):
                track.descriptors  # noqa: B018
    assert text.get_seq_length() == 8
