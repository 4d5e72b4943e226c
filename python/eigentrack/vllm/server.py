"""Risk in the responses of vLLM's OpenAI-compatible server, for those who ask."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from eigentrack.vllm.frontend import CHOICES
from eigentrack.vllm.report import KEY, Readings

HEADER = b"x-eigentrack"
Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class RiskInResponses:
    """ASGI middleware: `vllm serve --middleware eigentrack.vllm.RiskInResponses`.

    To a request with the header `X-EigenTrack: risk`, each choice of a completion or chat completion is answered with a
    field more, `"eigentrack": {"first": t, "risk": [...]}`: the risks of tokens t, t + 1, ... that have become known
    since the last chunk. All other responses pass untouched.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        if scope["type"] != "http" or dict(scope["headers"]).get(HEADER) != b"risk":
            return await self._app(scope, receive, send)
        choices: dict[int, Readings] = {}
        token = CHOICES.set(choices)
        try:
            await self._app(scope, receive, _Response(send, choices).send)
        finally:
            CHOICES.reset(token)


class _Response:
    """One response on its way out."""

    def __init__(self, send: Callable[[Message], Awaitable[None]], choices: dict[int, Readings]) -> None:
        self._send = send
        self._choices = choices
        self._told: dict[int, int] = {}  # how many risks of each choice have been sent
        self._start: Message | None = None  # held back until the length is known
        self._kind = b""
        self._kept = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._kind = dict(message["headers"]).get(b"content-type", b"").partition(b";")[0]
            if self._kind == b"application/json" and message["status"] == 200:
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._start is not None:
            self._kept += message.get("body", b"")
            if message.get("more_body"):
                return
            body = self._with_risk(self._kept)
            headers = [pair for pair in self._start["headers"] if pair[0] != b"content-length"]
            self._start["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
            await self._send(self._start)
            message = {**message, "body": body}
        elif message["type"] == "http.response.body" and self._kind == b"text/event-stream":
            *events, rest = (self._kept + message.get("body", b"")).split(b"\n\n")
            body = b"".join(self._event(event) + b"\n\n" for event in events)
            self._kept, tail = (rest, b"") if message.get("more_body") else (b"", rest)
            message = {**message, "body": body + tail}
        await self._send(message)

    def _event(self, event: bytes) -> bytes:
        data = event.removeprefix(b"data: ")
        return b"data: " + self._with_risk(data) if event.startswith(b"data: {") else event

    def _with_risk(self, text: bytes) -> bytes:
        """The JSON object with a field more in each choice that has news."""
        content = json.loads(text)
        for choice in content.get("choices", ()):
            index = choice.get("index", 0)
            readings, told = self._choices.get(index), self._told.get(index, 0)
            if readings is not None and len(readings.risk) > told:
                choice[KEY] = {"first": told, "risk": readings.risk[told:]}
                self._told[index] = len(readings.risk)
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
