"""Metrics for Prometheus and OpenTelemetry: what they count, under concurrent requests too."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from eigentrack import EigenTrack, EigenTrackError, Step
from eigentrack.export import Export, OpenTelemetryExport, PrometheusExport
from rmtkernels import DESCRIPTORS
from tests.integration.conftest import tiny_llama

ENTROPY = DESCRIPTORS.index("entropy")


def step(risks: list[float] | None = None, watched: tuple[bool, ...] = (True, True)) -> Step:
    """Two sequences, two layers; of a sequence that takes no part everything is NaN, as the monitor has it."""
    descriptors = torch.arange(2 * 2 * len(DESCRIPTORS), dtype=torch.float32).view(2, -1)
    mask = torch.tensor(watched)
    risk = None if risks is None else torch.tensor(risks).masked_fill(~mask, torch.nan)
    tokens = torch.tensor([5, 6])
    return Step(0, tokens, descriptors.masked_fill(~mask[:, None], torch.nan), mask, torch.ones(2), None, risk)


def prometheus(**options: Any) -> tuple[Export, Any]:
    client = pytest.importorskip("prometheus_client", reason="needs prometheus_client")
    registry = client.CollectorRegistry()

    def read(name: str, **labels: str) -> float | None:
        kind = {"tokens": "tokens_total", "risk": "risk_sum", "risks": "risk_count"}.get(name, name)
        found: float | None = registry.get_sample_value(f"eigentrack_{kind}", labels)
        return found

    return PrometheusExport(registry, **options), read


def opentelemetry(**options: Any) -> tuple[Export, Any]:
    sdk = pytest.importorskip("opentelemetry.sdk.metrics", reason="needs opentelemetry-sdk")
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()

    def read(name: str, **labels: str) -> float | None:
        metrics = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
        for metric in metrics:
            for point in metric.data.data_points:
                wanted = "eigentrack.risk" if name == "risks" else f"eigentrack.{name}"
                if metric.name == wanted and dict(point.attributes) == labels:
                    return float(getattr(point, {"risk": "sum", "risks": "count"}.get(name, "value")))
        return None

    return OpenTelemetryExport(sdk.MeterProvider([reader]), **options), read


BOTH = pytest.mark.parametrize("make", [prometheus, opentelemetry])


@BOTH
def test_a_step_is_what_was_watched_of_it(make: Any) -> None:
    export, read = make(descriptors=["entropy"])
    tell = export.monitor("chat")
    tell(step([0.25, 0.5]))
    tell(step([0.125, 0.7], watched=(True, False)))
    tell(step([0.9, 0.9], watched=(False, False)))
    assert read("tokens", monitor="chat") == 3
    assert (read("risk", monitor="chat"), read("risks", monitor="chat")) == (0.875, 3)
    # Of the second step, since nobody took part in the third: one sequence, the mean of its two layers.
    assert read("descriptor", monitor="chat", descriptor="entropy") == ENTROPY + len(DESCRIPTORS) / 2
    assert read("descriptor", monitor="chat", descriptor="share_1") is None
    export.monitor("plain")(step())
    assert read("tokens", monitor="plain") == 2 and not read("risks", monitor="plain")


@BOTH
def test_labels_are_bounded(make: Any) -> None:
    export, read = make(most_monitors=2)
    for name in ("a", "b", "request-1", "request-2", "a"):
        export.monitor(name)(step())
    assert [read("tokens", monitor=name) for name in ("a", "b", "other")] == [4, 2, 4]
    assert read("tokens", monitor="request-1") is None


@BOTH
def test_concurrent_requests_with_a_monitor_each(make: Any) -> None:
    export, read = make()
    models = [tiny_llama(depth=2) for _ in range(4)]
    shared = copy.deepcopy(models[0])
    torch.manual_seed(0)

    def serve(number: int) -> tuple[int, float]:
        model = shared if number % 2 else models[number % 4]
        ids = torch.tensor([[5 + number, 9, 17]])
        with EigenTrack(model, on_token=export.monitor("chat" if number % 2 else "code")) as track:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
            )
        return track.steps, float(track.descriptors[0, -1, ENTROPY])

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(serve, range(8)))
    assert [steps for steps, _ in done] == [5] * 8
    assert (read("tokens", monitor="chat"), read("tokens", monitor="code")) == (20, 20)
    last = read("descriptor", monitor="chat", descriptor="entropy")
    assert last is not None and last > 0


def test_unknown_descriptors() -> None:
    for names in ("entropy", ["entropie"]):
        with pytest.raises(EigenTrackError, match="descriptors must list"):
            prometheus(descriptors=names)
