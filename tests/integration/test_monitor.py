"""EigenTrack on tiny models: what it watches, and that it leaves the model as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from eigentrack import EigenTrack, EigenTrackError, TapError, UnsupportedGenerationError, UnsupportedModelError, windows
from eigentrack.history import History
from rmtkernels import DESCRIPTORS
from rmtkernels.reference import spectrum_descriptors_ref, window_gram_ref

WINDOW = 8


def prompt(batch: int = 1, length: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Tensor, new_tokens: int = 20, **options: Any) -> Tensor:
    torch.manual_seed(0)
    options = {"do_sample": True, "eos_token_id": None, "suppress_tokens": [0, 1, 2], **options}
    return model.generate(
        ids, attention_mask=options.pop("attention_mask", ids != 0), max_new_tokens=new_tokens, **options
    )


def assert_same_spectra(values: Tensor, want: Tensor) -> None:
    """(T, S, N) eigenvalues, equal to 1e-5 of the largest: what another batch shape may change in the hidden states."""
    assert values.shape == want.shape
    assert ((values - want).abs() <= 1e-5 * want[..., :1]).all()


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def oracle(model: Any, tokens: Tensor, first: int, layers: list[int], joint: str | None = None) -> Tensor:
    """(T, F) float64 descriptors of a (1, T) sequence from position `first` on, from the model's own hidden states."""
    with torch.no_grad():
        blocks = hidden_states(model, tokens)
    grams = [window_gram_ref(blocks[i][:, first:], WINDOW, dtype=torch.float64) for i in layers]
    gram, seen = torch.cat([g for g, _ in grams]), grams[0][1][0]
    values, _ = spectrum_descriptors_ref(gram, seen, blocks[0].shape[-1], joint=joint, normalize="rms")
    return values.transpose(0, 1).flatten(1)


def hidden_states(model: Any, tokens: Tensor) -> list[Tensor]:
    """Outputs of all blocks, collected by hooks of the test's own."""
    collected: list[Tensor] = []
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    handles = [
        b.register_forward_hook(lambda m, a, out: collected.append(out[0] if isinstance(out, tuple) else out))
        for b in blocks
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    return collected


@pytest.mark.parametrize("spectra", ["per_layer", "joint"])
@pytest.mark.parametrize("start", ["answer", "prompt"])
def test_descriptors_equal_the_oracle_on_the_hidden_states(model: Any, spectra: str, start: str) -> None:
    ids = prompt()
    with EigenTrack(model, window=WINDOW, spectra=spectra, start=start) as track:
        output = generate(model, ids)
    first = ids.shape[1] if start == "answer" else 0
    want = oracle(model, output[:, :-1], first, track.layers, "trace" if spectra == "joint" else None)
    assert track.descriptors.shape == (1, output.shape[1] - 1 - first, len(track.names)) == (1, *want.shape)
    torch.testing.assert_close(track.descriptors[0].double(), want, rtol=1e-3, atol=1e-4)
    assert torch.equal(track.tokens, output[:, first:-1])
    assert track.lengths.tolist() == [want.shape[0]]


def test_outputs_are_bit_identical_and_hooks_go_away(model: Any) -> None:
    ids = prompt(2)
    options = {"return_dict_in_generate": True, "output_logits": True}
    before = generate(model, ids, **options)
    with EigenTrack(model, layers="all"):
        assert hooks_of(model) == 6 + 2
        watched = generate(model, ids, **options)
    assert hooks_of(model) == 0
    assert torch.equal(before.sequences, watched.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, watched.logits, strict=True))


def test_hooks_go_away_when_generation_fails(llama: Any) -> None:
    class BoomError(RuntimeError):
        pass

    def fail(*args: Any) -> None:
        raise BoomError

    handle = llama.model.layers[3].register_forward_hook(fail)
    with pytest.raises(BoomError), EigenTrack(llama, layers="all"):
        generate(llama, prompt())
    handle.remove()
    assert hooks_of(llama) == 0
    with EigenTrack(llama, layers="all") as track:
        generate(llama, prompt())
    assert track.lengths.tolist() == [19]


def test_no_graph_is_kept_and_gradients_are_unchanged(llama: Any) -> None:
    ids = prompt(2, 12)

    def gradient() -> Tensor:
        llama.zero_grad()
        llama(ids, labels=ids).loss.backward()
        return llama.model.layers[0].mlp.up_proj.weight.grad.clone()

    plain = gradient()
    with EigenTrack(llama, start="prompt", window=WINDOW) as track:
        watched = gradient()
    assert torch.equal(plain, watched)
    assert not track.descriptors.requires_grad and not track.eigenvalues.requires_grad
    assert track.descriptors.shape[:2] == (2, 12)


