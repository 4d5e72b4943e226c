"""eigentrack.vllm.beside: the thread beside the engine's, and when there is none."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from eigentrack.vllm import beside

needs_cores = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are bound on Linux only")


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """As if there were a core besides the engine's, whatever this machine has."""
    cores = os.sched_getaffinity(0) | {max(os.sched_getaffinity(0)) + 1}
    monkeypatch.setattr(beside, "_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return cores


@needs_cores
def test_the_thread_computes_alone_and_the_engine_as_before(two_cores: set[int]) -> None:
    threads, mine = torch._C.get_num_threads(), os.sched_getaffinity(0)
    torch._C.set_num_threads(3)
    try:
        with beside.made_thread() or pytest.fail("no thread") as thread:
            found = thread.submit(
                lambda: (torch._C.get_num_threads(), os.sched_getaffinity(0), threading.get_ident())
            ).result()
        assert found[0] == 1
        assert found[1] == two_cores & mine  # Linux leaves out cores that are not there
        assert found[2] != threading.get_ident()
        assert torch._C.get_num_threads() == 3 and os.sched_getaffinity(0) == mine
    finally:
        torch._C.set_num_threads(threads)


@needs_cores
def test_no_thread_where_the_engine_takes_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: len(os.sched_getaffinity(0)))
    assert beside.made_thread() is None


def test_no_thread_where_cores_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert beside.made_thread() is None


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
