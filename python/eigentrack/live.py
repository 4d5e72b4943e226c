"""The report of a run that is going on, served on loopback for as long as it does."""

import json
import secrets
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from eigentrack.recording import current_versions
from eigentrack.report import TokenTexts, chunk, heading, page
from rmtkernels import DESCRIPTORS

if TYPE_CHECKING:
    from eigentrack.monitor import EigenTrack
    from eigentrack.step import Step

_PATIENCE = 2.0  # seconds that the end waits for pages to have heard it
_HEARTBEAT = 5.0


class Live:
    """Context manager: a page at `url` that fills while the model generates.

    It listens on 127.0.0.1 alone, at a port the system chooses. The address holds a secret, for others on this machine,
    and requests must name this host, so that no foreign page reaches it by DNS rebinding. Whoever comes late gets what
    has happened so far. The server ends with the block; pages that are open stay as they are.
    """

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._changed = Condition()
        self._ended = False
        self._listeners = 0
        self._secret = secrets.token_urlsafe(16)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self._server.server_port}/{self._secret}/"

    def __enter__(self) -> "Live":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._publish("end", {})
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._listeners, timeout=_PATIENCE)
        self._server.shutdown()
        self._server.server_close()

    def follow(
        self, track: "EigenTrack", tokenizer: Any, prompt: str | None, threshold: float | None
    ) -> Callable[["Step"], None]:
        """Begins a run of one sequence on the page; what it returns is the monitor's `on_token`."""
        run = heading(track.settings, current_versions(), prompt, threshold)
        spectra = len(run["layers"])
        nothing = torch.empty(0, spectra, len(DESCRIPTORS) + track.window)
        self._publish("run", run | chunk([], nothing, None if track.detector is None else torch.empty(0)))
        decode = TokenTexts(tokenizer)

        def tell(step: "Step") -> None:
            values = torch.cat([step.descriptors[0].unflatten(0, (spectra, -1)), step.eigenvalues[0]], -1)
            risk = None if step.risk is None else step.risk[:1]
            self._publish("steps", chunk([decode(int(step.tokens[0]))], values[None], risk))

        return tell

    def _publish(self, event: str, value: dict[str, Any]) -> None:
        with self._changed:
            text = f"id: {len(self._events) + 1}\nevent: {event}\ndata: {json.dumps(value, allow_nan=False)}\n\n"
            self._events.append(text.encode())
            self._changed.notify_all()

    # What the server's threads call

    def _allows(self, host: str | None) -> bool:
        return host in {f"{name}:{self._server.server_port}" for name in ("127.0.0.1", "localhost")}

    def _stream(self, write: Callable[[bytes], object], heard: int) -> None:
        """Sends the events after the first `heard`, as they come, until the run has ended."""
        with self._changed:
            self._listeners += 1
        try:
            while True:
                with self._changed:
                    if not self._ended and len(self._events) <= heard:
                        self._changed.wait(_HEARTBEAT)
                    fresh, ended = self._events[heard:], self._ended
                write(b"".join(fresh) or b": still there\n\n")  # a page that has gone makes this fail
                heard += len(fresh)
                if ended:
                    return
        finally:
            with self._changed:
                self._listeners -= 1
                self._changed.notify_all()


def _handler(live: Live) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds for a request to come, and for each piece of the answer to be taken
        server_version, sys_version = "eigentrack", ""

        def do_GET(self) -> None:
            if not live._allows(self.headers.get("Host")):
                self.send_error(403, "not for this host")
            elif self.path == f"/{live._secret}/":
                content = page([], live=True).encode()
                self._begin("text/html; charset=utf-8", {"Content-Length": str(len(content))})
                self.wfile.write(content)
            elif self.path == f"/{live._secret}/events":
                last = self.headers.get("Last-Event-ID", "")
                self._begin("text/event-stream", {})
                try:
                    live._stream(self.wfile.write, int(last) if last.isdecimal() and len(last) < 20 else 0)
                except OSError:  # the page has been closed
                    self.close_connection = True
            else:
                self.send_error(404)

        def _begin(self, kind: str, more: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in {"Content-Type": kind, **_HEADERS, **more}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """The terminal belongs to the run."""

    return Handler


_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
