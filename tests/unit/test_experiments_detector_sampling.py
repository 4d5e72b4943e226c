"""Sampled answers against plain passes over each text, and the scores made of them against their formulas."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("sklearn")

from bench.experiments.detector import consistency, sampling
from bench.experiments.detector.items import Item
from bench.experiments.detector.sampling import Sampler, Way, chosen_token
from bench.experiments.detector.store import Answer

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
GREEDY, FREE = Way(1.0, 1), Way(1.0)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def chances(ways: int, samples: int = 3, steps: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(len(PROMPTS), ways, samples, steps, generator=generator, dtype=torch.float64)


def test_the_likeliest_tokens_are_what_generate_chooses(model: Any) -> None:
    tokens, _ = Sampler(model).sample(PROMPTS, [FREE, GREEDY], chances(2))
    for prompt, drawn in zip(PROMPTS, tokens, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        assert drawn[1] == [[token for token in wanted[0, len(prompt) :].tolist() if token not in (0, 2)]] * 3
        assert drawn[0] != drawn[1]


def test_states_and_draws_are_those_of_each_text_alone(model: Any) -> None:
    given = chances(1)
    tokens, states = Sampler(model).sample(PROMPTS, [FREE], given)
    for place, prompt in enumerate(PROMPTS):
        for sample, drawn in enumerate(tokens[place][0]):
            with torch.no_grad():
                output = model(torch.tensor([prompt + drawn]), output_hidden_states=True)
            middle = output.hidden_states[3][0, -1]  # behind block 2 of 4
            torch.testing.assert_close(states[place, 0, sample], middle, rtol=1e-4, atol=1e-5)
            for step, token in enumerate(drawn):
                logits = output.logits[0, len(prompt) - 1 + step]
                assert int(chosen_token(logits, FREE, given[place, 0, sample, step])) == token


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    chance = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000

    def shares(way: Way) -> torch.Tensor:
        drawn = chosen_token(logits.expand(len(chance), -1), way, chance)
        return torch.bincount(drawn, minlength=4).double() / len(chance)

    torch.testing.assert_close(shares(FREE), logits.double().softmax(0), rtol=0, atol=1e-4)
    cold = (logits[1:3].double() / 0.5).softmax(0)
    torch.testing.assert_close(shares(Way(0.5, 2))[1:3], cold, rtol=0, atol=1e-4)
    # Of .644, .237, .087, .032 the nucleus of .7 is the first two.
    torch.testing.assert_close(shares(Way(1.0, 4, 0.7))[1:3], logits[1:3].double().softmax(0), rtol=0, atol=1e-4)


class Letters:
    """A tokenizer of sorts."""

    def __call__(self, text: str, **_: Any) -> Any:
        return transformers.BatchEncoding({"input_ids": [ord(letter) % 60 + 3 for letter in text]})

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def test_what_was_sampled_is_not_sampled_again(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SHARD", 2)
    items = [Item(key, key, f"prompt {key}", (), (0,)) for key in "abc"]
    folder = tmp_path / "samples"
    sampling.sample_items(Sampler(model), Letters(), items[:2], ("free", "inside"), folder, "")
    before = sampling.read_samples(tmp_path)
    written = (folder / "00000.safetensors").stat().st_mtime_ns
    sampling.sample_items(Sampler(model), Letters(), items[::-1], ("free", "inside"), folder, "")
    after = sampling.read_samples(tmp_path)
    assert (folder / "00000.safetensors").stat().st_mtime_ns == written
    assert list(after) == ["a", "b", "c"]
    assert len(list(folder.iterdir())) == 2
    assert after["a"]["free"].texts == before["a"]["free"].texts
    assert len(after["c"]["inside"].texts) == sampling.SAMPLES and after["c"]["inside"].states.shape[1] == 32


def test_eigen_score_is_the_mean_logarithm_of_the_covariance_s_eigenvalues() -> None:
    states = torch.randn(5, 40) + torch.arange(5.0)[:, None]
    values = np.linalg.eigvalsh(np.cov(states.double().numpy()) + 1e-3 * np.eye(5))
    assert consistency.eigen_score(states) == pytest.approx(np.log(values).mean())
    alike = states[:1] + 0.01 * torch.randn(5, 40)
    assert consistency.eigen_score(alike) < consistency.eigen_score(states)


def test_unigram_counts_words_of_answer_and_samples() -> None:
    mean, highest = consistency.unigram("The cat sat. It ran!", ["The cat ran", "the dog"])
    # the 3, cat 2, ran 2, sat 1, it 1, dog 1: ten words
    first, second = (
        [math.log(10 / n) for n in (3, 2, 1)],
        [math.log(10 / n) for n in (1, 2)],
    )
    assert mean == pytest.approx((np.mean(first) + np.mean(second)) / 2)
    assert highest == pytest.approx((max(first) + max(second)) / 2)
    assert consistency.unigram("...", ["a"]) == (0.0, 0.0)


def test_an_answer_like_the_samples_is_less_risky() -> None:
    vectors = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [0.0, 1.0]}

    def embed(texts: list[str]) -> torch.Tensor:
        return torch.tensor([vectors[text] for text in texts])

    assert consistency.unlike("a", ["a", "b"], embed) == pytest.approx(0.2)
    assert consistency.unlike("c", ["a", "b"], embed) == pytest.approx(0.6)


def test_a_comparison_needs_all_its_answers() -> None:
    def answer(key: str, kind: str, text: str) -> Any:
        item = Item(f"{key}:{kind}", key, "", (), (int(kind != "own"),), kind, gold="Rome")
        empty = torch.zeros(0)
        return Answer(0, item, 0, item.labels[0], "test", text, empty, empty, empty, empty, empty, empty)

    own = [answer("a", "own", "It is Rome."), answer("b", "own", "Paris")]
    partly = [*own, answer("a", "matched", "No"), answer("b", "matched", "No"), answer("a", "random", "No")]
    found = {place: (rows, labels.tolist()) for place, rows, labels in consistency.comparisons("passage", partly)}
    assert found == {
        "passage/own errors": ([0, 1], [0.0, 1.0]),
        "passage/matched": ([0, 1, 2, 3], [0.0, 0.0, 1.0, 1.0]),
    }
