"""The public operators: contract, checks, fake kernels."""

from rmtkernels.ops.covariance import covariance_update_
from rmtkernels.ops.lanczos import LanczosResult, lanczos_above, lanczos_eigh
from rmtkernels.ops.lanczos_density import SpikeCount, lanczos_density, spike_count
from rmtkernels.ops.lanczos_multiply import lanczos_multiply, lanczos_multiply_gram
from rmtkernels.ops.lowrank_linear import lowrank_linear
from rmtkernels.ops.sliding_window import window_gram, window_push_
from rmtkernels.ops.spectrum import DESCRIPTORS, spectrum_descriptors, spectrum_descriptors_, spectrum_eigvalsh

__all__ = [
    "DESCRIPTORS",
    "LanczosResult",
    "SpikeCount",
    "covariance_update_",
    "lanczos_above",
    "lanczos_density",
    "lanczos_eigh",
    "lanczos_multiply",
    "lanczos_multiply_gram",
    "lowrank_linear",
    "spectrum_descriptors",
    "spectrum_descriptors_",
    "spectrum_eigvalsh",
    "spike_count",
    "window_gram",
    "window_push_",
]
