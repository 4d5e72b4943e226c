"""The public operators: contract, checks, fake kernels."""

from rmtkernels.ops.covariance import covariance_update_
from rmtkernels.ops.lowrank_linear import lowrank_linear
from rmtkernels.ops.sliding_window import window_gram, window_push_
from rmtkernels.ops.spectrum import DESCRIPTORS, spectrum_descriptors, spectrum_descriptors_, spectrum_eigvalsh

__all__ = [
    "DESCRIPTORS",
    "covariance_update_",
    "lowrank_linear",
    "spectrum_descriptors",
    "spectrum_descriptors_",
    "spectrum_eigvalsh",
    "window_gram",
    "window_push_",
]
