"""Where the time of a watched step of vLLM goes, in microseconds of the processor, at 1, 8 and 32 running requests.

    .venv-vllm/bin/python -m bench.experiments.vllm_parts

The engine computes on one thread, and what is behind the pass in another where a core is free; means over all steps,
prompts too. Reading the counter is in them, about a microsecond each time, and what else it costs that there is
something between two blocks is not: `bench.experiments.vllm_overhead` measures the whole.
"""

import os
import random
import time
from collections import defaultdict
from functools import wraps
from typing import Any

from bench.experiments.vllm_overhead import IN_PROCESS, RUNNING, add, made_engine

ROUNDS = 4


def counted(spent: dict[str, float]) -> None:
    """From now on the seconds of each part are added up in `spent`."""
    from eigentrack.network import Stepper
    from eigentrack.vllm import frontend, scheduler, state, worker

    places: list[tuple[Any, str, str]] = [
        (state.State, "collect", "rows of the watched layers"),
        (worker.Watcher, "_finish_pass", "asking the thread"),
        (state.State, "finish", "all behind the pass"),
        (state.SlidingWindow, "update", "- push"),
        (state, "spectrum_descriptors_", "- spectra"),
        (Stepper, "__call__", "- detector"),
        (worker.Watcher, "begin", "bookkeeping in the worker"),
        (worker.Watcher, "_begin_pass", "bookkeeping in the worker"),
        (worker.Watcher, "attach", "bookkeeping in the worker"),
        (scheduler._Watching, "_stop_risky", "passing on"),
        (scheduler._Watching, "_pass_on", "passing on"),
        (frontend, "_take", "passing on"),
    ]
    for owner, name, part in places:
        setattr(owner, name, timed(getattr(owner, name), part, spent))


def timed(function: Any, part: str, spent: dict[str, float]) -> Any:
    @wraps(function)
    def called(*args: Any, **named: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*args, **named)
        finally:
            spent[part] += time.thread_time() - began

    return called


def answer(engine: Any, running: int, choose: random.Random) -> int:
    """Steps that it took."""
    add(engine, running, choose)
    steps = 0
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
    return steps


def main() -> None:
    os.environ |= IN_PROCESS
    spent: dict[str, float] = defaultdict(float)
    counted(spent)
    engine, choose = made_engine(), random.Random(0)
    for running in RUNNING:
        answer(engine, running, choose)  # warms up
        spent.clear()
        began = time.thread_time()
        steps = sum(answer(engine, running, choose) for _ in range(ROUNDS))
        spent["a step of the engine"] = time.thread_time() - began
        print(f"{running} running")
        for part, seconds in spent.items():
            print(f"  {part:30}{1e6 * seconds / steps:9.0f}", flush=True)


if __name__ == "__main__":
    main()
