"""The processes of a run under torchrun: what each does of the work, and what all agree on.

Each holds the whole model and reads the same batches; of a batch to train on each takes an equal part, and of the
batches to calibrate on every n-th. Process 0 alone writes files. Without torchrun there is one process, which does all.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_PATIENCE = timedelta(hours=6)  # that others wait for process 0, or for a process that has died and was not noticed


def count() -> int:
    """How many there are. The first to ask joins those that torchrun started."""
    if not dist.is_available():
        return 1
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return 1
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    return dist.get_world_size()


def first() -> bool:
    """Whether this is process 0."""
    return count() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()


def agreed(values: Iterable[float]) -> list[float]:
    """What process 0 has for these numbers: measurements differ, and decisions must not."""
    mine = torch.tensor(list(values), dtype=torch.float64)
    if count() > 1:
        dist.broadcast(mine, 0)
    return mine.tolist()


def every(batches: Iterable[T]) -> Iterator[T]:
    """The batches that are this process's to calibrate on."""
    return islice(batches, 0 if count() == 1 else dist.get_rank(), None, count())


def part(batch: Mapping[str, Any], labels: str, ignored: int) -> Mapping[str, Any]:
    """The rows of a batch that are this process's to train on; with fewer rows than processes, one that is ignored."""
    parts, rows = count(), len(batch[labels])
    if parts == 1:
        return batch
    mine = torch.arange(rows).tensor_split(parts)[dist.get_rank()].tolist() or [0]
    chosen = slice(mine[0], mine[-1] + 1)
    own = {
        name: value[chosen] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
        for name, value in batch.items()
    }
    if rows <= dist.get_rank():
        own[labels] = torch.full_like(own[labels], ignored)
    return own


def share(counted: int) -> float:
    """The factor that makes a mean over so many of this process's labels one over all labels, once the mean over
    processes has been taken, as of gradients it is."""
    if count() == 1:
        return 1.0
    together = torch.tensor(float(counted), dtype=torch.float64)
    dist.all_reduce(together)
    return counted * count() / max(float(together), 1.0)
