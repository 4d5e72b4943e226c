"""`eigentrack watch --live`: who may ask, what they get, and when it ends."""

import base64
import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from eigentrack import EigenTrack
from eigentrack import live as live_module
from eigentrack.live import Live
from eigentrack.report import runs_of
from tests.integration.browser import CHROMIUM, DRIVER, browser
from tests.integration.recordings import Vocabulary, recording

PROMPT = torch.tensor([[5, 9, 17, 33]])
WORDS = Vocabulary([f" w{i}<b>" for i in range(64)])


@pytest.fixture
def endless(llama: Any) -> Any:
    llama.generation_config.eos_token_id = None
    return llama


def ask(live: Live, path: str | None = None, host: str | None = None, **headers: str) -> http.client.HTTPResponse:
    """A GET of a path behind the secret one, or of any other."""
    url = urlsplit(live.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
    connection.putrequest("GET", url.path if path is None else path, skip_host=True)
    for name, value in {"Host": host or url.netloc, **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    return connection.getresponse()


def events(answer: http.client.HTTPResponse) -> Iterator[tuple[int, str, Any]]:
    for block in answer.read().decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        if fields.get("event"):
            yield int(fields["id"]), fields["event"], json.loads(fields["data"])


def generate(model: Any, live: Live, tokens: int = 6) -> EigenTrack:
    with EigenTrack(model, layers=[1, 4], window=4) as track:
        track.on_token = live.follow(track, WORDS, "<Why?>", None)
        model.generate(PROMPT, max_new_tokens=tokens, do_sample=False)
    return track


def test_what_a_page_hears_is_what_a_report_shows(endless: Any) -> None:
    with Live() as live:
        path = urlsplit(live.url).path + "events"
        early = ask(live, path)
        track = generate(endless, live)
        answers = [early, ask(live, path), ask(live, path, Last_Event_ID="4")]
    heard = [list(events(answer)) for answer in answers]
    assert heard[0] == heard[1], "who comes late gets less"
    assert [number for number, _, _ in heard[1]] == list(range(1, 8))
    assert heard[2] == heard[1][4:], "who comes back gets some twice"
    names = [name for _, name, _ in heard[1]]
    assert names == ["run", "steps", "steps", "steps", "steps", "steps", "end"]
    run = heard[1][0][2]
    [wanted] = runs_of(track.recording(), WORDS, ["<Why?>"])
    assert {**run, "tokens": [], "values": ""} == {**wanted, "tokens": [], "values": ""}
    assert [step["tokens"][0] for _, _, step in heard[1][1:-1]] == wanted["tokens"]
    values = b"".join(base64.b64decode(step["values"]) for _, _, step in heard[1][1:-1])
    assert values == base64.b64decode(wanted["values"])


def test_only_this_machine_may_ask_and_by_its_name() -> None:
    with Live() as live:
        port = urlsplit(live.url).port
        assert live._server.server_address[0] == "127.0.0.1"
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port}.evil.example", " "):
            for path in ("", "events"):
                answer = ask(live, urlsplit(live.url).path + path, host=host)
                assert answer.status == 403 and b"policy" not in answer.read().lower(), "open to DNS rebinding"
        assert ask(live, host=f"localhost:{port}").status == 200
        for path in (
            "/",
            "/favicon.ico",
            "/events",
            "/x/events",
            f"{urlsplit(live.url).path}../cli.py",
            "/../page/page.js",
        ):
            assert ask(live, path).status == 404
        answer = ask(live)
        assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert answer.headers["Cache-Control"] == "no-store" and answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in answer.headers
        with Live() as other:
            assert other.url != live.url and len(urlsplit(other.url).path) > 20


def test_it_ends_with_the_run(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "_PATIENCE", 0.3)
    before = threading.active_count()
    with Live() as live:
        open_page = ask(live, urlsplit(live.url).path + "events")
    assert [name for _, name, _ in events(open_page)] == ["end"]
    with pytest.raises(ConnectionRefusedError):
        ask(live)
    with Live() as live:  # a page that is gone, and one that never reads, hold nobody up
        ask(live, urlsplit(live.url).path + "events").close()
        silent = ask(live, urlsplit(live.url).path + "events")
        generate(endless, live)
    silent.close()
    assert threading.active_count() <= before + 2


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the path")
def test_the_page_fills_while_the_model_generates(endless: Any, tmp_path: Any) -> None:
    may_go_on, stepped = threading.Semaphore(0), threading.Semaphore(0)

    def run(live: Live) -> None:
        with EigenTrack(endless, layers=[1, 4], window=4) as track:
            tell = live.follow(track, WORDS, "<Why?>", None)

            def slowly(step: Any) -> None:
                assert may_go_on.acquire(timeout=60)
                tell(step)
                stepped.release()

            track.on_token = slowly
            endless.generate(PROMPT, max_new_tokens=5, do_sample=False)

    with browser(tmp_path) as window:
        with Live() as live:
            window.open(live.url)
            window.wait("document.getElementById('status').textContent.startsWith('Waiting')")
            model = threading.Thread(target=run, args=(live,), daemon=True)
            model.start()
            window.wait("document.getElementById('prompt').textContent === '<Why?>'")
            for count in range(1, 5):
                may_go_on.release()
                assert stepped.acquire(timeout=60)
                window.wait(f"document.querySelectorAll('#answer > span').length === {count}")
                assert "generating" in window.run("return document.getElementById('status').textContent")
            model.join(60)
        window.wait("document.getElementById('status').textContent.includes('finished')")
        window.run("document.getElementById('layer').onchange({ target: { value: 1 } })")
        window.wait("document.querySelectorAll('.strip.chosen').length === 1")
        assert "finished" in window.run("return document.getElementById('status').textContent"), (
            "forgotten when drawn anew"
        )
        assert window.run("return document.querySelector('#answer').textContent").count("<b>") == 4
        assert window.run("return document.querySelectorAll('.strip').length") == 2
        with Live() as live:
            live._publish("run", runs_of(recording(3), threshold=1.0)[0])
            window.open(live.url)
            window.wait("document.getElementById('verdict').textContent.includes('has not fired so far')")
        window.wait("document.getElementById('verdict').textContent.includes('would not have fired')")
        assert [line for line in window.complaints() if "favicon" not in line] == []
