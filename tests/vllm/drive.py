"""Runs one engine and writes down what became of each completion: python -m tests.vllm.drive SCENARIO OUT.

A process of its own: an engine leaves its marks on torch. SCENARIO is JSON: `engine` goes to EngineArgs, `requests` are
dicts of `name`, `arrives` (engine step), `prompt` (token ids), `sampling`, and maybe `aborted` after so many tokens.
With `asynchronous`, the next step is scheduled before the last one's tokens are known. vLLM turns that off for the CPU,
where nothing would be gained by it; its scheduler and model runner do it all the same when told so afterwards.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def driven(folder: Path, scenario: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """What a process of its own makes of the scenario."""
    given, out = folder / "scenario.json", folder / "out.json"
    given.write_text(json.dumps(scenario))
    command = [sys.executable, "-m", "tests.vllm.drive", str(given), str(out)]
    in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run(command, check=True, env=environment | in_process, timeout=600, cwd=Path(__file__).parents[2])
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def make_engine(scenario: dict[str, Any]) -> Any:
    from vllm import EngineArgs, LLMEngine
    from vllm.v1.executor import Executor

    config = EngineArgs(**scenario["engine"]).create_engine_config()
    if scenario.get("asynchronous"):
        config.scheduler_config.async_scheduling = True
        config.scheduler_config.scheduler_cls = "eigentrack.vllm.scheduler.WatchingAsyncScheduler"
    return LLMEngine(config, Executor.get_class(config), log_stats=True)


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.v1.metrics.reader import get_metrics_snapshot

    engine = make_engine(scenario)
    waiting = sorted(scenario["requests"], key=lambda request: request["arrives"])
    aborts = {request["name"]: request["aborted"] for request in waiting if "aborted" in request}
    latest: dict[tuple[str, int], Any] = {}  # by name and index of the completion
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0]["arrives"] <= step:
            request = waiting.pop(0)
            prompt = {"prompt_token_ids": request["prompt"]}
            engine.add_request(request["name"], prompt, SamplingParams(ignore_eos=True, **request["sampling"]))
        for output in engine.step():
            latest |= {(output.request_id, completion.index): (output, completion) for completion in output.outputs}
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
        for (name, _), (output, completion) in latest.items()
    ]
    return {"steps": step, "preemptions": values["vllm:num_preemptions"], "completions": completions}


if __name__ == "__main__":
    given, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps(run(json.loads(given.read_text()))))
