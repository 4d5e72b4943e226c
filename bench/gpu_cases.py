"""Every slice at the shapes of docs/performance.md beside its peers. With small=True the shapes are tiny: on the CPU,
to see that all of it still runs."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import rmtkernels
from bench import work
from bench.work import Work
from rmtkernels.reference import lowrank_linear_ref, spectrum_descriptors_ref

Call = Callable[[], Any]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class GpuCase:
    """One comparison. `verify` raises AssertionError where a result is wrong; it is given ours or a peer by name.
    `waits` names those that wait for the device, and so cannot be captured in a graph."""

    ours: Call
    peers: dict[str, Call]
    verify: Callable[[str, Call], None]
    waits: tuple[str, ...] = ()


def cases(small: bool) -> Iterator[tuple[Work, str, Callable[[str], GpuCase]]]:
    """The work, the operator it needs, and what sets it up on a device; with `small`, the first of each kind."""
    seen = set()
    for item in work.all_work():
        kind = next(kind for kind in KINDS if item.name.startswith(kind))
        if small and kind in seen:
            continue
        seen.add(kind)
        operator, setup = KINDS[kind]
        yield item, operator, functools.partial(setup, item, small)


def normal(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded, so that every run has the same numbers."""
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(sum(shape)), device=device).to(dtype)


def close(name: str, got: Tensor, want: Tensor, size: Tensor | float, tolerance: float) -> None:
    error = float(((got.double() - want.double()).abs() / size).max())
    assert error <= tolerance, f"{name}: wrong by {error:.1e}, {tolerance:.0e} is allowed"


def push(item: Work, small: bool, device: str) -> GpuCase:
    batch, window = (2, 4) if small else item.sizes
    layers, width = (2, 16) if small else (work.LAYERS, work.WIDTH)
    ring = normal(layers, batch, window, width, device=device, dtype=torch.bfloat16)
    gram = torch.zeros(layers, batch, window, window, device=device)
    seen = torch.tensor([[window, 0, 0]], device=device).repeat(batch, 1)
    rows = [normal(batch, width, device=device, dtype=torch.bfloat16) for _ in range(layers)]
    stacked, slot = torch.empty(layers, batch, width, device=device, dtype=torch.bfloat16), window // 2

    def bmm() -> None:
        torch.stack(rows, out=stacked)
        ring[:, :, slot] = stacked
        dots = torch.matmul(ring, stacked[..., None])[..., 0].float()
        gram[:, :, slot] = dots
        gram[..., slot] = dots

    def verify(name: str, call: Call) -> None:
        gram.zero_()
        call()
        at = slot if name == "bmm" else int(seen[0, 2])
        exact = ring[:, 0].double() @ rows[0][0].double()
        size = ring[:, 0].double().norm(dim=-1) * rows[0][0].double().norm()
        # bmm rounds its products to bfloat16; all rows are the same numbers
        close(name, gram[:, 0, at], exact, size, 1e-2 if name == "bmm" else 1e-6)

    return GpuCase(lambda: rmtkernels.window_push_(ring, gram, seen, rows), {"bmm": bmm}, verify)


