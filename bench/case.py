"""What a benchmark case is, and the registry of all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """One comparison, set up and ready to run.

    Attributes:
        ours: one call of our implementation.
        peers: the same job by others; a name that starts with "best of:" marks candidates of which the fastest counts.
        verify: raises AssertionError if ours or a peer computes something else than the oracle.
        targets: lowest ratio peer / ours to reach, by peer ("best" for the fastest candidate).
        bytes_read, flops: what a call cannot avoid reading and computing; copy bandwidth and the GEMM peak of
            `flops_dtype`, measured in the same rounds, make a floor of the slower of the two.
        footprint: bytes in use, where a call reads them more than once; 0 for `bytes_read`. The copy is that large.
        floor_share: lowest share of that floor to reach; 0 for no target.
        extra: further figures of ours, taken after the timing, and the highest value each may have.
    """

    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    verify: Callable[[], None]
    targets: dict[str, float]
    bytes_read: int = 0
    footprint: int = 0
    flops: int = 0
    flops_dtype: torch.dtype = torch.float64
    floor_share: float = 0
    extra: Callable[[], dict[str, float]] = dict
    limits: dict[str, float] = field(default_factory=dict)
    rounds: int = 60


REGISTRY: dict[str, tuple[int, Callable[[], Case]]] = {}


def case(name: str, threads: int = 1) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Registers a function that sets a case up, to be run with `threads` CPU threads."""

    def register(setup: Callable[[], Case]) -> Callable[[], Case]:
        REGISTRY[name] = (threads, setup)
        return setup

    return register
