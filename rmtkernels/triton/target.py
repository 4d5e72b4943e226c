"""What the launchers must know of the GPU they compile for."""

from triton.runtime import driver

from rmtkernels.triton import INTERPRETED

# Bytes of shared memory that a program may have, by architecture (CUDA C++ Programming Guide, compute capabilities).
_CUDA = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024}
_LEAST = 99 * 1024  # of the others from 8.6 on
_HIP = 64 * 1024


def is_hopper() -> bool:
    """Whether the current device multiplies with whole groups of warps, from shared memory."""
    return not INTERPRETED and driver.active.get_current_target().arch == 90


def shared_memory() -> int:
    """Bytes of shared memory that a program may have on the current device."""
    if INTERPRETED:
        return _LEAST
    target = driver.active.get_current_target()
    return _HIP if target.backend == "hip" else _CUDA.get(target.arch, _LEAST)
