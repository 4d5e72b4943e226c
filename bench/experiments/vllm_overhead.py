"""What EigenTrack costs inside vLLM: throughput and first token at 1, 8 and 32 running requests, on against off.

    .venv-vllm/bin/python -m bench.experiments.vllm_overhead --json bench/results/vllm-overhead.json

Two engines, one with the plugin and one without, each in a process of its own, on one thread, and idle while the other
runs: they take turns, a few steps at a time, and every second turn goes backwards. A round is all answers of all
requests. A ratio is off / on in seconds, so that 1 is no cost; its median over rounds, with the interval that holds
90 % of them. Seconds of the processor are given beside those of the clock: they tell the cost where other programs run
too.
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

RUNNING, PROMPT, ANSWER = (1, 8, 32), 32, 64
STEPS = 4  # of a turn
WATCH = {"detector": "smollm2-135m"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}


def made_engine(watched: bool) -> Any:
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
            additional_config={"eigentrack": WATCH} if watched else {},
        )
    )


def add(engine: Any, running: int, choose: random.Random) -> None:
    from vllm import SamplingParams

    for _ in range(running):
        prompt = {"prompt_token_ids": [choose.randrange(1000, 40000) for _ in range(PROMPT)]}
        sampling = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
        engine.add_request(str(time.perf_counter()), prompt, sampling)


def serve(watched: bool) -> None:
    """The child: at a line "add 8" it takes so many requests, at "step 4" so many steps at most. It prints seconds by
    the clock and by the processor, and whether there is more to do."""
    engine, choose = made_engine(watched), random.Random(0)
    print("ready", flush=True)
    for line in sys.stdin:
        what, count = line.split()
        began, spent = time.perf_counter(), time.process_time()
        if what == "add":
            add(engine, int(count), choose)
        for _ in range(int(count) if what == "step" else 0):
            if engine.has_unfinished_requests():
                engine.step()
        times = time.perf_counter() - began, time.process_time() - spent
        print(json.dumps([*times, engine.has_unfinished_requests()]), flush=True)


def started(name: str) -> Any:
    environment = os.environ | IN_PROCESS
    command = [sys.executable, "-m", "bench.experiments.vllm_overhead", "--engine", name]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(engine: Any, what: str, count: int) -> Any:
    engine.stdin.write(f"{what} {count}\n")
    engine.stdin.flush()
    return np.array(json.loads(engine.stdout.readline()))


def one_round(engines: dict[str, Any], running: int) -> dict[str, list[float]]:
    """Of each engine: seconds till all tokens by the clock and by the processor, and till the end of the first step,
    which brings every request its first token."""
    total = {name: ask(engine, "add", running) for name, engine in engines.items()}
    first: dict[str, float] = {}
    order, more = list(engines), True
    while more:
        order.reverse()
        more = False
        for name in order:
            found = ask(engines[name], "step", STEPS if first.keys() == engines.keys() else 1)
            total[name] = total[name] + found
            first.setdefault(name, total[name][0])
            more |= bool(found[2])
    return {name: [*total[name][:2], first[name]] for name in engines}


def summary(off: Any, on: Any) -> dict[str, float]:
    low, middle, high = np.percentile(off / on, [5, 50, 95])
    return {"off": float(np.median(off)), "on": float(np.median(on)), "ratio": middle, "low": low, "high": high}


def measure(rounds: int) -> dict[str, Any]:
    engines = {name: started(name) for name in ("off", "on")}
    try:
        for engine in engines.values():
            while engine.stdout.readline() not in ("ready\n", ""):
                pass
        found = {}
        for running in RUNNING:
            found_by_round = [one_round(engines, running) for _ in range(rounds + 1)][1:]  # the first warms up
            off, on = (np.array([each[name] for each in found_by_round]).T for name in ("off", "on"))
            names = ("all tokens", "all tokens, processor", "first token")
            found[str(running)] = {name: summary(off[i], on[i]) for i, name in enumerate(names)}
            print(running, json.dumps(found[str(running)], indent=2), flush=True)
    finally:
        for engine in engines.values():
            engine.stdin.close()
            engine.wait(60)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.vllm_overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--engine", choices=["off", "on"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        serve(options.engine == "on")
        return
    found = {"prompt": PROMPT, "answer": ANSWER, "rounds": options.rounds, "running": measure(options.rounds)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