def gram(item: Work, small: bool, device: str) -> GpuCase:
    """Peers have no mask, round to bfloat16, and leave the rows of a window in time, without the windows that fill."""
    steps, window = (24, 4) if small else item.sizes
    rows = normal(1, steps, 24 if small else work.WIDTH, device=device, dtype=torch.bfloat16)
    each = rows[0].as_strided((steps - window + 1, window, rows.shape[2]), (rows.shape[2], rows.shape[2], 1))

    def blocks_of_whole() -> Tensor:
        whole = rows[0] @ rows[0].T
        return whole.as_strided((steps - window + 1, window, window), (steps + 1, steps, 1)).float()

    peers = {"bmm of every window": lambda: torch.bmm(each, each.mT), "blocks of X X^T": blocks_of_whole}

    def verify(name: str, call: Call) -> None:
        got = call()[0][0] if name.startswith("ours") else call()
        for end in (steps // 2, steps):  # multiples of the window: a ring is in the order of time there
            exact = rows[0, end - window : end].double()
            norms = exact.norm(dim=1)
            found = got[end - 1 if name.startswith("ours") else end - window]
            close(name, found, exact @ exact.T, norms[:, None] * norms, 1e-6 if name.startswith("ours") else 1e-2)

    return GpuCase(lambda: rmtkernels.window_gram(rows, window), peers, verify)


def descriptors(item: Work, small: bool, device: str) -> GpuCase:
    batch, window = (2, 6) if small else item.sizes
    layers = 2 if small else work.LAYERS
    rows = normal(layers, batch, window, 300, device=device) + 2 * normal(layers, batch, window, 1, device=device)
    gram, seen = rows @ rows.mT, torch.full((batch,), window, device=device)
    out = torch.empty(layers, batch, len(rmtkernels.DESCRIPTORS), device=device)
    values = torch.empty(layers, batch, window, device=device)
    eigvalsh = "eigvalsh (eigenvalues alone)"

    def ours() -> Tensor:
        rmtkernels.spectrum_descriptors_(out, values, gram, seen, 300, center=False)
        return values

    def verify(name: str, call: Call) -> None:
        got = call()[0, 0].cpu().double()
        want = spectrum_descriptors_ref(gram[:1, :1].cpu(), seen[:1].cpu(), 300, center=False)
        got = got.flip(0) / 300 if name == eigvalsh else got
        close(name, got, want[1][0, 0], float(want[1].max()), 1e-5 if name == eigvalsh else 1e-6)
        if name != eigvalsh:
            close(name, out[0, 0].cpu(), want[0][0, 0], 1 + want[0][0, 0].abs(), 1e-5)

    return GpuCase(ours, {eigvalsh: lambda: torch.linalg.eigvalsh(gram)}, verify, (eigvalsh,))


def covariance(item: Work, small: bool, device: str) -> GpuCase:
    (width,), rows, dtype = ((24,), 50, torch.float32) if small else (item.sizes, work.SAMPLES, DTYPES[item.dtype])
    batch = (normal(rows, width, device=device) + 1).to(dtype)
    state = rmtkernels.StreamingCovariance(width, device=device)
    half = "centre, XᵀX in bfloat16"

    def ours() -> Tensor:
        state.reset()
        state.update(batch)
        return state.scatter

    def products() -> Tensor:
        centred = batch - batch.mean(0)
        return centred.T @ centred

    peers: dict[str, Call] = {"torch.cov": lambda: torch.cov(batch.float().T, correction=0)}
    if dtype == torch.bfloat16:
        peers[half] = products

    def verify(name: str, call: Call) -> None:
        part = min(width, 256)
        want = torch.cov(batch[:, :part].double().T, correction=0)
        deviation = want.diagonal().sqrt()
        got = call()[:part, :part].double() / (1 if name == "torch.cov" else rows)
        close(name, got.tril(), want.tril(), torch.outer(deviation, deviation), 3e-2 if name == half else 1e-5)

    return GpuCase(ours, peers, verify)


def multiply(item: Work, small: bool, device: str) -> GpuCase:
    width = 20 if small else item.sizes[0]
    matrix, block = normal(width, width, device=device), normal(work.VECTORS, width, device=device)
    matrix = (matrix + matrix.T) / 2

    def verify(name: str, call: Call) -> None:
        want = block.double() @ matrix.double()
        close(name, call(), want, float(want.abs().max()), 1e-5)

    return GpuCase(lambda: rmtkernels.lanczos_multiply(matrix, block), {"mm": lambda: block @ matrix.T}, verify)


def multiply_gram(item: Work, small: bool, device: str) -> GpuCase:
    width, rows = (20, 50) if small else (item.sizes[0], work.SAMPLES)
    samples, block = normal(rows, width, device=device), normal(work.VECTORS, width, device=device)

    def verify(name: str, call: Call) -> None:
        want = torch.zeros(work.VECTORS, width, dtype=torch.float64, device=device)
        for part in samples.split(10_000):
            want += block.double() @ part.double().T @ part.double()
        close(name, call(), want, float(want.abs().max()), 1e-5)

    ours = lambda: rmtkernels.lanczos_multiply_gram(samples, block)  # noqa: E731
    return GpuCase(ours, {"two mm": lambda: (block @ samples.T) @ samples}, verify)


def top(item: Work, small: bool, device: str) -> GpuCase:
    width, pairs = (600, 4) if small else (item.sizes[0], work.PAIRS)
    samples = normal(2 * width, width, device=device)
    samples[:, :pairs] *= torch.logspace(2, 1, pairs, device=device).sqrt()
    matrix = samples.T @ samples / len(samples)
    peers: dict[str, Call] = {
        "lobpcg": lambda: torch.lobpcg(matrix, pairs, tol=1e-5, niter=200)[0],
        "eigh": lambda: torch.linalg.eigh(matrix)[0].flip(0)[:pairs],
    }

    def verify(name: str, call: Call) -> None:
        want = torch.linalg.eigvalsh(matrix.double()).flip(0)[:pairs]
        close(name, call(), want, float(want[0]), 1e-5)

    def ours() -> Tensor:
        return rmtkernels.lanczos_eigh(matrix, pairs, tol=1e-5).eigenvalues

    return GpuCase(ours, peers, verify, ("ours", "ours, triton", *peers))


def lowrank(item: Work, small: bool, device: str) -> GpuCase:
    rows, rank = (2, 5) if small else item.sizes
    width, dtype = 24 if small else work.WIDTH, DTYPES[item.dtype]
    x, bias = normal(rows, width, device=device, dtype=dtype), normal(width, device=device, dtype=dtype)
    down = (normal(rank, width, device=device) / width**0.5).to(dtype)
    up = (normal(width, rank, device=device) / rank**0.5).to(dtype)

    def verify(name: str, call: Call) -> None:
        want = lowrank_linear_ref(x, down, up, bias)
        close(name, call(), want, float(want.abs().max()), 2e-2 if dtype == torch.bfloat16 else 1e-5)

    peers = {"two F.linear": lambda: functional.linear(functional.linear(x, down), up, bias)}
    return GpuCase(lambda: rmtkernels.lowrank_linear(x, down, up, bias), peers, verify)


# How names of the work begin -> the operator and the case. The first that fits counts.
KINDS: dict[str, tuple[str, Callable[[Work, bool, str], GpuCase]]] = {
    "sliding_window.push": ("window_push_", push),
    "sliding_window.gram": ("window_gram", gram),
    "spectrum.descriptors": ("spectrum_descriptors_", descriptors),
    "covariance.update": ("covariance_update_", covariance),
    "lanczos.top": ("lanczos_multiply", top),
    "lanczos.multiply_gram": ("lanczos_multiply_gram", multiply_gram),
    "lanczos.multiply": ("lanczos_multiply", multiply),
    "lowrank_linear.": ("lowrank_linear", lowrank),
}