@pytest.mark.parametrize("start", ["answer", "prompt"])
def test_left_padding_and_batch_mates_change_nothing(model: Any, start: str) -> None:
    short, long = prompt(1, 3, seed=2), prompt(1, 7, seed=3)
    batch = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1), long])
    with EigenTrack(model, window=WINDOW, start=start) as track:
        generate(model, batch, 12, do_sample=False)
    together, watched = track.eigenvalues, ~track.descriptors.isnan().any(-1)
    for row, ids in enumerate((short, long)):
        with EigenTrack(model, window=WINDOW, start=start) as track:
            generate(model, ids, 12, do_sample=False)
        assert_same_spectra(together[row][watched[row]], track.eigenvalues[0])


def test_tokens_from_the_end_token_on_are_not_watched(llama: Any) -> None:
    ids = prompt(2, seed=5)
    free = generate(llama, ids, 12, do_sample=False)
    end = int(free[0, 5 + 4])
    assert end not in free[1, 5:].tolist(), "the seed must end the first sequence alone"
    with EigenTrack(llama, window=WINDOW, end_tokens=[end, 0]) as track:
        generate(llama, ids, 12, eos_token_id=end, do_sample=False)
    ended = free[0, 5:].tolist().index(end)
    assert track.lengths.tolist() == [ended, 11]
    assert track.descriptors[0, ended:].isnan().all() and not track.descriptors[0, :ended].isnan().any()
    with EigenTrack(llama, window=WINDOW, end_tokens=[end, 0]) as alone:
        generate(llama, ids[:1], 12, eos_token_id=end, do_sample=False)
    assert alone.lengths.tolist() == [ended]
    assert_same_spectra(track.eigenvalues[0, :ended], alone.eigenvalues[0])


def test_end_tokens_come_from_the_generation_config(llama: Any) -> None:
    assert EigenTrack(llama)._end_tokens == [0, 2]


def test_a_second_request_starts_afresh(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        generate(llama, prompt(2, 6, seed=7), 9)
        first = track.descriptors
        generate(llama, prompt(1, 4, seed=8), 15)
        assert track.descriptors.shape[:2] == (1, 14)
        generate(llama, prompt(2, 6, seed=7), 9)
        assert torch.equal(track.descriptors, first)


def test_histories_longer_than_their_first_buffer(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW, layers=[-1]) as track:
        output = generate(llama, prompt(), 300)
    assert torch.equal(track.tokens, output[:, 5:-1])
    want = oracle(llama, output[:, :-1], 5, [5])
    torch.testing.assert_close(track.descriptors[0].double(), want, rtol=1e-3, atol=1e-4)


def test_chosen_modules_and_names(llama: Any) -> None:
    mlps = [block.mlp for block in llama.model.layers[:2]]
    with EigenTrack(llama, modules=mlps, window=WINDOW) as track:
        generate(llama, prompt())
    assert track.names == [f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in DESCRIPTORS]
    assert track.descriptors.shape == (1, 19, 2 * len(DESCRIPTORS))


@pytest.mark.parametrize(
    ("layers", "want"),
    [("all", [0, 1, 2, 3, 4, 5]), ("every:3", [2, 5]), ("every:4", [1, 5]), ("every:9", [5]), ([0, -1], [0, 5])],
)
def test_layer_choice(llama: Any, layers: Any, want: list[int]) -> None:
    assert EigenTrack(llama, layers=layers).layers == want


@pytest.mark.parametrize("layers", ["every:0", "every:", "every:-1", "some", [], [6], [-7], [1, 1], [1, -5]])
def test_wrong_layers_are_refused(llama: Any, layers: Any) -> None:
    with pytest.raises(TapError):
        EigenTrack(llama, layers=layers)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"window": 129},
        {"spectra": "both"},
        {"start": "now"},
        {"layer_scale": "x"},
        {"normalize": "l2"},
        {"noise": 1},
    ],
)
def test_wrong_options_are_refused(llama: Any, options: dict[str, Any]) -> None:
    with pytest.raises(EigenTrackError):
        EigenTrack(llama, **options)


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(TapError, match="modules="):
        EigenTrack(torch.nn.Linear(2, 2))


def test_beam_search_is_refused_and_the_next_request_works(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as track:
        with pytest.raises(UnsupportedGenerationError, match="num_beams"):
            generate(llama, prompt(), num_beams=3)
        generate(llama, prompt())
        assert track.lengths.tolist() == [19]


def test_a_second_turn_with_a_kept_cache_starts_a_new_answer(llama: Any) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=llama.config)
    with EigenTrack(llama, window=WINDOW) as track:
        first = generate(llama, prompt(), 9, past_key_values=cache)
        second = generate(llama, torch.cat([first, prompt(1, 4, seed=9)], 1), 12, past_key_values=cache)
    assert torch.equal(track.tokens, second[:, first.shape[1] + 4 : -1])
    want = oracle(llama, second[:, :-1], first.shape[1] + 4, track.layers)
    torch.testing.assert_close(track.descriptors[0].double(), want, rtol=1e-3, atol=1e-4)


