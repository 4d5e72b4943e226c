"""One file per slice, and one for the monitor end to end; importing this package registers them all."""

from bench.cases import covariance, detector, eigentrack, lanczos, lowrank_linear, rmtkd, sliding_window, spectrum

__all__ = ["covariance", "detector", "eigentrack", "lanczos", "lowrank_linear", "rmtkd", "sliding_window", "spectrum"]
