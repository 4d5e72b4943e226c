"""The demo's model: accuracy against the float64 oracle on real activations, and a monitor that changes nothing."""

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


@pytest.mark.parametrize("window", [32, 64])
@pytest.mark.parametrize("center", [True, False])
def test_spectra_of_real_activations(hidden: list[torch.Tensor], isa: str, window: int, center: bool) -> None:
    for layer, states in enumerate(hidden):
        width = states.shape[-1]
        gram, seen = rmtkernels.window_gram(states, window)
        exact, _ = window_gram_ref(states, window, dtype=torch.float64)
        got, values = rmtkernels.spectrum_descriptors(gram.transpose(0, 1)[None, :, 0], seen[0], width, center=center)
        want, lam = spectrum_descriptors_ref(exact.transpose(0, 1)[None, :, 0], seen[0], width, center=center)
        assert ((values - lam).abs() <= 1e-6 * lam[..., :1]).all(), f"layer {layer}"
        torch.testing.assert_close(got[..., :-1].double(), want[..., :-1], rtol=1e-3, atol=1e-7, msg=f"layer {layer}")
        assert torch.equal(got[..., -1].double(), want[..., -1]), f"layer {layer}: counts above the edge"


@pytest.mark.parametrize("options", [{"normalize": "rms"}, {"noise": "trace"}, {"normalize": "rms", "center": False}])
def test_spectra_of_real_activations_with_other_settings(hidden: list[torch.Tensor], options: dict[str, Any]) -> None:
    for layer, states in enumerate(hidden[::4]):
        gram, seen = rmtkernels.window_gram(states, 32)
        exact, _ = window_gram_ref(states, 32, dtype=torch.float64)
        got, values = rmtkernels.spectrum_descriptors(gram.transpose(0, 1)[None, :, 0], seen[0], 576, **options)
        want, lam = spectrum_descriptors_ref(exact.transpose(0, 1)[None, :, 0], seen[0], 576, **options)
        assert ((values - lam).abs() <= 1e-6 * lam[..., :1]).all(), f"layer {4 * layer}"
        torch.testing.assert_close(got[..., :-1].double(), want[..., :-1], rtol=1e-3, atol=1e-6)
        assert torch.equal(got[..., -1].double(), want[..., -1]), f"layer {4 * layer}: counts above the edge"


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
