"""Float64 oracles in plain PyTorch, no cleverness: what every kernel is compared with."""

from rmtkernels.reference.covariance import covariance_update_ref_
from rmtkernels.reference.lanczos import (
    lanczos_density_ref,
    lanczos_eigh_ref,
    lanczos_matrix_ref,
    lanczos_multiply_gram_ref,
    lanczos_multiply_ref,
    lanczos_orthonormalize_ref,
)
from rmtkernels.reference.lowrank_linear import lowrank_linear_ref
from rmtkernels.reference.sliding_window import window_gram_ref, window_push_ref_
from rmtkernels.reference.spectrum import spectrum_descriptors_ref, spectrum_eigvalsh_ref

__all__ = [
    "covariance_update_ref_",
    "lanczos_density_ref",
    "lanczos_eigh_ref",
    "lanczos_matrix_ref",
    "lanczos_multiply_gram_ref",
    "lanczos_multiply_ref",
    "lanczos_orthonormalize_ref",
    "lowrank_linear_ref",
    "spectrum_descriptors_ref",
    "spectrum_eigvalsh_ref",
    "window_gram_ref",
    "window_push_ref_",
]
