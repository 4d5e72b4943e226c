"""What monitors see, as metrics for Prometheus or OpenTelemetry."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from torch import Tensor

from eigentrack.options import FEW, descriptor_columns
from eigentrack.step import Step
from rmtkernels import DESCRIPTORS

OTHER = "other"
_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class Export(ABC):
    """One of these serves all monitors of a process: `EigenTrack(model, on_token=export.monitor("chat"))`.

    The name is a label. It belongs to a kind of request, and never to a single one: time series are never forgotten by
    what collects them. Names beyond `most_monitors` are counted together as "other". Reading a step waits for its
    device.

    Args:
        descriptors: which of `rmtkernels.DESCRIPTORS`.
        most_monitors: how many names there may be.

    Raises:
        EigenTrackError: on an unknown descriptor.
    """

    def __init__(self, descriptors: Sequence[str] = FEW, most_monitors: int = 32) -> None:
        self._columns = descriptor_columns(descriptors)
        self._most, self._names, self._lock = most_monitors, set[str](), Lock()

    def monitor(self, name: str) -> Callable[[Step], None]:
        """The `on_token` of a monitor; ask for one per request, by the name of its kind."""
        with self._lock:
            if name not in self._names and len(self._names) >= self._most:
                name = OTHER
            self._names.add(name)

        def tell(step: Step) -> None:
            watched = step.watched
            risks: list[float] = [] if step.risk is None else step.risk[watched].tolist()
            spectra: Tensor = step.descriptors[watched].unflatten(1, (-1, len(DESCRIPTORS)))
            if len(spectra):
                means = spectra.mean((0, 1)).tolist()
                self._record(name, len(spectra), risks, {key: means[place] for key, place in self._columns.items()})

        return tell

    @abstractmethod
    def _record(self, monitor: str, tokens: int, risks: list[float], descriptors: dict[str, float]) -> None:
        """One step: of how many sequences, their risks, and the means of descriptors over sequences and layers."""


class PrometheusExport(Export):
    """`eigentrack_tokens_total`, `eigentrack_risk` (a histogram over tokens) and `eigentrack_descriptor` (a gauge: the
    newest token's mean over layers). Needs prometheus_client.

    Args:
        registry: to register in; None for prometheus_client's own.
        options: as of Export.
    """

    def __init__(self, registry: Any = None, **options: Any) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        super().__init__(**options)
        where: dict[str, Any] = {"registry": REGISTRY if registry is None else registry}
        self._tokens = Counter("eigentrack_tokens", "Generated tokens watched", ["monitor"], **where)
        self._risk = Histogram(
            "eigentrack_risk", "Risk behind each watched token", ["monitor"], buckets=(*_BUCKETS, 1.0), **where
        )
        what = "Spectral descriptor of the newest token, mean over layers and sequences"
        self._descriptor = Gauge("eigentrack_descriptor", what, ["monitor", "descriptor"], **where)

    def _record(self, monitor: str, tokens: int, risks: list[float], descriptors: dict[str, float]) -> None:
        self._tokens.labels(monitor).inc(tokens)
        for risk in risks:
            self._risk.labels(monitor).observe(risk)
        for name, value in descriptors.items():
            self._descriptor.labels(monitor, name).set(value)


class OpenTelemetryExport(Export):
    """`eigentrack.tokens`, `eigentrack.risk` and `eigentrack.descriptor`, as of PrometheusExport, through the process's
    provider of meters. Needs opentelemetry-api.

    Args:
        provider: of meters; None for the process's own.
        options: as of Export.
    """

    def __init__(self, provider: Any = None, **options: Any) -> None:
        from opentelemetry import metrics

        super().__init__(**options)
        meter = metrics.get_meter("eigentrack", meter_provider=provider)
        self._tokens = meter.create_counter("eigentrack.tokens", "{token}", "Generated tokens watched")
        self._risk = meter.create_histogram(
            "eigentrack.risk", "1", "Risk behind each watched token", explicit_bucket_boundaries_advisory=_BUCKETS
        )
        what = "Spectral descriptor of the newest token, mean over layers and sequences"
        self._descriptor = meter.create_gauge("eigentrack.descriptor", "1", what)

    def _record(self, monitor: str, tokens: int, risks: list[float], descriptors: dict[str, float]) -> None:
        self._tokens.add(tokens, {"monitor": monitor})
        for risk in risks:
            self._risk.record(risk, {"monitor": monitor})
        for name, value in descriptors.items():
            self._descriptor.set(value, {"monitor": monitor, "descriptor": name})
