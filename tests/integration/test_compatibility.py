"""Every cell of docs/compatibility.md, against the float64 oracle; CELLS and REFUSED are where the page comes from."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, StaticCache

from eigentrack import EigenTrack, EigenTrackError
from eigentrack.taps import find_blocks
from rmtkernels import DESCRIPTORS
from rmtkernels.reference import window_gram_ref
from tests.integration.conftest import tiny_llama
from tests.integration.families import DECODERS, IMAGE_TOKEN, SMALL, VISION_LANGUAGE, build
from tests.integration.test_monitor import WINDOW

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
PADDINGS = ("none", "left", "right")
SAMPLED: dict[str, Any] = {"do_sample": True, "eos_token_id": None, "suppress_tokens": [0, 1, 2, 61, 62, IMAGE_TOKEN]}
NEW_TOKENS = 8


class Cell(NamedTuple):
    model: str
    cache: str
    compiled: bool
    padding: str


WITHOUT_CACHE = ("BERT", "any nn.Module (modules=)")
CELLS = [
    Cell(model, cache, compiled, padding)
    for models, caches in (
        ((*DECODERS, *VISION_LANGUAGE), ("dynamic", "static")),
        (WITHOUT_CACHE, ("none",)),
    )
    for model in models
    for cache in caches
    for compiled in (False, True)
    for padding in PADDINGS
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_cell(cell: Cell) -> None:
    error = outcomes(*cell[:3])[cell.padding]
    if error is not None:
        raise error


@lru_cache(maxsize=2)
def outcomes(family: str, cache: str, compiled: bool) -> dict[str, Exception | None]:
    """Per padding, what went wrong. One model and one block for all three, so that it is compiled once."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results: dict[str, Exception | None] = {}
    with (whole_texts if family in WITHOUT_CACHE else decoder)(family, cache, compiled) as run:
        for padding in PADDINGS:
            results[padding] = None
            try:
                run(padding)
            except Exception as error:
                results[padding] = error
    assert compiled == (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0)
    return results


@contextmanager
def decoder(family: str, cache: str, compiled: bool) -> Iterator[Callable[[str], None]]:
    """Generates without padding and with padding on the left; right padding is for passes over whole texts."""
    model, plain = build(family), build(family)
    config = model.config.get_text_config()
    eager = model.forward
    forward = torch.compile(eager, fullgraph=True, backend="eager", dynamic=True) if compiled else eager
    how: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    if compiled and cache == "static":
        how["compile_config"] = CompileConfig(fullgraph=True, backend="eager", mode=None)
        how["compile_config"]._compile_all_devices = True

    def step(**given: Any) -> Any:
        model.forward = forward
        try:
            return model(**given)
        finally:
            model.forward = eager

    def generated(ids: Tensor, mask: Tensor, extra: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **extra, **how, **SAMPLED)[:, :-1]

    def stepped(ids: Tensor, mask: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """The prompt in eager mode, single tokens in a compiled graph, which is what generate() compiles too."""
        torch.manual_seed(0)
        result = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True, **extra)
        for _ in range(NEW_TOKENS - 1):
            token = result.logits[:, -1, 3:60].softmax(-1).multinomial(1) + 3
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            where = positions(mask)[:, -1:]
            kept = result.past_key_values
            result = step(input_ids=token, attention_mask=mask, position_ids=where, past_key_values=kept)
        return ids

    def passed(ids: Tensor, mask: Tensor, extra: dict[str, Tensor]) -> Tensor:
        kept = StaticCache(config=config, max_cache_len=32) if cache == "static" else DynamicCache(config=config)
        step(input_ids=ids, attention_mask=mask, past_key_values=kept, **extra)
        return ids

    @torch.no_grad()
    def run(padding: str) -> None:
        ids, mask, extra = inputs(family, padding)
        way = passed if padding == "right" else stepped if compiled and cache == "dynamic" else generated
        fed = way(ids, mask, extra)
        rows = []
        for row in range(len(ids)):
            real = mask[row].bool()
            text = torch.cat([fed[row, : len(real)][real], fed[row, len(real) :]])[None]
            states = hidden_states(plain, text, {name: value[row : row + 1] for name, value in extra.items()})
            rows.append(Watched(whole, row, text, states, 0))
            if padding != "right":
                rows.append(Watched(answer, row, text, states, int(real.sum())))
        compare(rows)

    options: dict[str, Any] = {"layers": "all", "window": WINDOW, "end_tokens": []}
    with EigenTrack(model, **options) as answer, EigenTrack(model, start="prompt", **options) as whole:
        yield run


