"""One file per slice, and for the systems end to end; importing this package registers them all."""

from bench.case import REGISTRY
from bench.cases import (
    covariance,
    detector,
    eigentrack,
    lanczos,
    lowrank_linear,
    methods,
    rmtkd,
    sliding_window,
    sliding_window_models,
    spectrum,
    state,
)

__all__ = [
    "REGISTRY",
    "covariance",
    "detector",
    "eigentrack",
    "lanczos",
    "lowrank_linear",
    "methods",
    "rmtkd",
    "sliding_window",
    "sliding_window_models",
    "spectrum",
    "state",
]
