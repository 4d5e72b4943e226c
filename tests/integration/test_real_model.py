"""The demo's model: accuracy against the float64 oracle on real activations, and a monitor that changes nothing."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

import rmtkernels
from eigentrack import EigenTrack
from rmtkernels.reference import spectrum_descriptors_ref, window_gram_ref

TEXT = (
    "The capital of France is Paris. In 1987 the Duchy of Lower Zamunda signed a treaty of 22 clauses on October 22, "
    "1987, and on October 22, 1988 it was signed again, again, again, again. E = mc^2 (1 + 1/2) \u00e9\u4e16\u754c"
)


@pytest.fixture(scope="module")
def hidden(real: tuple[Any, Any]) -> list[torch.Tensor]:
    """Outputs of all 30 blocks on a real text, the massive first token included."""
    model, tokenizer = real
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return list(model(ids, output_hidden_states=True).hidden_states[1:])


def test_the_text_is_a_hard_case(hidden: list[torch.Tensor]) -> None:
    norms = torch.stack([h[0].norm(dim=-1) for h in hidden])
    assert float((norms[:, 0] / norms[:, 1:].median(1).values).max()) > 50, "no massive first token"
    spread = torch.stack([h[0, 1:].abs().max(0).values for h in hidden])
    assert float((spread.max(1).values / spread.median(1).values).max()) > 20, "no outlier dimension"


@pytest.fixture(scope="module")
def exact_grams(hidden: list[torch.Tensor]) -> Callable[[int], list[torch.Tensor]]:
    """Window -> (1, T, N, N) float64 Gram matrices of every layer, made once: the oracle takes its time."""
    return lru_cache(lambda window: [_stacked(window_gram_ref(h, window, dtype=torch.float64)[0]) for h in hidden])


def _stacked(gram: torch.Tensor) -> torch.Tensor:
    """(1, T, N, N) of one sequence, as windows of a batch."""
    return gram.transpose(0, 1)[None, :, 0]


@pytest.mark.parametrize(
    ("window", "options"),
    [
        (32, {"normalize": "rms"}),  # what the monitor does
        (64, {"normalize": "rms"}),
        (32, {"normalize": "rms", "center": False, "noise": "trace"}),
        (32, {}),
        (64, {}),
        (32, {"center": False}),
        (64, {"center": False, "noise": "trace"}),
    ],
)
def test_spectra_of_real_activations(
    hidden: list[torch.Tensor], exact_grams: Callable[[int], list[torch.Tensor]], window: int, options: dict[str, Any]
) -> None:
    for layer, (states, exact) in enumerate(zip(hidden, exact_grams(window), strict=True)):
        gram, seen = rmtkernels.window_gram(states, window)
        want, lam = spectrum_descriptors_ref(exact, seen[0], states.shape[-1], **options)
        for isa in rmtkernels.cpu_isas():
            rmtkernels.set_cpu_isa(isa)
            got, values = rmtkernels.spectrum_descriptors(_stacked(gram), seen[0], states.shape[-1], **options)
            assert ((values - lam).abs() <= 1e-6 * lam[..., :1]).all(), f"layer {layer}"
            torch.testing.assert_close(
                got[..., :-1].double(), want[..., :-1], rtol=1e-3, atol=1e-7, msg=f"layer {layer}"
            )
            assert torch.equal(got[..., -1].double(), want[..., -1]), f"layer {layer}: counts above the edge"
        rmtkernels.set_cpu_isa("auto")


def test_short_centred_windows_keep_the_precision_of_their_gram_matrix(hidden: list[torch.Tensor]) -> None:
    """Where a few similar rows leave little but their mean, centring cancels digits that float32 does not have."""
    for layer, states in enumerate(hidden):
        gram, seen = rmtkernels.window_gram(states, 8)
        exact, _ = window_gram_ref(states, 8, dtype=torch.float64)
        stacked, rounded = exact.transpose(0, 1)[None, :, 0], gram.transpose(0, 1)[None, :, 0]
        _, raw = spectrum_descriptors_ref(stacked, seen[0], states.shape[-1], center=False)
        want, lam = spectrum_descriptors_ref(stacked, seen[0], states.shape[-1])
        got, values = rmtkernels.spectrum_descriptors(rounded, seen[0], states.shape[-1])
        assert ((values - lam).abs() <= 2e-7 * raw[..., :1]).all(), f"layer {layer}"
        torch.testing.assert_close(got[..., :-1].double(), want[..., :-1], rtol=1e-3, atol=1e-7, msg=f"layer {layer}")


@pytest.mark.parametrize("joint", ["trace", "none"])
def test_joint_spectra_of_real_activations(hidden: list[torch.Tensor], joint: str) -> None:
    taps = hidden[2::3]
    pairs = [rmtkernels.window_gram(states, 32) for states in taps]
    exact = torch.stack([window_gram_ref(states, 32, dtype=torch.float64)[0][0] for states in taps])
    seen = pairs[0][1][0]
    got, values = rmtkernels.spectrum_descriptors(torch.stack([g[0] for g, _ in pairs]), seen, 576, joint=joint)
    want, lam = spectrum_descriptors_ref(exact, seen, 576, joint=joint)
    assert ((values - lam).abs() <= 1e-6 * lam[..., :1]).all()
    torch.testing.assert_close(got[..., :-1].double(), want[..., :-1], rtol=1e-3, atol=1e-7)
    assert torch.equal(got[..., -1].double(), want[..., -1])


def test_watching_leaves_the_real_model_alone(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    tokenizer.padding_side = "left"
    inputs = tokenizer(["The capital of France is", "Water boils at"], return_tensors="pt", padding=True)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    before = model.generate(**inputs, **options)
    with EigenTrack(model) as track:
        after = model.generate(**inputs, **options)
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    assert track.layers == list(range(2, 30, 3))
    assert track.descriptors.shape == (2, 11, 10 * len(rmtkernels.DESCRIPTORS))