def positions(mask: Tensor) -> Tensor:
    """As generate() counts them: padding has none of its own."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Plain(nn.Module):
    """Not of transformers, and fed neither tokens nor what they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, signal: Tensor, attention_mask: Tensor) -> Tensor:
        for step in self.steps:
            signal = step(signal).tanh() * attention_mask[..., None]
        return signal


@contextmanager
def whole_texts(family: str, cache: str, compiled: bool) -> Iterator[Callable[[str], None]]:
    torch.manual_seed(0)
    bert = family == "BERT"
    model: Any = hf.BertModel(hf.BertConfig(**_bert())).eval() if bert else Plain().eval()
    plain = copy.deepcopy(model)
    embed = nn.Embedding(64, 32)
    watched: dict[str, Any] = {"layers": "all"} if bert else {"modules": list(model.steps)}
    with EigenTrack(model, window=WINDOW, start="prompt", **watched) as whole:
        forward = torch.compile(model, fullgraph=True, backend="eager") if compiled else model

        @torch.no_grad()
        def run(padding: str) -> None:
            ids, mask, _ = inputs(family, padding)
            if bert:
                forward(ids, attention_mask=mask, position_ids=positions(mask))
            else:
                forward(embed(ids), attention_mask=mask)
            rows = []
            for row in range(len(ids)):
                text = ids[row][mask[row].bool()][None]
                states = hidden_states(plain, text if bert else embed(text), {"attention_mask": torch.ones_like(text)})
                rows.append(Watched(whole, row, text if bert else torch.full_like(text, -1), states, 0))
            compare(rows)

        yield run


def _bert() -> dict[str, Any]:
    return {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads", "head_dim")}


def inputs(family: str, padding: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Two texts of 4 and 7 tokens, or both of 7; an image of 4 tokens behind the first one where there is an eye."""
    generator = torch.Generator().manual_seed(len(padding))
    rows = []
    for length in (7 if padding == "none" else 4, 7):
        text = torch.randint(3, 60, (length,), generator=generator)
        if family in VISION_LANGUAGE:
            text = torch.cat([text[:1], torch.full((4,), IMAGE_TOKEN), text[1:]])
        rows.append(text)
    side = "right" if padding == "none" else padding
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    extra = {}
    if family in VISION_LANGUAGE:
        extra["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
    if family == "Gemma 3 with images":
        extra["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return ids, (ids != 0).long(), extra


def hidden_states(model: Any, text: Tensor, extra: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of the blocks for one text alone, collected by hooks of the test's own."""
    collected: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, a, out: collected.append(out[0] if isinstance(out, tuple) else out))
        for block in find_blocks(model)
    ]
    if "token_type_ids" in extra:
        extra = extra | {"token_type_ids": (text == IMAGE_TOKEN).long()}
    model(text, **extra)
    for handle in handles:
        handle.remove()
    return collected


class Watched(NamedTuple):
    """A sequence that a monitor watched from token `first` on, and the hidden states it should have seen."""

    track: EigenTrack
    row: int
    text: Tensor
    states: list[Tensor]
    first: int


def compare(sequences: list[Watched]) -> None:
    """Eigenvalues, and the entropy that is made of them, from normalised and centred float64 windows."""
    for track, row, text, states, first in sequences:
        watched = track.watched[row]
        assert torch.equal(track.tokens[row][watched], text[0, first:])
        pairs = [window_gram_ref(state[:, first:], WINDOW, dtype=torch.float64) for state in states]
        gram, rows = torch.cat([gram for gram, _ in pairs], 0).transpose(0, 1), pairs[0][1][0].clamp(max=WINDOW)
        norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30).sqrt()
        gram = states[0].shape[-1] * gram / norms[..., :, None] / norms[..., None, :]  # rows of root mean square 1
        used = (torch.arange(WINDOW) < rows[:, None]).double()
        centring = torch.diag_embed(used) - used[:, :, None] * used[:, None, :] / rows[:, None, None]
        centred = centring[:, None] @ gram @ centring[:, None] / states[0].shape[-1]
        want = torch.linalg.eigvalsh(centred).flip(-1)
        found = track.eigenvalues[row][watched].double()
        # What the shape of a batch changes in the hidden states is as large as their rounding, whatever centring leaves
        scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / states[0].shape[-1]
        assert found.shape == want.shape and ((found - want).abs() <= 2e-6 * scale[..., None]).all()
        shares = want.clamp(min=0) / want.clamp(min=0).sum(-1, keepdim=True).clamp(min=1e-12)
        entropy = track.descriptors[row][watched].unflatten(1, (len(states), -1))[..., DESCRIPTORS.index("entropy")]
        torch.testing.assert_close(entropy[1:].double(), torch.special.entr(shares[1:]).sum(-1), rtol=1e-3, atol=1e-3)


