"""What EigenTrack costs inside vLLM: throughput and first token at 1, 8 and 32 running requests, on against off.

    .venv-vllm/bin/python -m bench.experiments.vllm_overhead --json bench/results/vllm-overhead.json

One engine, on one thread, with the plugin switched on and off from step to step, in the order on, off, off, on: two
engines, or the same one a few seconds later, are not alike though nothing has changed. What is timed are steps in
which every running request gets one token and all windows are full, and first steps, which read prompts only. A ratio
is off / on in seconds, so that 1 is no cost: each round takes the sums over its steps, of the same requests. Given are
the median over all rounds of several engines, started one after the other, and its 90 % interval by bootstrap over
rounds.

Switched off means: the model's blocks are as they were, and the worker does not look. The scheduler's and the output
processor's wrappers stay, and find nothing to pass on. `--null` never switches on: what it prints is the noise.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

RUNNING, PROMPT, ANSWER = (1, 8, 32), 32, 96
FILLING, STEPS = 34, 60  # steps until windows of 32 rows are full, the first among them, and steps that are timed
FIRST = 4  # first steps in a round
WATCH = {"detector": "smollm2-135m"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
PATTERN = (True, False, False, True)


def made_engine() -> Any:
    from vllm import EngineArgs, LLMEngine

    from eigentrack.loading import demo_model, load_causal_lm

    folder = load_causal_lm(demo_model())[0].name_or_path  # dequantised on disk
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=folder,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=256,
            max_num_seqs=max(RUNNING),
            kv_cache_memory_bytes=512 << 20,
            additional_config={"eigentrack": WATCH},
        )
    )


class Switch:
    """Takes the plugin from an engine of this process, and puts it back."""

    def __init__(self, engine: Any) -> None:
        self._worker = engine.engine_core.engine_core.model_executor.driver_worker.worker
        self._watcher = self._worker.watcher
        modules = self._worker.model_runner.get_model().modules()
        self._tapped = [(block, vars(block)["forward"]) for block in modules if "forward" in vars(block)]

    def __call__(self, on: bool) -> None:
        self._worker.watcher = self._watcher if on else None
        for block, tapped in self._tapped:
            block.forward = tapped if on else tapped.__wrapped__

    def pass_over(self) -> None:
        """Of the step that it was off for, nothing is missed."""
        for tracked in self._watcher._slots._tracked.values():
            tracked.next += 1


def add(engine: Any, running: int, choose: random.Random) -> list[str]:
    """Names of so many new requests."""
    from vllm import SamplingParams

    names = [str(choose.random()) for _ in range(running)]
    for name in names:
        prompt = {"prompt_token_ids": [choose.randrange(1000, 40000) for _ in range(PROMPT)]}
        sampling = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
        engine.add_request(name, prompt, sampling)
    return names


def step(engine: Any) -> float:
    began = time.perf_counter()
    engine.step()
    return time.perf_counter() - began


def first_steps(engine: Any, switch: Switch, running: int, null: bool, choose: random.Random) -> list[float]:
    """Seconds of those that bring each request its first token, off and on."""
    seconds = [0.0, 0.0]
    for index in range(FIRST):
        on = PATTERN[index % 4]
        names = add(engine, running, choose)
        switch(on and not null)
        seconds[on] += step(engine)
        switch(True)
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
    return seconds


def later_steps(engine: Any, switch: Switch, running: int, null: bool, choose: random.Random) -> list[float]:
    """Seconds of steps with full windows, off and on."""
    add(engine, running, choose)
    for _ in range(FILLING):
        engine.step()
    seconds = [0.0, 0.0]
    for index in range(STEPS):
        on = PATTERN[index % 4]
        switch(on and not null)
        seconds[on] += step(engine)
        if not on or null:
            switch.pass_over()
    switch(True)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds


def one_engine(rounds: int, null: bool) -> dict[str, Any]:
    """Seconds off and on for each number of running requests, kind of step and round."""
    engine, choose = made_engine(), random.Random(0)
    switch = Switch(engine)
    found: dict[str, Any] = {}
    for running in RUNNING:
        later_steps(engine, switch, running, null, choose)  # warms up
        found[str(running)] = {
            "steps": [later_steps(engine, switch, running, null, choose) for _ in range(rounds)],
            "first steps": [first_steps(engine, switch, running, null, choose) for _ in range(rounds)],
        }
    return found


def measured(engines: int, rounds: int, null: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.experiments.vllm_overhead", "--one", "--rounds", str(rounds)]
    together: dict[str, dict[str, list[Any]]] = {}
    for _ in range(engines):
        done = subprocess.run(
            [*command, *(["--null"] if null else [])],
            env=os.environ | IN_PROCESS,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for running, kinds in json.loads(done.stdout.splitlines()[-1]).items():
            for kind, of_rounds in kinds.items():
                together.setdefault(running, {}).setdefault(kind, []).extend(of_rounds)
    counts = {"steps": STEPS // 2, "first steps": FIRST // 2}
    return {
        running: {kind: summary(np.array(of_rounds) / counts[kind]) for kind, of_rounds in kinds.items()}
        for running, kinds in together.items()
    }


def summary(seconds: Any) -> dict[str, float]:
    """Of (rounds, 2) seconds of a step, off and on."""
    ratios = seconds[:, 0] / seconds[:, 1]
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, 1), [5, 95])
    off, on = np.median(seconds, 0)
    return {"off": float(off), "on": float(on), "ratio": float(np.median(ratios)), "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.vllm_overhead", description=__doc__)
    parser.add_argument("--engines", type=int, default=3, help="one after the other")
    parser.add_argument("--rounds", type=int, default=5, help="of each engine")
    parser.add_argument("--null", action="store_true", help="compare off with off")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_engine(options.rounds, options.null)))
        return
    asked = {
        "prompt": PROMPT,
        "answer": ANSWER,
        "threads": 1,
        "cores": os.cpu_count(),
        "engines": options.engines,
        "rounds": options.rounds,
    }
    found = {**asked, "running": measured(options.engines, options.rounds, options.null)}
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
