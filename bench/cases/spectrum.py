"""spectrum: eigenvalues of 30 Gram matrices of 64 rows, as 30 watched layers give them."""

import torch

import rmtkernels
from bench.case import Case, case
from rmtkernels.reference import spectrum_eigvalsh_ref

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
