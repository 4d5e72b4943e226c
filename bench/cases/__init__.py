"""One file per slice, and one for the monitor end to end; importing this package registers them all."""

from bench.cases import covariance, eigentrack, lanczos, lowrank_linear, rmtkd, sliding_window, spectrum

__all__ = ["covariance", "eigentrack", "lanczos", "lowrank_linear", "rmtkd", "sliding_window", "spectrum"]
