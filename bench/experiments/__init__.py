"""Experiments: what the tools say about real data. Each is a module that runs alone and writes to bench/results/."""
