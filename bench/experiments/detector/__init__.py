"""The detector's experiments.

`sets` says what is read, `extract` runs the model once and caches, everything else reads the cache.
"""
