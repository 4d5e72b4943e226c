"""Runs the model on prompts and answers, once, and keeps what the experiments look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eigentrack.taps import end_tokens_of, find_blocks, select_layers

TOP = 50  # eigenvalues of the attention Laplacian kept per head
NEW_TOKENS = 32  # of the model's own answers
CHOICE = ("logprob", "entropy", "max_prob", "energy")  # of the distribution that chose a token


class Reader:
    """Reads batches: the prompt once, then all answers to it behind copies of its cache.

    The model must run eager attention, whose weights are read.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = find_blocks(model)
        self.layers = select_layers("every:3", len(self.blocks))
        self._ends = set(end_tokens_of(model))
        self._hidden: list[Tensor] = []  # (B, T, D): embedding, then the watched blocks
        # Per block: (B, heads, keys) attention received, (B, heads, T) diagonal, (B, T, heads, 2) paid to the prompt
        self._attention: list[tuple[Tensor, Tensor, Tensor]] = []
        self._mask = torch.empty(0)  # (B, keys) 1 where there is no padding
        self._watching = False

    @torch.inference_mode()
    def read(self, prompts: list[list[int]], answers: list[list[list[int]]]) -> list[list[dict[str, Tensor]]]:
        """Per prompt and answer: `hidden` (A, layers, D), `choice` (A, 4), `tokens` (A,), `laplacian` (blocks, heads,
        TOP), `attention` (A, blocks, heads, 2), what a token pays to the first token and to the rest of the prompt, and
        `prompt` (P, layers, D), the prompt's hidden states divided by their root mean square, in half precision.
        A prompt without answers is answered by the model.
        """
        with self._hooks():
            ids, mask = padded([torch.tensor(prompt) for prompt in prompts], left=True)
            output = self._forward(ids, mask, None)
            cache, last, before = output.past_key_values, output.last_hidden_state[:, -1], self._attention
            context = torch.stack(self._hidden, 2)
            context = context / context.square().mean(3, keepdim=True).sqrt()
            if not any(answers):
                answers = [[answer] for answer in self._continue(cache, last, mask)]
            owner = torch.tensor([index for index, some in enumerate(answers) for _ in some])
            cache.batch_select_indices(owner)
            flat = [torch.tensor(answer) for some in answers for answer in some]
            fed, real = padded(flat, left=False)
            output = self._forward(fed, torch.cat([mask[owner], real], 1), cache)
            states = torch.cat([last[owner, None], output.last_hidden_state[:, :-1]], 1)
            spectra = self._laplacians([(s[owner], d[owner]) for s, d, _ in before], mask[owner], real)
            paid = torch.stack([paid for _, _, paid in self._attention], 2)
            hidden = torch.stack(self._hidden, 2)
        found = [
            {
                "hidden": hidden[row, : len(tokens)].clone(),
                "choice": self._choice(states[row, : len(tokens)], tokens),
                "tokens": tokens.int(),
                "laplacian": spectra[row],
                "attention": paid[row, : len(tokens)].clone(),
                "prompt": context[owner[row], -len(prompts[owner[row]]) :].half(),
            }
            for row, tokens in enumerate(flat)
        ]
        parts = iter(found)
        return [[next(parts) for _ in some] for some in answers]

    def _continue(self, cache: Any, last: Tensor, mask: Tensor) -> list[list[int]]:
        """The model's own answers, greedy, without the end token; the cache is left as it was."""
        self._watching, length = False, cache.get_seq_length()
        answers: list[list[int]] = [[] for _ in mask]
        ended = [False] * len(mask)
        for _ in range(NEW_TOKENS):
            chosen = self.model.lm_head(last).argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                ended[row] |= token in self._ends
                if not ended[row]:
                    answers[row].append(token)
            if all(ended):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            last = self._forward(chosen[:, None], mask, cache).last_hidden_state[:, -1]
        self._watching = True
        if cache.get_seq_length() > length:
            cache.crop(length - cache.get_seq_length())
        return [answer or [self.model.config.eos_token_id] for answer in answers]

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Any:
        """`mask` (B, past + T)."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self._watching:
            self._hidden, self._attention, self._mask = [], [], mask
        return self.model.model(ids, mask, position_ids=positions, past_key_values=cache, use_cache=True)

    def _choice(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(A, 4) of the distributions behind `states` (A, D), and the tokens they led to."""
        logits = self.model.lm_head(states)
        energy = logits.logsumexp(1)
        logs = logits - energy[:, None]
        entropy = -(logs.exp() * logs).sum(1)
        return torch.stack([logs.gather(1, tokens[:, None]).squeeze(1), entropy, logs.amax(1).exp(), energy], 1)

    def _laplacians(self, before: list[tuple[Tensor, Tensor]], mask: Tensor, real: Tensor) -> Tensor:
        """(B, blocks, heads, TOP), largest first: eigenvalues d_ii - a_ii, d_ii the mean attention that later tokens,
        and the token itself, pay to token i (LapEigvals, arXiv 2502.17598). Shorter texts are filled up with zeros."""
        kept = torch.cat([mask, real], 1).bool()
        place = kept.cumsum(1) - 1
        payers = (kept.sum(1, keepdim=True) - place).clamp(min=1)
        spectra = []
        for (sums, diagonal), (more, own, _) in zip(before, self._attention, strict=True):
            paid = more.clone()
            paid[..., : sums.shape[2]] += sums
            values = paid / payers[:, None] - torch.cat([diagonal, own], 2)
            values = values.masked_fill(~kept[:, None], -torch.inf).sort(2, descending=True).values[..., :TOP]
            values = nn.functional.pad(values, (0, TOP - values.shape[2]))
            spectra.append(values.masked_fill(values.isinf(), 0.0))
        return torch.stack(spectra, 1)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        def embedded(module: nn.Module, args: Any, output: Tensor) -> None:
            self._keep(output)

        def passed(module: nn.Module, args: Any, output: Any) -> None:
            self._keep(output[0] if isinstance(output, tuple) else output)

        def attended(module: nn.Module, args: Any, output: Any) -> None:
            if self._watching:
                self._attention.append(_summarised(output[1], self._mask))

        hooks = [self.model.get_input_embeddings().register_forward_hook(embedded)]
        hooks += [self.blocks[layer].register_forward_hook(passed) for layer in self.layers]
        hooks += [block.self_attn.register_forward_hook(attended) for block in self.blocks]
        self._watching = True
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, hidden: Tensor) -> None:
        if self._watching:
            self._hidden.append(hidden)


def _summarised(weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Reader._attention`; `weights` (B, heads, T, keys), `mask` (B, keys)."""
    behind = weights.shape[3] - weights.shape[2]  # keys of the prompt
    received = torch.einsum("bhtk,bt->bhk", weights, mask[:, behind:].to(weights.dtype))
    diagonal = weights.diagonal(behind, 2, 3).clone()
    first = mask.argmax(1)[:, None, None, None].expand(-1, weights.shape[1], weights.shape[2], 1)
    sink = weights.gather(3, first).squeeze(3)
    prompt = weights[..., :behind].sum(3) - sink
    return received, diagonal, torch.stack([sink, prompt], 3).transpose(1, 2)


def padded(rows: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """(B, T) tokens and mask."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return ids, mask
