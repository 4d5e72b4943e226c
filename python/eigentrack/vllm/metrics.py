"""Prometheus metrics, in the registry where vLLM keeps its own."""

from functools import cache
from types import SimpleNamespace

from eigentrack.vllm.report import Readings

_LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


@cache
def _metrics() -> SimpleNamespace:
    from prometheus_client import Counter, Gauge, Histogram

    return SimpleNamespace(
        slots=Gauge("eigentrack_slots", "Requests that can be watched at a time.", multiprocess_mode="mostrecent"),
        in_use=Gauge("eigentrack_slots_in_use", "Requests that hold a window.", multiprocess_mode="mostrecent"),
        tokens=Counter("eigentrack_tokens", "Tokens watched."),
        highest=Histogram("eigentrack_highest_risk", "Highest risk of each finished completion.", buckets=_LEVELS),
        stopped=Counter("eigentrack_stopped_requests", "Completions that the stop rule ended."),
        lost=Counter("eigentrack_lost_requests", "Completions that were not watched to their end."),
    )


def slots(count: int, in_use: int) -> None:
    _metrics().slots.set(count)
    _metrics().in_use.set(in_use)


def tokens(count: int) -> None:
    _metrics().tokens.inc(count)


def finished(readings: Readings) -> None:
    """A completion is over."""
    if readings.highest is not None:
        _metrics().highest.observe(readings.highest)
    _metrics().stopped.inc(readings.stopped)
    _metrics().lost.inc(readings.lost)
