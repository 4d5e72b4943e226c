"""Benchmarks: ours against well-kept peers, in turn, in one run, and never without checking the results first."""
