"""Runs one engine and writes down what became of each completion: python -m tests.vllm.drive SCENARIO OUT.

A process of its own: an engine leaves its marks on torch. SCENARIO is JSON: `engine` goes to EngineArgs, `requests` are
dicts of `name`, `arrives` (engine step), `prompt` (token ids), `sampling`, and maybe `aborted` after so many tokens.
With `asynchronous`, the next step is scheduled before the last one's tokens are known. vLLM turns that off for the CPU,
where nothing would be gained by it; its scheduler and model runner do it all the same when told so afterwards.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.v1.executor import Executor
from vllm.v1.metrics.reader import get_metrics_snapshot


def make_engine(scenario: dict[str, Any]) -> LLMEngine:
    config = EngineArgs(**scenario["engine"]).create_engine_config()
    if scenario.get("asynchronous"):
        config.scheduler_config.async_scheduling = True
        config.scheduler_config.scheduler_cls = "eigentrack.vllm.scheduler.WatchingAsyncScheduler"
    executor = Executor.get_class(config)
    return LLMEngine(config, executor, log_stats=True, multiprocess_mode=scenario.get("processes", False))


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    engine = make_engine(scenario)
    waiting = sorted(scenario["requests"], key=lambda request: request["arrives"])
    aborts = {request["name"]: request["aborted"] for request in waiting if "aborted" in request}
    latest: dict[str, Any] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0]["arrives"] <= step:
            request = waiting.pop(0)
            prompt = {"prompt_token_ids": request["prompt"]}
            engine.add_request(request["name"], prompt, SamplingParams(ignore_eos=True, **request["sampling"]))
        for output in engine.step():
            latest[output.request_id] = output
            if len(output.outputs[0].token_ids) >= aborts.get(output.request_id, 1 << 30):
                engine.abort_request([output.request_id])
                del aborts[output.request_id]
        step += 1
    values = {metric.name: metric.value for metric in get_metrics_snapshot() if hasattr(metric, "value")}
    completions = [
        {
            "name": name,
            "prompt": list(output.prompt_token_ids),
            "answer": list(completion.token_ids),
            "cached": output.num_cached_tokens,
            "reasons": [completion.finish_reason, completion.stop_reason],
            "readings": vars(completion.eigentrack),
        }
        for name, output in latest.items()
        for completion in output.outputs
    ]
    return {"steps": step, "preemptions": values["vllm:num_preemptions"], "completions": completions}


if __name__ == "__main__":
    given, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps(run(json.loads(given.read_text()))))
