"""methods: what other ways to judge an answer cost while the demo's model generates it, beside the monitor.

A logistic probe of one block's hidden state; LapEigvals (arXiv 2502.17598): the eigenvalues d_ii − a_ii of the
Laplacian of every attention map, after each token; INSIDE (arXiv 2402.03744): the log-determinant of the covariance of
ten sampled answers. Costs are compared, and not what the methods are worth: docs/detector.md has that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, case
from bench.cases.eigentrack import NEW_TOKENS
from eigentrack import EigenTrack
from eigentrack.loading import demo_model, load_causal_lm
from eigentrack.taps import find_blocks
from eigentrack.watch import encode

TOP, ANSWERS, RIDGE = 10, 10, 1e-3  # eigenvalues per head; INSIDE's answers and regularisation


@contextmanager
def hooked(hooks: list[tuple[Any, Callable[[Any, Any, Any], None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(function) for module, function in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Probe:
    """σ(w · h) of the middle block's newest hidden state."""

    def __init__(self, model: Any) -> None:
        blocks = find_blocks(model)
        self.layer = len(blocks) // 2
        self.block = blocks[self.layer]
        self.weight = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0)) / 100
        self.risks: list[Tensor] = []

    def __call__(self, generate: Callable[[], Tensor]) -> Tensor:
        self.risks.clear()
        with hooked([(self.block, self._after)]):
            return generate()

    def _after(self, module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.risks.append(torch.sigmoid(hidden[:, -1] @ self.weight))


class LapEigvals:
    """After every pass the TOP largest eigenvalues of each head, from sums that grow with the text. Attention must be
    eager: no other gives its weights away."""

    def __init__(self, model: Any) -> None:
        self.model, self.blocks = model, find_blocks(model)
        self.received: list[Tensor] = []  # per block (B, heads, keys)
        self.diagonal: list[Tensor] = []
        self.top: list[Tensor] = []

    def __call__(self, generate: Callable[[], Tensor]) -> Tensor:
        heads = self.model.config.num_attention_heads
        self.received = [torch.zeros(1, heads, 0) for _ in self.blocks]
        self.diagonal, self.top = list(self.received), list(self.received)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            with hooked([(block.self_attn, self._after(index)) for index, block in enumerate(self.blocks)]):
                return generate()
        finally:
            self.model.set_attn_implementation(before)

    def _after(self, index: int) -> Callable[[Any, Any, Any], None]:
        def after(module: Any, args: Any, output: Any) -> None:
            weights = output[1]  # (B, heads, T, keys)
            new, keys = weights.shape[2:]
            sums = torch.nn.functional.pad(self.received[index], (0, new)) + weights.sum(2)
            self.received[index] = sums
            self.diagonal[index] = torch.cat([self.diagonal[index], weights.diagonal(keys - new, 2, 3)], 2)
            values = sums / torch.arange(keys, 0, -1) - self.diagonal[index]
            self.top[index] = values.topk(min(TOP, keys), 2).values

        return after


class Inside:
    """Ten sampled answers at once, and the log-determinant of their last states' covariance at the middle block."""

    def __init__(self, model: Any) -> None:
        blocks = find_blocks(model)
        self.block, self.states, self.score = blocks[len(blocks) // 2], torch.empty(0), torch.empty(0)

    def __call__(self, sample: Callable[[], Tensor]) -> Tensor:
        with hooked([(self.block, self._after)]):
            answers = sample()
        centred = self.states - self.states.mean(1, keepdim=True)
        gram = centred @ centred.T / centred.shape[1]
        self.score = torch.linalg.eigvalsh(gram + RIDGE * torch.eye(ANSWERS)).log().mean()
        return answers

    def _after(self, module: Any, args: Any, output: Any) -> None:
        self.states = (output[0] if isinstance(output, tuple) else output)[:, -1]


@case("methods.generate")
def methods() -> Case:
    model, tokenizer = load_causal_lm(demo_model())
    inputs = encode(tokenizer, "Write a long story about the capital of France.")
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    track = EigenTrack(model, layers="every:3", window=32)
    probe, laplacian, inside = Probe(model), LapEigvals(model), Inside(model)

    def plain() -> Tensor:
        output: Tensor = model.generate(**inputs, **length, do_sample=False)
        return output

    def sample() -> Tensor:
        torch.manual_seed(0)
        output: Tensor = model.generate(**inputs, **length, do_sample=True, num_return_sequences=ANSWERS)
        return output

    def watched() -> Tensor:
        with track:
            return plain()

    peers = {
        "nothing watched": plain,
        "hidden-state probe": lambda: probe(plain),
        "LapEigvals": lambda: laplacian(plain),
        "INSIDE, ten answers": lambda: inside(sample),
    }

    def verify() -> None:
        tokens = watched()
        for name in ("nothing watched", "hidden-state probe", "LapEigvals"):
            assert torch.equal(peers[name](), tokens), f"{name}: changed the model's output"
        check(model, tokens[:, :-1], probe, laplacian)
        assert peers["INSIDE, ten answers"]().shape[0] == ANSWERS, "INSIDE: too few answers"
        states = inside.states.double()
        covariance = (states - states.mean(1, keepdim=True)) @ (states - states.mean(1, keepdim=True)).T
        want = torch.linalg.slogdet(covariance / states.shape[1] + RIDGE * torch.eye(ANSWERS).double())[1] / ANSWERS
        assert abs(inside.score - want) <= 1e-3 * abs(want), "INSIDE: wrong score"

    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    return Case(
        ours=watched,
        peers=peers,
        verify=verify,
        targets={},
        bytes_read=(NEW_TOKENS - 1) * weights,
        footprint=weights,
        rounds=7,
    )


@torch.no_grad()
def check(model: Any, tokens: Tensor, probe: Probe, laplacian: LapEigvals) -> None:
    """Against one pass over the whole text, in float64."""
    model.set_attn_implementation("eager")
    output = model(tokens, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    state = output.hidden_states[probe.layer + 1][0, -1].double()
    assert abs(probe.risks[-1] - torch.sigmoid(state @ probe.weight.double())) <= 1e-4, "hidden-state probe: wrong"
    for attention, found in zip(output.attentions, laplacian.top, strict=True):
        weights = attention[0].double()
        payers = torch.arange(weights.shape[-1], 0, -1)
        want = (weights.sum(1) / payers - weights.diagonal(0, 1, 2)).topk(TOP, 1).values
        assert (found[0] - want).abs().max() <= 1e-4, "LapEigvals: wrong eigenvalues"
