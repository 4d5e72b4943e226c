"""Many requests at once: each is told what transformers tells of its text, whatever happens around it."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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


def driven(folder: Path, scenario: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    given, out = folder / "scenario.json", folder / "out.json"
    given.write_text(json.dumps(scenario))
    command = [sys.executable, "-m", "tests.vllm.drive", str(given), str(out)]
    subprocess.run(command, check=True, env=environment, timeout=600, cwd=Path(__file__).parents[2])
    return json.loads(out.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in turn", "asynchronous"])
def test_every_request_is_told_what_transformers_tells_of_its_text(
    tmp_path: Path, environment: dict[str, str], model_folder: Path, reference: Any, asynchronous: bool
) -> None:
    scenario = {
        "engine": {"model": str(model_folder), **ENGINE},
        "requests": requests(64),
        "asynchronous": asynchronous,
    }
    result = driven(tmp_path, scenario, environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    completions = result["completions"]
    print(f"{len(completions)} completions, {result['steps']} steps, {result['preemptions']} preemptions")
    assert result["preemptions"] >= 10
    assert sum(completion["cached"] > 0 for completion in completions) >= 8
    assert len({completion["name"] for completion in completions}) == 64
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
