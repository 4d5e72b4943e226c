"""A thread beside the engine's, on the CPU: what follows the watched blocks runs while vLLM computes the logits."""

import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import parent_process

import torch


def made_thread() -> ThreadPoolExecutor | None:
    """One thread, which computes on one core and may use any; None where the engine's threads take all cores."""
    cores = _cores()
    if len(cores) <= torch.get_num_threads():
        return None

    def settle() -> None:
        os.sched_setaffinity(0, cores)  # of this thread alone
        torch._C.set_num_threads(1)  # too; vLLM has replaced torch.set_num_threads by a warning

    return ThreadPoolExecutor(1, "eigentrack", settle)


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
