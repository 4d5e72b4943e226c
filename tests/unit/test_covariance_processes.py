"""StreamingCovariance.all_reduce between processes of a gloo group."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rmtkernels import DtypeError, RangeError, ShapeError, StateError, StreamingCovariance
from tests.helpers import normal, same_bits

ROWS, D = 900, 300  # wider than one block of what is sent
REFUSED = {"width": ShapeError, "dtype": DtypeError, "decayed": StateError, "overflow": RangeError}


def rows_of(rank: int, processes: int) -> torch.Tensor:
    """Parts of unequal length with means apart; the last process has none."""
    rows = normal(ROWS, D) + torch.linspace(0, 20, ROWS)[:, None]
    cuts = [ROWS * rank * rank // (processes - 1) ** 2 for rank in range(processes)]
    return rows[cuts[rank] : cuts[rank + 1]] if rank + 1 < processes else rows[:0]


def spoiled(fault: str, rank: int) -> StreamingCovariance:
    """A good state in all processes but the last."""
    if rank == 0:
        state = StreamingCovariance(D)
    else:
        dtype = torch.float64 if fault == "dtype" else torch.float32
        state = StreamingCovariance(D + (fault == "width"), dtype=dtype, decay=0.5 if fault == "decayed" else 1.0)
    for seed in range(2):
        state.update(normal(5, len(state.mean), seed=seed) + (1e18 if fault == "overflow" and rank else 0))
    return state


def run_process(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    saved: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64):
        state = StreamingCovariance(D, dtype=dtype)
        state.update(normal(3, D) * 1e15)
        state.reset()  # the process without rows must not send what is left of these
        state.update(rows_of(rank, processes))
        state.all_reduce()
        saved[str(dtype)] = {**state.state_dict(), "covariance": state.covariance()}
    for fault in REFUSED:
        state = spoiled(fault, rank)
        before = state.state_dict()
        try:
            state.all_reduce()
        except Exception as error:
            kept = all(same_bits(tensor, before[name]) for name, tensor in state.state_dict().items())
            saved[fault] = (type(error).__name__, kept)
    torch.save(saved, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_ends_with_one_pass_over_all_rows(processes: int, tmp_path: Path) -> None:
    mp.spawn(run_process, (processes, str(tmp_path)), nprocs=processes)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    everything = torch.cat([rows_of(rank, processes) for rank in range(processes)])
    assert len(everything) == ROWS
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        whole = StreamingCovariance(D, dtype=dtype)
        whole.update(everything)
        want = whole.covariance()
        deviation = want.diagonal().sqrt()
        got = [result[str(dtype)] for result in results]
        assert ((got[0]["covariance"] - want).abs() <= limit * deviation[:, None] * deviation).all()
        torch.testing.assert_close(got[0]["mean"], whole.mean, rtol=1e-13, atol=1e-12)
        assert torch.equal(got[0]["totals"], whole.totals)
        for other in got[1:]:
            assert all(same_bits(other[name], got[0][name]) for name in ("covariance", "mean", "totals"))
    for fault, error in REFUSED.items():
        assert [result[fault] for result in results] == [(error.__name__, True)] * processes
