"""spectrum: eigenvalues of 30 Gram matrices of 64 rows, as 30 watched layers give them; descriptors of ten of 32."""

import torch

import rmtkernels
from bench.case import Case, case
from rmtkernels.reference import spectrum_descriptors_ref, spectrum_eigvalsh_ref

COUNT, SIZE, WIDTH = 30, 64, 576


def thirty(target: float) -> Case:
    rows = torch.randn(COUNT, SIZE, WIDTH, generator=torch.Generator().manual_seed(0))
    gram = rows @ rows.mT / WIDTH

    def verify() -> None:
        want = spectrum_eigvalsh_ref(gram)
        for name, function in (("ours", rmtkernels.spectrum_eigvalsh), ("eigvalsh", torch.linalg.eigvalsh)):
            assert ((function(gram) - want).abs() <= 1e-6 * want[:, -1:]).all(), f"{name}: wrong eigenvalues"

    return Case(
        ours=lambda: rmtkernels.spectrum_eigvalsh(gram),
        peers={"eigvalsh": lambda: torch.linalg.eigvalsh(gram)},
        verify=verify,
        targets={"eigvalsh": target},
        bytes_read=gram.numel() * 4,
        flops=COUNT * 4 * SIZE**3 // 3,  # Householder reduction alone
    )


@case("spectrum.eigvalsh_30x64", threads=1)
def one_thread() -> Case:
    return thirty(2)


@case("spectrum.eigvalsh_30x64_two_threads", threads=2)
def two_threads() -> Case:
    return thirty(3.5)


@case("spectrum.descriptors_10x32", threads=1)
def descriptors() -> Case:
    """The full set as the monitor asks for it, against the eigenvalues alone: what everything else costs."""
    rows = torch.randn(10, 1, 32, WIDTH, generator=torch.Generator().manual_seed(0)) + 1
    gram, seen = rows @ rows.mT, torch.tensor([32])
    out, eigenvalues = torch.empty(10, 1, len(rmtkernels.DESCRIPTORS)), torch.empty(10, 1, 32)

    def ours() -> torch.Tensor:
        rmtkernels.spectrum_descriptors_(out, eigenvalues, gram, seen, WIDTH, normalize="rms")
        return out

    def verify() -> None:
        want, _ = spectrum_descriptors_ref(gram, seen, WIDTH, normalize="rms")
        torch.testing.assert_close(ours().double(), want, rtol=1e-5, atol=1e-6)

    return Case(
        ours=ours,
        peers={"our eigenvalues alone": lambda: rmtkernels.spectrum_eigvalsh(gram[:, 0])},
        verify=verify,
        targets={},
        bytes_read=gram.numel() * 4,
        flops=10 * 4 * 32**3 // 3,
    )