# Ways to use a model that are refused


def enter(model: Any, **options: Any) -> None:
    with EigenTrack(model, **options):
        pass


def generate(model: Any, **options: Any) -> None:
    repeating = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    with EigenTrack(model):
        model.generate(repeating, attention_mask=torch.ones_like(repeating), max_new_tokens=6, **options)


def bert() -> None:
    model = hf.BertModel(hf.BertConfig(**_bert())).eval()
    with EigenTrack(model), torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))


def compiled_and_run() -> None:
    model = tiny_llama(depth=2)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(torch.tensor([[5, 6, 7]]))
    enter(model)


def compiled_and_assisted() -> None:
    model = tiny_llama(depth=2)
    with EigenTrack(model):
        model.compile(backend="eager")
        ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
        model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=10, do_sample=False)


def cropped() -> None:
    model, cache = tiny_llama(depth=2), DynamicCache()
    with EigenTrack(model), torch.no_grad():
        for token in (5, 6, 7):
            model(torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-1)
        model(torch.tensor([[8]]), past_key_values=cache)


def t5() -> Any:
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=2, num_heads=4))


def mamba() -> Any:
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))


REFUSED: list[tuple[str, str, Callable[[], None], str]] = [
    ("encoder-decoder (T5)", "UnsupportedModelError", lambda: enter(t5(), start="prompt"), "–"),
    ('encoder (BERT), `start="answer"`', "UnsupportedModelError", bert, '`start="prompt"`'),
    (
        'no key-value cache (Mamba), `start="answer"`',
        "UnsupportedModelError",
        lambda: enter(mamba()),
        '`start="prompt"`',
    ),
    (
        '`use_cache=False`, `start="answer"`',
        "UnsupportedGenerationError",
        lambda: generate(tiny_llama(depth=2), use_cache=False),
        '`use_cache=True`, or `start="prompt"`',
    ),
    ("beam search", "UnsupportedGenerationError", lambda: generate(tiny_llama(depth=2), num_beams=3), "`num_beams=1`"),
    ("a cache cropped between two steps", "UnsupportedGenerationError", cropped, "a fresh cache"),
    (
        "self-speculative decoding",
        "UnsupportedGenerationError",
        lambda: generate(tiny_llama(depth=2), assistant_early_exit=1),
        "no `assistant_early_exit`, or an `assistant_model`",
    ),
    ("assisted decoding of a compiled model", "UnsupportedGenerationError", compiled_and_assisted, "one of the two"),
    (
        "a model compiled before",
        "UnsupportedModelError",
        compiled_and_run,
        "enter first, or compile with `torch._dynamo.config.skip_nnmodule_hook_guards = False`",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_refused(case: tuple[str, str, Callable[[], None], str]) -> None:
    torch._dynamo.reset()
    with pytest.raises(EigenTrackError) as caught:
        case[2]()
    assert type(caught.value).__name__ == case[1]


def tables() -> str:
    """The two tables of docs/compatibility.md."""
    heads = [f"{'compiled, ' if compiled else ''}{padding}" for compiled in (False, True) for padding in PADDINGS]
    lines = [f"| model | cache | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for model, cache in dict.fromkeys((cell.model, cell.cache) for cell in CELLS):
        tested = [cell for cell in CELLS if (cell.model, cell.cache) == (model, cache)]
        lines.append(f"| {model} | {cache} |{' yes |' * len(tested)}")
    lines += ["", "| refused | error | instead |", "|---|---|---|"]
    lines += [f"| {what} | `{error}` | {instead} |" for what, error, _, instead in REFUSED]
    return "\n".join(lines) + "\n"


def test_the_page_says_what_is_tested() -> None:
    begin, end = "<!-- begin of tables -->\n", "<!-- end of tables -->"
    assert PAGE.read_text(encoding="utf-8").split(begin)[1].split(end)[0] == tables()
