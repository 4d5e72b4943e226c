"""state: what watching one sequence holds, and that it stays that much; and what importing costs."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

import rmtkernels
from bench.case import Case, case
from bench.cases.sliding_window import LAYERS, POOL, WIDTH, WINDOW, Ours, Stream, verify

TOKENS = 1_000_000
ALLOWED_GROWTH = 2**20  # bytes; the interpreter's own caches come and go
IMPORT_MS = 60
STATE, RESIDENT = "state over N D bytes + 4 N² bytes of all layers", "growth of resident memory over a megabyte"


def state_bytes(ours: Ours) -> int:
    """Ring, Gram matrices, counts and the buffers of the result."""
    state = ours.state
    tensors = (state.ring, state.gram, state.seen, ours.descriptors, ours.eigenvalues)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def growth(ours: Ours, tokens: int) -> int:
    """Resident bytes that `tokens` more steps leave behind, once as many as fill the window are through."""
    for _ in range(2 * POOL):
        ours()
    before = resident()
    for _ in range(tokens):
        ours()
    return resident() - before


@case("state.one_sequence")
def one_sequence() -> Case:
    """A million tokens: a step with its descriptors, and what the state is then. `EigenTrack` also keeps the
    descriptors of every token, because they are what is asked for: 24 float32 a spectrum and token."""
    ours = Ours("trace")
    least = LAYERS * (WINDOW * WIDTH + WINDOW**2) * 4

    def held() -> dict[str, float]:
        before = state_bytes(ours)
        grown = growth(ours, TOKENS)
        assert state_bytes(ours) == before, "the state has grown"
        return {STATE: before / least, RESIDENT: grown / ALLOWED_GROWTH}

    return Case(
        ours=ours,
        peers={"a push of the same rows alone": Pushed()},
        verify=lambda: verify("trace", {"ours": ours}),
        targets={},
        extra=held,
        limits={STATE: 1.01, RESIDENT: 1.0},
    )


class Pushed:
    """Without descriptors."""

    def __init__(self) -> None:
        self.stream, self.state = Stream(), rmtkernels.SlidingWindow(LAYERS, 1, WINDOW, WIDTH)

    @torch.no_grad()
    def __call__(self) -> None:
        self.state.update(self.stream.next())


def imported(module: str) -> Case:
    share = f"{IMPORT_MS} ms, share taken beyond torch's own import"
    program = (
        f"import torch, time; began = time.process_time(); import {module}; "
        "print(1e3 * (time.process_time() - began), 'transformers' in __import__('sys').modules)"
    )

    def beyond() -> dict[str, float]:
        took = sorted(float(_python(program).split()[0]) for _ in range(5))
        return {share: took[2] / IMPORT_MS}

    def right() -> None:
        assert _python(program).split()[1] == "False", f"{module} imports transformers"

    return Case(
        ours=lambda: _python(f"import torch, {module}"),
        peers={"torch alone": lambda: _python("import torch")},
        verify=right,
        targets={},
        extra=beyond,
        limits={share: 1.0},
        rounds=5,
    )


def _python(program: str) -> str:
    """With byte code, as an installed package has it, also where the environment says not to write any."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=kept).stdout


@case("state.import_rmtkernels")
def import_rmtkernels() -> Case:
    return imported("rmtkernels")


@case("state.import_eigentrack")
def import_eigentrack() -> Case:
    return imported("eigentrack")
