"""EigenTrack over the ways a model is called: modes, caches, prompts, several requests in turn."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    StaticCache,
)

from eigentrack import EigenTrack, TapError, UnsupportedGenerationError, UnsupportedModelError
from eigentrack.taps import find_blocks
from rmtkernels import DESCRIPTORS
from rmtkernels.reference import spectrum_descriptors_ref, window_gram_ref
from tests.integration.families import build
from tests.integration.test_monitor import WINDOW, generate, hidden_states, oracle, prompt

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def assert_watched(track: EigenTrack, model: Any, output: torch.Tensor, first: int) -> None:
    want = oracle(model, output[:, :-1], first, track.layers)
    assert torch.equal(track.tokens, output[:, first:-1])
    torch.testing.assert_close(track.descriptors[0].double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_results_can_be_read_outside_of_the_mode_they_were_made_in(llama: Any, mode: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        with mode():
            generate(llama, prompt(), 12)
        output = generate(llama, prompt(seed=4), 280)  # in another mode, and beyond the first buffer
    assert_watched(track, llama, output, 5)


def test_results_are_copies(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        generate(llama, prompt())
    for name in ("descriptors", "eigenvalues", "tokens"):
        before = getattr(track, name).clone()
        getattr(track, name).zero_()
        assert torch.equal(getattr(track, name), before)


@pytest.mark.parametrize("config", [Qwen2Config, Gemma2Config])
def test_a_static_cache(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SMALL)).eval()
    with EigenTrack(model, window=WINDOW) as track:
        output = generate(model, prompt(), 12, cache_implementation="static")
    assert_watched(track, model, output, 5)
    with pytest.raises(UnsupportedGenerationError, match="padding"), EigenTrack(model, start="prompt"):
        model(prompt(2), attention_mask=torch.ones(2, 1, 5, 3, dtype=torch.bool))


def test_a_prompt_of_embeddings(llama: Any) -> None:
    ids = prompt()
    with EigenTrack(llama, window=WINDOW, start="prompt") as track:
        llama(inputs_embeds=llama.get_input_embeddings()(ids))
    assert track.tokens.tolist() == [[-1] * 5]
    assert track.lengths.tolist() == [5]


def test_several_answers_to_one_prompt(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        output = generate(llama, prompt(), 12, num_return_sequences=3)
    assert torch.equal(track.tokens, output[:, 5:-1])
    assert len({tuple(row) for row in track.descriptors[:, -1].tolist()}) == 3


def test_a_loop_by_hand_with_a_positional_cache(llama: Any) -> None:
    ids = prompt()
    with EigenTrack(llama, window=WINDOW) as track, torch.no_grad():
        result, tokens = llama(ids, use_cache=True), [ids]
        for _ in range(12):
            tokens.append(result.logits[:, -1:].argmax(-1).clamp(min=3))
            result = llama(tokens[-1], None, None, result.past_key_values)
    assert torch.equal(track.tokens, torch.cat(tokens[1:], 1))


def test_the_last_token_of_a_prompt_behind_a_cached_prefix_is_no_answer(llama: Any) -> None:
    ids = prompt()
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids[:, :-1], past_key_values=cache)
    with EigenTrack(llama, window=WINDOW) as track:
        output = generate(llama, ids, 12, past_key_values=copy.deepcopy(cache))
    assert torch.equal(track.tokens, output[:, 5:-1])


def test_another_cache_is_another_request(llama: Any) -> None:
    def loop(ids: torch.Tensor) -> Any:
        result = llama(ids, use_cache=True)
        while True:
            yield (
                result := llama(result.logits[:, -1:].argmax(-1).clamp(min=3), past_key_values=result.past_key_values)
            )

    with torch.no_grad(), EigenTrack(llama, window=WINDOW) as track:
        one, two = loop(prompt(seed=1)), loop(prompt(seed=2))
        for _ in range(4):
            next(one)
        next(two)
        assert track.steps == 1
        next(one)  # the monitor has left this text: its next token begins a request, and is the prompt's
        assert track.steps == 0 or not track.watching


def test_in_a_second_turn_everybody_takes_part_again(llama: Any) -> None:
    ids = prompt(2, seed=5)
    cache = DynamicCache(config=llama.config)
    free = generate(llama, ids, 8, do_sample=False)
    end = int(free[0, 8])
    with EigenTrack(llama, window=WINDOW, start="prompt", end_tokens=[end, 0]) as track, torch.no_grad():
        llama(ids, past_key_values=cache)
        for step in range(5, 13):
            llama(free[:, step : step + 1], past_key_values=cache)
        ended = track.lengths.tolist()
        llama(prompt(2, 4, seed=6), past_key_values=cache)
    assert ended[0] < ended[1] == 13
    assert track.lengths.tolist() == [ended[0] + 4, 17]


@pytest.mark.parametrize(
    "options",
    [
        {"center": False, "noise": "trace", "normalize": None},
        {"normalize": "rms"},
        {"normalize": None},
        {"spectra": "joint", "layer_scale": "none", "normalize": None},
        {"spectra": "joint", "layer_scale": "trace", "normalize": "rms"},
    ],
)
def test_options_reach_the_spectrum(llama: Any, options: dict[str, Any]) -> None:
    options = dict(options)
    with EigenTrack(llama, window=WINDOW, **options) as track:
        output = generate(llama, prompt())
    with torch.no_grad():
        states = [hidden_states(llama, output[:, :-1])[layer][:, 5:] for layer in track.layers]
    pairs = [window_gram_ref(state, WINDOW, dtype=torch.float64) for state in states]
    gram, seen = torch.cat([gram for gram, _ in pairs]), pairs[0][1][0]
    joint = options.pop("layer_scale", None)
    options.pop("spectra", None)
    want, _ = spectrum_descriptors_ref(gram, seen, 32, joint=joint, **options)
    torch.testing.assert_close(track.descriptors[0].double(), want.transpose(0, 1).flatten(1), rtol=1e-3, atol=1e-4)


def test_nothing_of_the_forward_pass_is_kept(llama: Any) -> None:
    with EigenTrack(llama, start="prompt", window=WINDOW) as track:
        result = llama(prompt())
        graph = weakref.ref(result.logits)
        outputs = weakref.ref(hidden_states(llama, prompt())[-1])
        del result
        gc.collect()
        assert graph() is None and outputs() is None
    assert track.steps == 5


def test_modules_that_do_not_run_are_named(llama: Any) -> None:
    llama.spare = torch.nn.Linear(32, 32)
    with pytest.raises(TapError, match="spare"), EigenTrack(llama, modules=[llama.model.layers[0], llama.spare]):
        generate(llama, prompt())
    generate(llama, prompt())


@pytest.mark.parametrize("pick", [lambda m: [], lambda m: [m.model.layers[0]] * 2, lambda m: [torch.nn.Identity()]])
def test_wrong_modules_are_refused(llama: Any, pick: Any) -> None:
    with pytest.raises(TapError, match="modules"):
        EigenTrack(llama, modules=pick(llama))


def test_models_without_a_key_value_cache_are_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(UnsupportedModelError, match="past_key_values"), EigenTrack(model):
        pass
    with EigenTrack(model, start="prompt", window=WINDOW) as track, torch.no_grad():
        model(prompt())
    assert track.lengths.tolist() == [5]


def test_blocks_are_the_largest_outermost_list() -> None:
    model = torch.nn.Module()
    model.many_small = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(9))
    model.blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    for block in model.blocks:
        block.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))
    assert find_blocks(model) == list(model.blocks)


@pytest.mark.parametrize("spectra", ["per_layer", "joint"])
def test_the_feed_forward_part(model: Any, spectra: str) -> None:
    with EigenTrack(model, tap="mlp", layers=[1, -1], window=WINDOW, spectra=spectra) as track:
        output = generate(model, prompt())
    blocks = find_blocks(model)
    parts = [blocks[1].mlp, blocks[5].mlp]
    with EigenTrack(model, modules=parts, window=WINDOW, spectra=spectra) as named:
        assert torch.equal(generate(model, prompt()), output)
    assert torch.equal(track.descriptors, named.descriptors)
    if spectra == "per_layer":
        assert track.names == [f"layer{index}.mlp.{name}" for index in (1, 5) for name in DESCRIPTORS]
        with EigenTrack(model, layers=[1, -1], window=WINDOW) as residual:
            generate(model, prompt())
        assert not torch.equal(track.descriptors, residual.descriptors)


def test_a_block_without_a_known_feed_forward_part_names_its_children() -> None:
    model = BertModel(BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(TapError, match="attention, intermediate, output"):
        EigenTrack(model, tap="mlp", start="prompt")


def test_tap_and_modules_exclude_each_other(llama: Any) -> None:
    with pytest.raises(TapError, match="either"):
        EigenTrack(llama, tap="mlp", modules=[llama.model.layers[0]])


def test_modules_that_return_no_row_per_token_are_refused(llama: Any) -> None:
    class Halved(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden[:, ::2]

    llama.probe = Halved()
    llama.model.layers[0].register_forward_hook(lambda m, a, output: (llama.probe(output), output)[1])
    with pytest.raises(TapError, match="row per token"), EigenTrack(llama, start="prompt", modules=[llama.probe]):
        llama(prompt())


def test_only_the_vision_tower_is_larger() -> None:
    """The blocks are the language model's all the same."""
    model = build("Llava")
    blocks = find_blocks(model)
    assert blocks == list(model.model.language_model.layers)
    vision = model.model.vision_tower
    assert sum(p.numel() for p in vision.parameters()) > sum(p.numel() for p in model.model.language_model.parameters())


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_padding_in_a_prepared_mask_behind_a_filled_cache(llama: Any, kind: torch.dtype) -> None:
    ids = prompt(2, 7)
    mask = torch.ones(7, 32, dtype=torch.bool).tril()[4:].repeat(2, 1, 1, 1)
    mask[0, :, :, 6] = False  # the last token of the first sequence
    if kind == torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    cache = StaticCache(config=llama.config, max_cache_len=32)
    with EigenTrack(llama, start="prompt", window=WINDOW) as track, torch.no_grad():
        llama(ids[:, :4], past_key_values=cache)
        llama(ids[:, 4:], past_key_values=cache, attention_mask=mask)
    assert track.watched.tolist() == [[True] * 6 + [False], [True] * 7]


