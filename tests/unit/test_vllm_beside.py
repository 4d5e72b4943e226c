"""eigentrack.vllm.beside: the thread beside the engine's, and when there is none."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from eigentrack.vllm import beside
from eigentrack.vllm.beside import Beside

needs_cores = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are bound on Linux only")


@needs_cores
def test_the_thread_computes_alone_and_the_engine_as_before() -> None:
    threads, mine = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(3)
    try:
        found = Beside({max(mine)}).ask(
            lambda: (torch.get_num_threads(), os.sched_getaffinity(0), threading.current_thread().name)
        )
        assert found.result() == (1, {max(mine)}, "eigentrack")
        assert torch.get_num_threads() == 3 and os.sched_getaffinity(0) == mine
    finally:
        torch.set_num_threads(threads)


@needs_cores
def test_jobs_are_done_in_turn_and_each_tells_its_own_result_or_error() -> None:
    done: list[int] = []

    def work(index: int) -> int:
        done.append(index)
        return 1 // index

    thread = Beside(os.sched_getaffinity(0))
    jobs = [thread.ask(partial(work, index)) for index in (1, 0, 2)]
    jobs[2].wait()
    assert done == [1, 0, 2]
    assert jobs[2].result() == 0 and jobs[0].result() == 1
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            jobs[1].result()


@needs_cores
def test_cores_are_spare_where_the_engines_threads_do_not_take_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads, spare in (({0, 1, 5}, 2, {0, 1, 5}), ({0, 1, 5}, 3, set()), ({0}, 1, set())):
        monkeypatch.setattr(beside, "_cores", lambda cores=cores: cores)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert beside.spare_cores() == spare


def test_no_core_is_spare_where_cores_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert beside.spare_cores() == set()


STARTS_A_WORKER = """
import multiprocessing, os
from eigentrack.vllm import beside

def worker():
    print(sorted(os.sched_getaffinity(0)), sorted(beside._cores()))

if __name__ == "__main__":
    os.environ |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "{%d}"}
    process = multiprocessing.get_context("spawn").Process(target=worker)
    process.start()
    process.join()
"""


@needs_cores
def test_where_vllm_binds_a_worker_the_other_cores_are_known(tmp_path: Path) -> None:
    """OpenMP narrows a process to its places when torch is imported."""
    mine = sorted(os.sched_getaffinity(0))
    program = tmp_path / "starts_a_worker.py"
    program.write_text(STARTS_A_WORKER % mine[0])
    found = subprocess.run([sys.executable, program], stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout
    assert found == f"{mine[:1]} {mine}\n"


def test_a_step_with_many_rows_stays_in_the_engines_threads() -> None:
    assert beside.most_rows(threads=1, vocabulary=49152, layers=10, window=32) == 76
    assert beside.most_rows(threads=16, vocabulary=49152, layers=10, window=32) == 4
    assert beside.most_rows(threads=64, vocabulary=32000, layers=32, window=64) == 0
