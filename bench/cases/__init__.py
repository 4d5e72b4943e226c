"""One file per slice, and one for the monitor end to end; importing this package registers them all."""

from bench.cases import eigentrack, lanczos, sliding_window, spectrum

__all__ = ["eigentrack", "lanczos", "sliding_window", "spectrum"]
