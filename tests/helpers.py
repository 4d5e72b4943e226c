"""What the tests of operators share: states full of NaN, rows in odd layouts, comparison of bits."""

from typing import NamedTuple

import torch
from torch import Tensor

import rmtkernels

COVARIANCE_LAYOUTS = ("dense", "sliced", "transposed", "every_other", "one_row", "one_column")
UPPER = 7.25  # what the strict upper triangle of a scatter matrix holds, which nothing may touch
LAYOUTS = ("dense", "sliced", "transposed", "every_other", "expanded_batch", "expanded_row", "flat")
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class State(NamedTuple):
    """The buffers of window_push_."""

    ring: Tensor
    gram: Tensor
    seen: Tensor

    def copy(self) -> "State":
        return State(*(tensor.clone() for tensor in self))

    def of_sequence(self, b: int) -> "State":
        """Sequence b alone, in buffers of its own."""
        return State(self.ring[:, b : b + 1].clone(), self.gram[:, b : b + 1].clone(), self.seen[b : b + 1].clone())


def empty_state(layers: int, batch: int, window: int, dim: int, dtype: torch.dtype = torch.float32) -> State:
    """No rows yet; NaN wherever nothing has a meaning, so that reading it shows."""
    return State(
        torch.full((layers, batch, window, dim), torch.nan, dtype=dtype),
        torch.full((layers, batch, window, window), torch.nan),
        torch.zeros(batch, 3, dtype=torch.int64),
    )


def pushed(state: State, rows: list[Tensor], mask: Tensor | None = None) -> State:
    """A copy of the state after one push."""
    state = state.copy()
    rmtkernels.window_push_(*state, rows, mask)
    return state


class Covariance(NamedTuple):
    """The buffers of covariance_update_."""

    mean: Tensor
    scatter: Tensor
    totals: Tensor

    def copy(self) -> "Covariance":
        return Covariance(*(tensor.clone() for tensor in self))


def empty_covariance(dim: int, dtype: torch.dtype = torch.float32) -> Covariance:
    """No rows yet; NaN wherever nothing has a meaning, but UPPER above the diagonal: NaN would hide an addition."""
    mean = torch.full((dim,), torch.nan, dtype=torch.float64)
    scatter = torch.full((dim, dim), torch.nan, dtype=dtype)
    scatter[torch.ones(dim, dim, dtype=torch.bool).triu(1)] = UPPER
    return Covariance(mean, scatter, torch.zeros(5, dtype=torch.float64))


def covariance_of(*batches: Tensor, dtype: torch.dtype = torch.float32) -> Covariance:
    """The state that these batches leave."""
    state = empty_covariance(batches[0].shape[1], dtype)
    for batch in batches:
        rmtkernels.covariance_update_(*state, batch)
    return state


def same_covariance(a: Covariance, b: Covariance) -> bool:
    return all(map(same_bits, a, b))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN and the sign of zero included."""
    word = _WORDS[a.element_size()]
    return (
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(word), b.contiguous().view(word))
    )


def same_state(a: State, b: State) -> bool:
    return all(map(same_bits, a, b))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def rows_in_layout(
    layout: str, batch: int, steps: int, dim: int, seed: int, dtype: torch.dtype, scale: float
) -> Tensor:
    """(B, T, D) rows, or (B, D) if flat and T = 1, of the asked memory layout."""

    def draw(*shape: int) -> Tensor:
        return (normal(*shape, seed=seed, dtype=torch.float64) * scale).to(dtype)

    if layout == "sliced":
        return draw(batch + 2, steps + 3, dim + 5)[1:-1, 2:-1, 3:-2]
    if layout == "transposed":
        return draw(dim, steps, batch).permute(2, 1, 0)
    if layout == "every_other":
        return draw(batch, steps, 2 * dim)[..., ::2]
    if layout == "expanded_batch":
        return draw(1, steps, dim).expand(batch, steps, dim)
    if layout == "expanded_row":
        return draw(batch, steps, 1).expand(batch, steps, dim)
    if layout == "flat" and steps == 1:
        return draw(dim, batch).T
    return draw(batch, steps, dim)


def samples_in_layout(
    layout: str, rows: int, dim: int, seed: int, dtype: torch.dtype, scale: float, offset: float
) -> Tensor:
    """(n, D) rows with mean scale * offset, of the asked memory layout."""

    def draw(*shape: int) -> Tensor:
        return ((normal(*shape, seed=seed, dtype=torch.float64) + offset) * scale).to(dtype)

    if layout == "sliced":
        return draw(rows + 3, dim + 5)[2:-1, 3:-2]
    if layout == "transposed":
        return draw(dim, rows).T
    if layout == "every_other":
        return draw(2 * rows, 2 * dim)[::2, ::2]
    if layout == "one_row":
        return draw(1, dim).expand(rows, dim)
    if layout == "one_column":
        return draw(rows, 1).expand(rows, dim)
    return draw(rows, dim)


def gram_of(rows: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Float64 rows (L, B, R, D) -> their float32 Gram matrices, padded with NaN to `window` slots, and `seen`."""
    count = rows.shape[-2]
    window = count if window is None else window
    gram = torch.full((*rows.shape[:2], window, window), torch.nan)
    gram[..., :count, :count] = (rows.double() @ rows.double().mT).float()
    return gram, torch.full((rows.shape[1],), count, dtype=torch.int64)
