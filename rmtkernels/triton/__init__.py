"""Triton kernels. Triton itself is imported when the first of them runs.

CUDA C++ and Triton cannot share a dispatch key: the Triton form of an operator is an operator of its own, declared in
operators.py. A kernel and its launcher are in the file of its slice. Tested with Triton 3.6 to 3.9.
"""

import importlib.util
import os

import torch

# Operator -> its Triton form in torch.ops.rmtkernels.
FORMS = {
    "lowrank_linear": "lowrank_linear_triton",
    "spectrum_eigvalsh": "spectrum_eigvalsh_triton",
    "spectrum_descriptors_": "spectrum_descriptors_triton_",
    "window_push_": "window_push_triton_",
    "window_gram": "window_gram_triton",
    "covariance_update_": "covariance_update_triton_",
    "lanczos_orthonormalize": "lanczos_orthonormalize_triton",
}
# Block Lanczos with the block step above: its products are the vendor's library's on a GPU.
PRODUCTS = ("lanczos_multiply", "lanczos_multiply_gram")
MAX_MATRIX = 64  # of the spectrum's kernels: a larger one does not fit the registers
# Triton's own variable. With it the kernels take tensors of the CPU too, a NumPy call for each operation: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def status(operator: str) -> str:
    """ "available", or why there is no kernel or it cannot run here."""
    if operator not in (*FORMS, *PRODUCTS):
        return "no triton kernel yet"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "Triton is there, but this torch sees no GPU"
    return "available"
