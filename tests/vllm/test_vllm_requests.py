"""Many requests at once: each is told what transformers tells of its text, whatever happens around it."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.drive import driven
from tests.vllm.oracle import descriptors, distance

TOLERANCE = 1e-3
WATCH = {"detector": "smollm2-135m", "descriptors": True}
# 28 blocks of 32 tokens for up to 16 requests of 100 tokens and more: some must be preempted.
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "kv_cache_memory_bytes": 40 << 20,
    "additional_config": {"eigentrack": WATCH},
}


def requests(count: int) -> list[dict[str, Any]]:
    """Of mixed lengths; every fourth begins with the same forty tokens, every seventh is aborted, every ninth is
    answered three times."""
    choose = random.Random(0)
    shared = [choose.randrange(1000, 40000) for _ in range(40)]
    made = []
    for index in range(count):
        own = [choose.randrange(1000, 40000) for _ in range(choose.randint(3, 80))]
        request = {
            "name": f"request {index}",
            "arrives": choose.randint(0, 100),
            "prompt": shared + own if index % 4 == 0 else own,
            "sampling": {"max_tokens": choose.randint(5, 60), "temperature": 1.0},
        }
        if index % 9 == 4:
            request["sampling"]["n"] = 3
        elif index % 7 == 3:
            request["aborted"] = choose.randint(3, 20)
        made.append(request)
    return made


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in turn", "asynchronous"])
def test_every_request_is_told_what_transformers_tells_of_its_text(
    tmp_path: Path, environment: dict[str, str], model_folder: Path, reference: Any, asynchronous: bool
) -> None:
    scenario = {
        "engine": {"model": str(model_folder), **ENGINE},
        "requests": requests(64),
        "asynchronous": asynchronous,
    }
    result = driven(tmp_path, scenario, environment)
    completions = result["completions"]
    print(f"{len(completions)} completions, {result['steps']} steps, {result['preemptions']} preemptions")
    assert result["preemptions"] >= 10
    assert sum(completion["cached"] > 0 for completion in completions) >= 8
    assert len(completions) == 64 + 2 * sum(request["sampling"].get("n") == 3 for request in scenario["requests"])
    worst = 0.0
    for completion in completions:
        readings, steps = completion["readings"], len(completion["answer"]) - 1
        assert not readings["lost"]
        assert len(readings["risk"]) == len(readings["descriptors"]) == steps, completion["name"]
        if steps:
            expected = descriptors(reference, completion["prompt"], completion["answer"])
            apart = distance(torch.tensor(readings["descriptors"]), expected)
            assert apart < TOLERANCE, completion["name"]
            worst = max(worst, apart)
    print(f"largest distance {worst:.1e}")


def test_a_request_ends_when_its_risk_exceeds_the_limit(
    tmp_path: Path, environment: dict[str, str], model_folder: Path
) -> None:
    limit, tokens = 0.6, 40
    watch = {"detector": "smollm2-135m", "stop_above": limit}
    choose = random.Random(2)
    asked = [
        {
            "name": f"request {index}",
            "arrives": 2 * index,
            "prompt": [choose.randrange(1000, 40000) for _ in range(10)],
            "sampling": {"max_tokens": tokens, "temperature": 0},
        }
        for index in range(24)
    ]
    engine = {"model": str(model_folder), **ENGINE, "additional_config": {"eigentrack": watch}}
    environment = environment | {"OMP_NUM_THREADS": str(os.cpu_count())}  # no core is left for a thread of its own
    result = driven(tmp_path, {"engine": engine, "requests": asked, "asynchronous": True}, environment)
    stopped = 0
    for completion in result["completions"]:
        readings, answer = completion["readings"], completion["answer"]
        assert len(readings["risk"]) == len(answer) - 1
        assert all(risk <= limit for risk in readings["risk"][:-1])
        assert readings["stopped"] == (readings["risk"][-1] > limit and len(answer) < tokens)
        assert completion["reasons"] == (["stop", "eigentrack"] if readings["stopped"] else ["length", None])
        assert readings["stopped"] or len(answer) == tokens
        stopped += readings["stopped"]
    print(f"{stopped} of {len(asked)} stopped")
    assert 0 < stopped < len(asked)
