"""sliding_window at the sizes of whole models: one token of an 8B model in bfloat16, and all windows of a text."""

from collections.abc import Callable

import torch
from torch import Tensor

import rmtkernels
from bench.case import Case, case
from rmtkernels.reference import spectrum_eigvalsh_ref

MODEL_LAYERS, MODEL_WIDTH, WINDOW = 32, 4096, 32
LENGTH, WIDTH = 1024, 5760  # ten layers of 576 side by side


class Rings:
    """Plain PyTorch in bfloat16, all layers at once; every buffer is allocated before."""

    def __init__(self, rows: list[Tensor], dots: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self.rows, self.dots, self.step = rows, dots, 0
        self.ring = torch.zeros(MODEL_LAYERS, WINDOW, MODEL_WIDTH, dtype=torch.bfloat16)
        self.gram = torch.zeros(MODEL_LAYERS, WINDOW, WINDOW)
        self.new = torch.empty(MODEL_LAYERS, MODEL_WIDTH, dtype=torch.bfloat16)
        self.products = torch.empty(MODEL_LAYERS, WINDOW, dtype=torch.bfloat16)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        slot = self.step % WINDOW
        self.step += 1
        torch.cat(self.rows, out=self.new)
        self.ring[:, slot] = self.new
        self.dots(self.ring, self.new, self.products)
        self.gram[:, slot] = self.products
        self.gram[:, :, slot] = self.products
        return self.gram


def bmm(ring: Tensor, rows: Tensor, out: Tensor) -> None:
    torch.bmm(ring, rows[:, :, None], out=out[:, :, None])


def vecdot(ring: Tensor, rows: Tensor, out: Tensor) -> None:
    torch.linalg.vecdot(ring, rows[:, None], out=out)


@case("sliding_window.push_32x4096_bfloat16")
def one_token() -> Case:
    """The Gram matrices of 32 layers after one token. PyTorch's sums come out in bfloat16, ours in float32."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, MODEL_WIDTH, generator=generator).bfloat16() for _ in range(MODEL_LAYERS)]
    state = rmtkernels.SlidingWindow(MODEL_LAYERS, 1, WINDOW, MODEL_WIDTH, dtype=torch.bfloat16)
    peers: dict[str, Callable[[], Tensor]] = {"best of: bmm": Rings(rows, bmm), "best of: vecdot": Rings(rows, vecdot)}

    words = state.ring.view(torch.int64)

    def ours() -> Tensor:
        state.update(rows)
        return state.gram

    def verify() -> None:
        want = torch.stack([row.double().square().sum() for row in rows])[:, None, None]
        for name, function in {"ours": ours, **peers}.items():
            for _ in range(WINDOW):
                got = function()
            # Every row of a window is the same one here, so that all entries are its squared norm
            tolerance = 1e-6 if name == "ours" else 2**-7
            assert ((got.view(MODEL_LAYERS, WINDOW, WINDOW) / want - 1).abs() <= tolerance).all(), f"{name}: wrong"

    return Case(
        ours=ours,
        peers={**peers, "only reading the rows: the sum of their bytes as integers": words.sum},
        verify=verify,
        targets={},
        bytes_read=MODEL_LAYERS * (WINDOW + 1) * MODEL_WIDTH * 2,
        flops=2 * MODEL_LAYERS * WINDOW * MODEL_WIDTH,
        flops_dtype=torch.float32,
        floor_share=0.6,
    )


@case("sliding_window.all_windows_1024x5760", threads=2)
def all_windows() -> Case:
    """Eigenvalues of every full window of a text, stride 1; ours with all descriptors, the peers without any."""
    hidden = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))

    def ours() -> Tensor:
        gram, seen = rmtkernels.window_gram(hidden, WINDOW)
        _, eigenvalues = rmtkernels.spectrum_descriptors(gram, seen[0], WIDTH, center=False)
        return eigenvalues[0, WINDOW - 1 :]

    def unfolded() -> Tensor:
        windows = hidden[0].unfold(0, WINDOW, 1).mT
        values = [torch.linalg.svdvals(part).square() for part in windows.split(16)]  # all at once are 720 MB
        return torch.cat(values) / WIDTH

    def one_gram() -> Tensor:
        gram = hidden[0] @ hidden[0].T
        rows = torch.arange(LENGTH - WINDOW + 1)[:, None] + torch.arange(WINDOW)
        return torch.linalg.eigvalsh(gram[rows[:, :, None], rows[:, None]]).flip(1) / WIDTH

    peers = {"unfold and svdvals": unfolded, "one Gram matrix and eigvalsh": one_gram}

    def verify() -> None:
        some = torch.arange(0, LENGTH - WINDOW + 1, 97)
        windows = torch.stack([hidden[0, at : at + WINDOW] for at in some]).double()
        want = spectrum_eigvalsh_ref(windows @ windows.mT).flip(1) / WIDTH
        for name, function in {"ours": ours, **peers}.items():
            error = (function()[some] - want).abs().max() / want.max()
            assert error <= 1e-5, f"{name}: wrong by {error:.1e}"

    return Case(
        ours=ours,
        peers=dict(peers),
        verify=verify,
        targets={"unfold and svdvals": 20, "one Gram matrix and eigvalsh": 4},
        bytes_read=hidden.numel() * 4,
        flops=2 * LENGTH * WINDOW * WIDTH + LENGTH * 4 * WINDOW**3 // 3,
        flops_dtype=torch.float32,
        rounds=3,  # svdvals takes seconds
    )
