"""The monitor in `generate` and over texts, on the demo's model: time inside its calls, and the model with it against
without. The floor is that of reading the weights once for each token, or of their products over a text."""

from typing import Any

import torch

from bench.case import Case, case
from eigentrack import Detector, EigenTrack
from eigentrack.loading import demo_model, load_causal_lm
from eigentrack.watch import encode

NEW_TOKENS = 48
TEXTS = (8, 64)  # batch, tokens


def made_up(track: EigenTrack) -> Detector:
    """A detector of the usual size that knows nothing: what it costs does not depend on that."""
    random = torch.Generator().manual_seed(0)
    sequences = [torch.randn(8, len(track.names), generator=random) for _ in range(20)]
    detector = Detector(track.names, settings=track.settings)
    detector.fit(sequences, [i % 2 for i in range(20)], items=range(20), epochs=1, progress=False)
    return detector


def generation(limit: float, detector: bool = False, **options: Any) -> Case:
    model, tokenizer = load_causal_lm(demo_model())
    inputs = encode(tokenizer, "Write a long story about the capital of France.")
    if detector:
        options = {"detector": made_up(EigenTrack(model, **options))}
    track, checked = EigenTrack(model, **options), EigenTrack(model, **options)

    def plain() -> torch.Tensor:
        output: torch.Tensor = model.generate(
            **inputs, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return output

    def watched() -> torch.Tensor:
        with track:
            return plain()

    def verify() -> None:
        """By another monitor: a process's first step makes tables of the laws, which is not counted to the tokens."""
        with checked:
            output = plain()
        assert torch.equal(output, plain()), "the monitor changed the model's output"
        assert checked.lengths.tolist() == [NEW_TOKENS - 1], "not every token was watched"

    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    return Case(
        ours=watched,
        peers={"without the monitor": plain},
        verify=verify,
        targets={},
        extra=lambda: {"share of decode time inside the monitor": track.overhead().share},
        limits={"share of decode time inside the monitor": limit},
        bytes_read=(NEW_TOKENS - 1) * weights,
        footprint=weights,
        rounds=12,
    )


@case("eigentrack.generate_every_third_layer")
def every_third_layer() -> Case:
    return generation(0.01, layers="every:3", window=32)


@case("eigentrack.generate_with_detector")
def with_detector() -> Case:
    return generation(0.01, detector=True, layers="every:3", window=32)


@case("eigentrack.generate_joint")
def joint() -> Case:
    return generation(0.01, layers="every:3", window=32, spectra="joint")


@case("eigentrack.generate_all_layers_64")
def all_layers() -> Case:
    return generation(0.03, layers="all", window=64)


@case("eigentrack.features_of_texts")
def features() -> Case:
    """What training a detector needs of texts that are there: descriptors of every token, in one forward pass."""
    model, _ = load_causal_lm(demo_model())
    ids = torch.randint(0, model.config.vocab_size, TEXTS, generator=torch.Generator().manual_seed(0))
    track = EigenTrack(model, layers="every:3", window=32, start="prompt", end_tokens=())

    @torch.no_grad()
    def bare() -> torch.Tensor:
        logits: torch.Tensor = model(ids, logits_to_keep=1).logits
        return logits

    @torch.no_grad()
    def watched() -> torch.Tensor:
        with track:
            logits: torch.Tensor = model(ids, logits_to_keep=1).logits
        return logits

    def verify() -> None:
        assert torch.equal(watched(), bare()), "the monitor changed the model's output"
        assert track.descriptors.shape[:2] == TEXTS and track.descriptors.isfinite().all(), (
            "not every token was watched"
        )

    weights = sum(parameter.numel() for parameter in model.model.layers.parameters())
    return Case(
        ours=watched,
        peers={"the forward pass alone": bare},
        verify=verify,
        targets={"the forward pass alone": 1 / 1.05},
        bytes_read=4 * weights,
        flops=2 * weights * ids.numel(),
        flops_dtype=torch.float32,
        rounds=9,
    )
