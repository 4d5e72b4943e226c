"""covariance: the covariance matrix of a batch of float32 activations, and the principal components of a stream."""

from collections.abc import Callable

import torch
from sklearn.decomposition import IncrementalPCA
from torch import Tensor

import rmtkernels
from bench.case import Case, case

ROWS, WIDTH = 4096, 2048


class Centred:
    """Plain PyTorch: centre, then one matrix product that computes both halves."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.product, self.out = product, torch.empty(WIDTH, WIDTH)

    def __call__(self, rows: Tensor) -> Tensor:
        centred = rows - rows.mean(0)
        return self.product(centred, self.out)


def gram(centred: Tensor, out: Tensor) -> Tensor:
    return torch.mm(centred.T, centred, out=out).div_(ROWS)


def addmm(centred: Tensor, out: Tensor) -> Tensor:
    return torch.addmm(out, centred.T, centred, beta=0, alpha=1 / ROWS, out=out)


@case("covariance.update_4096x2048", threads=1)
def one_batch() -> Case:
    """A fresh state, one update, one reading: what `torch.cov` gives."""
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) + 1
    state = rmtkernels.StreamingCovariance(WIDTH)

    def ours() -> Tensor:
        state.reset()
        state.update(rows)
        return state.covariance()

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "torch.cov": lambda rows: torch.cov(rows.T, correction=0),
        "best of: centre, Xᵀ X": Centred(gram),
        "best of: centre, addmm": Centred(addmm),
    }

    def verify() -> None:
        want = torch.cov(rows.double().T, correction=0)
        deviation = want.diagonal().sqrt()
        for name, got in {"ours": ours(), **{name: peer(rows) for name, peer in functions.items()}}.items():
            error = ((got - want).abs() / deviation[:, None] / deviation).max()
            assert error <= 2e-6, f"{name}: wrong by {error:.1e}"

    return Case(
        ours=ours,
        peers={name: lambda peer=peer: peer(rows) for name, peer in functions.items()},
        verify=verify,
        targets={"torch.cov": 1.8},
        bytes_read=rows.numel() * 4,
        flops=ROWS * WIDTH * (WIDTH + 1),
        flops_dtype=torch.float32,
        floor_share=0.85,
        rounds=20,
    )


@case("covariance.components_64_of_a_stream", threads=1)
def stream() -> Case:
    """64 principal components of eight batches, none of which is kept. Ours are those of the whole covariance matrix;
    IncrementalPCA keeps 64 directions between batches and forgets the rest, and its error is reported."""
    count, width, components = 512, 512, 64
    generator = torch.Generator().manual_seed(0)
    scales = torch.cat([torch.logspace(1, 0.5, components), torch.ones(width - components)])
    batches = [torch.randn(count, width, generator=generator) * scales for _ in range(8)]
    state = rmtkernels.StreamingCovariance(width)

    def ours() -> rmtkernels.LanczosResult:
        state.reset()
        for batch in batches:
            state.update(batch)
        return rmtkernels.lanczos_eigh(state.covariance(), components)

    def incremental() -> IncrementalPCA:
        found = IncrementalPCA(components)
        for batch in batches:
            found.partial_fit(batch.numpy())
        return found

    rows = torch.cat(batches).double()
    want = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).flip(0)[:components]
    error: dict[str, float] = {}

    def verify() -> None:
        difference = (ours().eigenvalues - want).abs().max() / want[0]
        assert difference <= 1e-5, f"ours: wrong by {difference:.1e}"
        theirs = torch.from_numpy(incremental().explained_variance_) * (len(rows) - 1) / len(rows)
        error["relative error of IncrementalPCA"] = float((theirs / want - 1).abs().max())
        assert error["relative error of IncrementalPCA"] <= 0.5, "IncrementalPCA: something else"

    return Case(
        ours=ours,
        peers={"IncrementalPCA": incremental},
        verify=verify,
        targets={},
        extra=lambda: error,
        bytes_read=rows.numel() * 4,
        flops=len(rows) * width * (width + 1),
        flops_dtype=torch.float32,
        rounds=5,
    )
