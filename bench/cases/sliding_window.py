"""sliding_window: one decoded token, ten layers of width 576, window 32, joined into one spectrum."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import rmtkernels
from bench.case import Case, case
from bench.timer import interleave
from rmtkernels.reference import spectrum_eigvalsh_ref

LAYERS, WINDOW, WIDTH, POOL = 10, 32, 576, 41
CALLS_ALONE = "seconds of the same calls on windows of one number"


class Stream:
    """Rows from a pool that fits the cache, as fresh activations do; no window holds one of them twice."""

    def __init__(self, width: int = WIDTH) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(1, width, generator=generator) for _ in range(POOL)]
        self.tokens = [[rows[(step + 5 * layer) % POOL] for layer in range(LAYERS)] for step in range(POOL)]
        self.step = 0

    def next(self) -> list[Tensor]:
        self.step += 1
        return self.tokens[self.step % POOL]


class Ours:
    def __init__(self, joint: str, window: int = WINDOW, width: int = WIDTH) -> None:
        self.stream, self.joint, self.width = Stream(width), joint, width
        self.state = rmtkernels.SlidingWindow(LAYERS, 1, window, width)
        self.descriptors, self.eigenvalues = torch.empty(1, 1, len(rmtkernels.DESCRIPTORS)), torch.empty(1, 1, window)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        state = self.state
        state.update(self.stream.next())
        rmtkernels.spectrum_descriptors_(
            self.descriptors, self.eigenvalues, state.gram, state.rows, self.width, center=False, joint=self.joint
        )
        return self.eigenvalues


class PerLayer:
    """Plain PyTorch: rings and Gram matrices per layer, one row and column refreshed, eigvalsh of the scaled sum.

    Every buffer is allocated before, and the scaled sum of the Gram matrices is one matrix-vector product.
    """

    def __init__(self, dots: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self.stream, self.dots = Stream(), dots
        self.ring, self.gram = torch.zeros(LAYERS, WINDOW, WIDTH), torch.zeros(LAYERS, WINDOW, WINDOW)
        self.rows, self.products = torch.empty(LAYERS, WIDTH), torch.empty(LAYERS, WINDOW)
        self.diagonals, self.flat = self.gram.diagonal(dim1=1, dim2=2), self.gram.view(LAYERS, -1).t()
        self.sum, self.traces = torch.empty(WINDOW * WINDOW), torch.empty(LAYERS)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        torch.cat(self.stream.next(), out=self.rows)
        slot = (self.stream.step - 1) % WINDOW
        self.ring[:, slot] = self.rows
        self.dots(self.ring, self.rows, self.products)
        self.gram[:, slot] = self.products
        self.gram[:, :, slot] = self.products
        torch.sum(self.diagonals, 1, out=self.traces)
        torch.mv(self.flat, self.traces.reciprocal_(), out=self.sum)
        return torch.linalg.eigvalsh(self.sum.view(WINDOW, WINDOW))


class Compiled(PerLayer):
    """The same but for eigvalsh as one graph of torch.compile, which fuses products and sums."""

    def __init__(self) -> None:
        super().__init__(vecdot)
        self.slot = torch.zeros((), dtype=torch.int64)
        self.graph = torch.compile(self.scaled_sum, fullgraph=True)

    @staticmethod
    def scaled_sum(ring: Tensor, gram: Tensor, rows: list[Tensor], slot: Tensor) -> Tensor:
        new = torch.cat(rows)
        ring.index_copy_(1, slot[None], new[:, None])
        products = (ring * new[:, None]).sum(-1)
        gram.index_copy_(1, slot[None], products[:, None])
        gram.index_copy_(2, slot[None], products[:, :, None])
        return (gram / gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]).sum(0)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        rows = self.stream.next()
        self.slot.fill_((self.stream.step - 1) % WINDOW)
        return torch.linalg.eigvalsh(self.graph(self.ring, self.gram, rows, self.slot))


class Concatenated:
    """Plain PyTorch on the concatenated layers, as they are: one matrix-vector product, one eigvalsh."""

    def __init__(self, solve: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.stream, self.solve = Stream(), solve
        self.ring, self.gram = torch.zeros(WINDOW, LAYERS * WIDTH), torch.zeros(WINDOW, WINDOW)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        row = torch.cat(self.stream.next(), 1)[0]
        slot = (self.stream.step - 1) % WINDOW
        self.ring[slot] = row
        if self.solve is torch.linalg.eigvalsh:
            dots = torch.mv(self.ring, row)
            self.gram[slot] = dots
            self.gram[:, slot] = dots
            return torch.linalg.eigvalsh(self.gram)
        return torch.linalg.svdvals(self.ring).square()


def bmm(ring: Tensor, rows: Tensor, out: Tensor) -> None:
    torch.bmm(ring, rows[:, :, None], out=out[:, :, None])


def multiply_and_sum(ring: Tensor, rows: Tensor, out: Tensor) -> None:
    torch.sum(ring * rows[:, None], -1, out=out)


def vecdot(ring: Tensor, rows: Tensor, out: Tensor) -> None:
    torch.linalg.vecdot(ring, rows[:, None], out=out)


def matrix_vector_loop(ring: Tensor, rows: Tensor, out: Tensor) -> None:
    for layer in range(LAYERS):
        torch.mv(ring[layer], rows[layer], out=out[layer])


def verify(joint: str, functions: dict[str, Callable[[], Tensor]]) -> None:
    """Every function's eigenvalues after 2 N + 5 tokens, as shares of the largest, against a float64 Gram matrix."""
    stream = Stream()
    tokens = [stream.next() for _ in range(2 * WINDOW + 5)]
    window = torch.stack([torch.cat(token) for token in tokens[-WINDOW:]], 1).double()  # (L, N, D)
    gram = window @ window.mT
    if joint == "trace":
        gram = gram / gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    want = spectrum_eigvalsh_ref(gram.sum(0))
    for name, function in functions.items():
        got = [function().clone() for _ in tokens][-1].flatten().double().sort().values
        assert (got / got[-1] - want / want[-1]).abs().max() <= 1e-5, f"{name}: wrong eigenvalues"