def test_the_users_cache_is_left_as_it_was(llama: Any) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=llama.config)
    with EigenTrack(llama):
        generate(llama, prompt(), past_key_values=cache)
    assert not {"reorder_cache", "crop"} & set(vars(cache))


def test_generation_without_a_cache_is_refused(llama: Any) -> None:
    with EigenTrack(llama), pytest.raises(UnsupportedGenerationError, match="use_cache"):
        generate(llama, prompt(), use_cache=False)
    with EigenTrack(llama, start="prompt", window=WINDOW) as track:
        output = generate(llama, prompt(), use_cache=False)
    want = oracle(llama, output[:, :-1], 0, track.layers)
    torch.testing.assert_close(track.descriptors[0].double(), want, rtol=1e-3, atol=1e-4)


def test_encoder_decoder_models_are_refused(llama: Any) -> None:
    llama.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModelError, match="decoder-only"), EigenTrack(llama):
        pass


def test_a_block_without_a_forward_pass_warns(llama: Any) -> None:
    with pytest.warns(RuntimeWarning, match="no forward pass"), EigenTrack(llama):
        pass


def test_reading_before_anything_was_watched(llama: Any) -> None:
    with pytest.raises(EigenTrackError, match="nothing has been watched"):
        _ = EigenTrack(llama).descriptors


def test_a_module_that_runs_twice_is_refused(llama: Any) -> None:
    shared = llama.model.layers[1]
    llama.model.layers[2] = shared
    with pytest.raises(EigenTrackError, match="ran twice"), EigenTrack(llama, modules=[shared, llama.model.layers[5]]):
        generate(llama, prompt())


def test_rows_that_are_not_finite_are_skipped(llama: Any) -> None:
    llama.probe = torch.nn.Identity()
    calls = 0

    def copy_to_probe(module: Any, args: Any, output: Tensor) -> None:  # the model itself must not see the NaN
        nonlocal calls
        calls += 1
        llama.probe(output * float("nan") if calls == 5 else output)

    llama.model.layers[5].register_forward_hook(copy_to_probe)
    with EigenTrack(llama, modules=[llama.probe], window=WINDOW) as track:
        generate(llama, prompt())
    assert track.steps == 19 and track.lengths.tolist() == [18]
    assert track.descriptors[0].isnan().any(-1).nonzero().flatten().tolist() == [3]


def test_two_monitors_on_one_model(llama: Any) -> None:
    with EigenTrack(llama, window=WINDOW) as alone:
        generate(llama, prompt())
    with EigenTrack(llama, window=WINDOW) as one, EigenTrack(llama, layers="all", window=16) as other:
        generate(llama, prompt())
    assert torch.equal(one.descriptors, alone.descriptors)
    assert other.descriptors.shape == (1, 19, 6 * len(DESCRIPTORS))
    assert hooks_of(llama) == 0


def test_entering_twice_is_refused(llama: Any) -> None:
    track = EigenTrack(llama, start="prompt")
    with track:
        with pytest.raises(EigenTrackError, match="attached already"), track:
            pass
        assert hooks_of(llama) == 2 + 2
        llama(prompt())
    assert hooks_of(llama) == 0


def test_overhead_counts_decoded_tokens(llama: Any) -> None:
    with EigenTrack(llama) as track:
        generate(llama, prompt(), 20)
    cost = track.overhead()
    assert cost.tokens == 18  # the last step is not seen to its end
    assert 0 < cost.monitor_ms_per_token < cost.decode_ms_per_token and 0 < cost.share < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(llama: Any, dtype: torch.dtype) -> None:
    llama.to(dtype)
    with EigenTrack(llama, window=WINDOW) as track:
        output = generate(llama, prompt())
    assert track.descriptors.dtype == torch.float32 and track.lengths.tolist() == [output.shape[1] - 6]
    assert not track.descriptors.isnan().any()


def test_a_step_that_fails_is_not_kept(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DynamicCache(config=llama.config)

    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError

    with EigenTrack(llama, window=WINDOW, start="prompt") as track, torch.no_grad():
        llama(prompt(), past_key_values=cache)
        want = track.descriptors
        monkeypatch.setattr(windows, "spectrum_descriptors_", fail)
        with pytest.raises(MemoryError):
            llama(prompt(length=1), past_key_values=cache)
        assert track.steps == 5 and torch.equal(track.descriptors, want)


def test_a_history_is_read_as_it_was_when_reading_began() -> None:
    history = History(1, 1, 1, 1, torch.device("cpu"), capacity=4)
    history.steps = 1

    class Grows:
        def __getitem__(self, rows: slice) -> Tensor:
            history.steps += 1  # another thread
            return values[rows]

    values, history.descriptors = torch.ones(4, 1, 1, 1), Grows()  # type: ignore[assignment]
    history.watched.fill_(True)
    assert history.read("descriptors").shape == (1, 1, 1, 1)
