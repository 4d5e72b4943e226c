"""One step of the detector, batch 1, on the 240 descriptors of ten layers: fused against its modules one by one."""

import numpy as np
import torch

from bench.case import Case, case
from bench.timer import interleave
from eigentrack import Detector
from eigentrack.network import Network

LAYERS, PER_LAYER = 10, 24
TARGET = 50e-6  # seconds


def fitted(cell: str) -> tuple[Detector, torch.Tensor]:
    """A detector that has learnt something, and 64 steps."""
    random = torch.Generator().manual_seed(0)
    names = [f"layer{i // PER_LAYER}.d{i % PER_LAYER}" for i in range(LAYERS * PER_LAYER)]
    sequences = [torch.randn(16, len(names), generator=random) + 0.1 * (i % 2) for i in range(60)]
    labels = [i % 2 for i in range(60)]
    detector = Detector(names, cell=cell)
    detector.fit(sequences, labels, items=range(60), epochs=3, progress=False)
    detector.calibrate(sequences, labels)
    return detector, torch.randn(64, len(names), generator=random)


def step(cell: str) -> Case:
    detector, rows = fitted(cell)
    _, state = detector.step(rows[:1])
    inside = detector.stepper(torch.device("cpu"))
    nobody = torch.zeros(1, 1, dtype=torch.bool)
    network, standardise = detector._fitted()
    hidden = torch.zeros(1, 1, detector.hidden)
    before = (hidden, hidden) if cell == "lstm" else hidden

    def ours() -> object:
        return inside(rows[:1], state, nobody)

    def plain() -> object:
        with torch.no_grad():
            states, after = network.recurrent(network.projection(standardise(rows[None, :1])), before)
            return detector.calibration(network.head(states)), after

    def verify() -> None:
        oracle = Network(len(rows[0]), cell, detector.hidden, detector.projection).double()
        oracle.requires_grad_(False).load_state_dict(network.state_dict())
        wanted = detector.calibration(oracle(standardise(rows).double()[None])[0])
        memory = None
        for t in range(len(rows)):
            risk, memory = detector.step(rows[t : t + 1], memory)
            assert abs(float(risk) - float(wanted[t])) < 1e-5, f"step {t}: {float(risk)} for {float(wanted[t])}"

    def share_of_target() -> dict[str, float]:
        times = interleave({"in the monitor": ours, "detector.step": lambda: detector.step(rows[:1], state)}, rounds=40)
        return {f"{name}, share of 50 µs": float(np.median(values)) / TARGET for name, values in times.items()}

    return Case(
        ours=ours,
        peers={"the modules, unfused": plain},
        verify=verify,
        targets={"the modules, unfused": 1.0},
        bytes_read=4 * sum(parameter.numel() for parameter in network.parameters()),
        extra=share_of_target,
        limits={"in the monitor, share of 50 µs": 1.0, "detector.step, share of 50 µs": 1.0},
    )


@case("detector.step_gru")
def gru() -> Case:
    return step("gru")


@case("detector.step_lstm")
def lstm() -> Case:
    return step("lstm")


@case("detector.step_rnn")
def rnn() -> Case:
    return step("rnn")