def decode_case(joint: str, peers: dict[str, Callable[[], Tensor]], targets: dict[str, float]) -> Case:
    ours = Ours(joint)
    return Case(
        ours=ours,
        peers=dict(peers),
        # svdvals has the raw concatenation also where the others scale by the trace: the same work on other numbers.
        verify=lambda: verify(
            joint, {"ours": ours, **{n: p for n, p in peers.items() if joint == "none" or n != "svdvals"}}
        ),
        targets=targets,
        extra=lambda: {CALLS_ALONE: float(np.median(interleave({"calls": Ours(joint, 1, 1)}, 60)["calls"]))},
        bytes_read=LAYERS * WINDOW * WIDTH * 4,
        flops=2 * LAYERS * WINDOW * WIDTH + 4 * WINDOW**3 // 3,
    )


@case("sliding_window.decode_joint")
def decode_joint() -> Case:
    """The default joint form, uncentred as the peers': each layer divided by its trace. svdvals has the raw layers."""
    peers: dict[str, Callable[[], Tensor]] = {
        "svdvals": Concatenated(torch.linalg.svdvals),
        "best of: bmm": PerLayer(bmm),
        "best of: multiply and sum": PerLayer(multiply_and_sum),
        "best of: vecdot": PerLayer(vecdot),
        "best of: a matrix-vector product per layer": PerLayer(matrix_vector_loop),
        "best of: compiled": Compiled(),
    }
    return decode_case("trace", peers, {"svdvals": 50, "best": 4})


@case("sliding_window.decode_joint_raw")
def decode_joint_raw() -> Case:
    """The paper's concatenation. Plain PyTorch needs one matrix-vector product here, as we do: no target is set."""
    peers: dict[str, Callable[[], Tensor]] = {
        "svdvals": Concatenated(torch.linalg.svdvals),
        "best of: one matrix-vector product": Concatenated(torch.linalg.eigvalsh),
    }
    return decode_case("none", peers, {"svdvals": 50})
