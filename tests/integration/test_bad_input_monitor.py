"""A monitor that is interrupted, fed after its end, or given nothing: hooks are gone, and what was read stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import eigentrack.cli
import rmtkd.cli
from eigentrack import EigenTrack, Step
from tests.helpers import same_bits
from tests.integration.test_monitor import generate, hooks_of, prompt


def test_ctrl_c_while_generating_leaves_a_model_without_hooks_and_what_was_seen(llama: Any) -> None:
    alone = generate(llama, prompt(), 12, do_sample=False)

    def interrupt(step: Step) -> None:
        if step.index == 4:
            raise KeyboardInterrupt

    track = EigenTrack(llama, window=8, on_token=interrupt)
    with pytest.raises(KeyboardInterrupt), track:
        generate(llama, prompt(), 12, do_sample=False)
    assert hooks_of(llama) == 0
    assert track.descriptors.shape[1] == 5 and track.descriptors.isfinite().all()
    with EigenTrack(llama, window=8) as again:
        assert torch.equal(generate(llama, prompt(), 12, do_sample=False), alone)
    assert same_bits(again.descriptors[:, :5], track.descriptors)


def test_ctrl_c_in_the_model_itself(llama: Any) -> None:
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    handle = llama.model.layers[-1].register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), EigenTrack(llama, window=8) as track:
            generate(llama, prompt(), 12)
    finally:
        handle.remove()
    assert hooks_of(llama) == 0 and track.descriptors.shape[1] == 1, "the token whose pass was whole"


def test_tokens_after_the_end_are_not_watched(llama: Any) -> None:
    with EigenTrack(llama, window=8) as track:
        generate(llama, prompt(), 6)
    before = {name: getattr(track, name).clone() for name in ("descriptors", "eigenvalues", "tokens", "watched")}
    generate(llama, prompt(), 9)
    with torch.no_grad():
        llama(prompt())
    assert all(same_bits(getattr(track, name), value) for name, value in before.items())


def test_an_empty_batch_is_the_model_s_own_error_and_no_request(llama: Any) -> None:
    with EigenTrack(llama, window=8, start="prompt") as track, torch.no_grad():
        with pytest.raises(RuntimeError, match="0 elements"):
            llama(torch.zeros(0, 4, dtype=torch.int64))
        llama(prompt())
    with EigenTrack(llama, window=8, start="prompt") as fresh, torch.no_grad():
        llama(prompt())
    assert same_bits(track.descriptors, fresh.descriptors) and hooks_of(llama) == 0


@pytest.mark.parametrize(
    ("program", "work", "arguments", "said"),
    [
        (eigentrack.cli, "eigentrack.cli._watch", ["watch", "--demo", "--prompt", "x"], "eigentrack: stopped\n"),
        (rmtkd.cli, "rmtkd.commands.plan", ["plan", "--model", "m", "--data", "d"], "rmtkd: stopped; "),
    ],
    ids=["eigentrack", "rmtkd"],
)
def test_ctrl_c_in_a_command_is_one_line_and_status_130(
    program: Any, work: str, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupt)
    assert program.main(arguments) == 130
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif("RMTKERNELS_PROVE" not in os.environ, reason="RMTKERNELS_PROVE=1 runs it")
def test_a_real_ctrl_c_ends_the_command_while_it_generates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eigentrack", "watch", "--demo", "--prompt", "Count to a thousand."]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "1500", "--threads", "1", "--picture", str(tmp_path / "p.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a shell's background job ignores it
    )
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.strip().startswith(b"3 "):  # some tokens are out
            break
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and error.rstrip().splitlines()[-1] == "eigentrack: stopped"
    assert time.monotonic() - begun < 60 and "Traceback" not in error and not list(tmp_path.iterdir())
