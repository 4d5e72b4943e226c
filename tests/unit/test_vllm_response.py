"""eigentrack.vllm.server: what is added to a response, and what passes untouched."""

import asyncio
import json
from typing import Any

import pytest

from eigentrack.vllm import Readings, RiskInResponses
from eigentrack.vllm.frontend import CHOICES

ASKS = [(b"x-eigentrack", b"risk")]


def answered(bodies: list[Any], kind: str, headers: Any = ASKS, status: int = 200) -> list[dict[str, Any]]:
    """The messages that arrive where an application sends these bodies; one that is callable is called first."""
    arrived: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        length = [(b"content-length", b"1")] if kind == "application/json" else []
        started = [(b"content-type", kind.encode()), *length]
        await send({"type": "http.response.start", "status": status, "headers": started})
        for body in bodies:
            if callable(body):
                body()
            else:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message: Any) -> None:
        arrived.append(dict(message))

    asyncio.run(RiskInResponses(app)({"type": "http", "headers": headers}, None, send))
    return arrived


def body_of(messages: list[dict[str, Any]]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages)


def event(index: int, text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": index, "text": text}]}).encode() + b"\n\n"


def told(body: bytes) -> list[Any]:
    events = [part for part in body.decode().split("\n\n") if part.startswith("data: {")]
    return [json.loads(part[6:])["choices"][0].get("eigentrack") for part in events]


def watch(index: int, *risks: float | None) -> Any:
    def add() -> None:
        choices = CHOICES.get()
        assert choices is not None
        choices.setdefault(index, Readings()).add(risk=list(risks))

    return add


def test_each_event_tells_what_is_new_of_its_choice() -> None:
    bodies = [event(0, "a"), watch(0, 0.5), watch(1, 0.1, 0.2), event(0, "b"), event(1, "c"), event(0, "d")]
    body = body_of(answered([*bodies, watch(0, None, 0.75), event(0, "é ]"), b"data: [DONE]\n\n"], "text/event-stream"))
    news = [{"first": 0, "risk": [0.5]}, {"first": 0, "risk": [0.1, 0.2]}, None, {"first": 1, "risk": [None, 0.75]}]
    assert told(body) == [None, *news]
    assert body.endswith(b"data: [DONE]\n\n") and "é ]".encode() in body


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_may_be_cut_or_joined_on_their_way(size: int) -> None:
    stream = event(0, "a") + b": a comment\n\n" + event(0, "b") + b"data: [DONE]\n\n"
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    body = body_of(answered([watch(0, 0.25), *pieces], "text/event-stream; charset=utf-8"))
    assert told(body) == [{"first": 0, "risk": [0.25]}, None]
    assert body.count(b"\n\n") == 4 and b": a comment\n\n" in body


def test_a_whole_response_keeps_its_length_right() -> None:
    whole = json.dumps({"choices": [{"index": 0, "text": "a"}, {"index": 1}], "usage": None}).encode()
    messages = answered([watch(1, 0.5, 0.6), whole[:20], whole[20:]], "application/json")
    content = json.loads(body_of(messages))
    assert [choice.get("eigentrack") for choice in content["choices"]] == [None, {"first": 0, "risk": [0.5, 0.6]}]
    lengths = [value for name, value in messages[0]["headers"] if name == b"content-length"]
    assert lengths == [str(len(body_of(messages))).encode()]


@pytest.mark.parametrize("headers", [[], [(b"x-eigentrack", b"0")]])
def test_who_does_not_ask_gets_the_same_bytes(headers: Any) -> None:
    bodies = [event(0, "a"), b"data: {broken\n\n"]
    seen: list[Any] = []
    messages = answered([lambda: seen.append(CHOICES.get()), *bodies], "text/event-stream", headers)
    assert body_of(messages) == b"".join(bodies) and seen == [None]


def test_errors_and_other_kinds_pass() -> None:
    assert body_of(answered([b'{"error": 1}'], "application/json", status=400)) == b'{"error": 1}'
    assert body_of(answered([b"eigentrack_slots 4\n\n"], "text/plain")) == b"eigentrack_slots 4\n\n"


def test_what_one_request_asks_is_not_asked_by_the_next() -> None:
    seen: list[Any] = []

    async def app(*_: Any) -> None:
        seen.append(CHOICES.get())

    async def two() -> None:
        for headers in (ASKS, []):
            await RiskInResponses(app)({"type": "http", "headers": headers}, None, None)  # type: ignore[arg-type]

    asyncio.run(two())
    assert seen == [{}, None]
