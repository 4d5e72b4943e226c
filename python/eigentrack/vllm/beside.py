"""A thread beside the engine's, on the CPU: what follows the watched blocks runs while vLLM computes the logits."""

import os
import time
from collections.abc import Callable
from multiprocessing import parent_process
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")
# Seconds after which the engine's thread has come to the logits' product: until then both would want Python's lock.
_DELAY = 2e-4


class Job(Generic[Result]):
    """What the thread has been asked for."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._running = Lock()
        self._running.acquire()
        self._result: Result | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self._running.release()

    def wait(self) -> None:
        with self._running:
            pass

    def result(self) -> Result:
        """What the work returned or raised, once it has."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class Beside:
    """One thread, which computes on one core and may use any of `cores`.

    The engine's thread asks: an executor of the standard library would take more of its time.
    """

    def __init__(self, cores: set[int]) -> None:
        self._cores = cores
        self._asked: SimpleQueue[Job[Any]] = SimpleQueue()
        Thread(target=self._run, name="eigentrack", daemon=True).start()

    def ask(self, work: Callable[[], Result]) -> Job[Result]:
        job = Job(work)
        self._asked.put(job)
        return job

    def _run(self) -> None:
        os.sched_setaffinity(0, self._cores)  # of this thread alone
        torch._C.set_num_threads(1)  # too; vLLM has replaced torch.set_num_threads by a warning
        while True:
            job = self._asked.get()
            time.sleep(_DELAY)
            job.run()


def spare_cores() -> set[int]:
    """All cores that the engine may use, if its threads do not take all of them."""
    cores = _cores()
    return cores if len(cores) > torch.get_num_threads() else set()


def most_rows(threads: int, vocabulary: int, layers: int, window: int) -> int:
    """How many rows a step may have for the thread to be through when the logits are.

    For each row one core reads `layers` · `window` rows of windows and reduces the spectra, which takes as long again;
    meanwhile `threads` cores read the output embedding's `vocabulary` rows, as wide.
    """
    return vocabulary // (2 * layers * window * threads)


def _cores() -> set[int]:
    """All that the engine may use. vLLM binds the threads of its workers to cores, and importing torch narrows a worker
    to its own; who started the worker knows the others."""
    if not hasattr(os, "sched_getaffinity"):  # not on Linux
        return set()
    parent = parent_process()
    return os.sched_getaffinity(0 if parent is None or parent.pid is None else parent.pid)
