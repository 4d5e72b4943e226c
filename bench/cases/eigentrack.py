"""The monitor in `generate`, on the demo's model: time inside its calls, and generation with it against without."""

from typing import Any

import torch

from bench.case import Case, case
from eigentrack import Detector, EigenTrack
from eigentrack.loading import demo_model, load_causal_lm
from eigentrack.watch import encode

NEW_TOKENS = 48


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
    track = EigenTrack(model, **options)
    if detector:
        track = EigenTrack(model, detector=made_up(track))

    def plain() -> torch.Tensor:
        output: torch.Tensor = model.generate(
            **inputs, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return output

    def watched() -> torch.Tensor:
        with track:
            return plain()

    def verify() -> None:
        assert torch.equal(watched(), plain()), "the monitor changed the model's output"
        assert track.lengths.tolist() == [NEW_TOKENS - 1], "not every token was watched"

    return Case(
        ours=watched,
        peers={"without the monitor": plain},
        verify=verify,
        targets={},
        extra=lambda: {"share of decode time inside the monitor": track.overhead().share},
        limits={"share of decode time inside the monitor": limit},
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