@pytest.mark.parametrize("columns", [7, 32])
def test_padding_in_a_mask_as_long_as_a_static_cache(llama: Any, columns: int) -> None:
    ids = prompt(2, 7)
    cache = StaticCache(config=llama.config, max_cache_len=32)
    mask = torch.zeros(2, columns, dtype=torch.long)
    mask[:, :7] = 1
    mask[0, 4] = 0
    with EigenTrack(llama, start="prompt", window=WINDOW) as track, torch.no_grad():
        llama(ids[:, :4], past_key_values=cache, attention_mask=mask[:, :4] if columns == 7 else mask)
        llama(ids[:, 4:], past_key_values=cache, attention_mask=mask)
    assert track.watched.tolist() == [[True] * 4 + [False, True, True], [True] * 7]


def test_modules_of_different_widths_are_named(llama: Any) -> None:
    block = llama.model.layers[0]
    track = EigenTrack(llama, modules=[block, block.mlp.up_proj])
    with pytest.raises(TapError, match=r"layers\.0 float32 \(1, 1, 32\), .*up_proj float32 \(1, 1, 64\)"), track:
        generate(llama, prompt())
    assert not track.watching


def test_double_precision_is_named(llama: Any) -> None:
    with pytest.raises(TapError, match="float32, bfloat16 and float16; got layer2 float64"), EigenTrack(llama):
        generate(llama.double(), prompt())


@pytest.mark.parametrize("positional", [False, True])
def test_a_wrapper_that_passes_everything_on(llama: Any, positional: bool) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model, tokens, cache = Wrapper(), prompt(), DynamicCache(config=llama.config)
    with EigenTrack(model, window=WINDOW) as track, torch.no_grad():
        for ids in (tokens, tokens[:, :1], tokens[:, 1:2]):
            args, kwargs = ((ids,), {}) if positional else ((), {"input_ids": ids})
            model(*args, past_key_values=cache, **kwargs)
    assert torch.equal(track.tokens, tokens[:, :2])
