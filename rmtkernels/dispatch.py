"""Which backend runs, and why.

The order for a tensor is its device's compiled kernel, on a GPU then the Triton kernel, then the float64 reference. A
choice made by hand never falls back: `backend=` of a call beats `use_backend`, which beats the variable
RMTKERNELS_BACKEND. If there is no kernel and nothing was chosen, the reference runs and says so once. torch.compile
makes the choice while tracing.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rmtkernels import _native, triton
from rmtkernels.errors import BackendError

OPERATORS = (
    "window_push_",
    "window_gram",
    "spectrum_eigvalsh",
    "spectrum_descriptors_",
    "covariance_update_",
    "lowrank_linear",
    "lanczos_multiply",
    "lanczos_multiply_gram",
)
BACKENDS = ("cpu", "cuda", "triton", "reference")

_LIBRARY_OF = {"cpu": "_C", "cuda": "_C_cuda"}
# One-element lists, the newest choice last; the first is the environment's.
_forced: list[list[str | None]] = [[os.environ.get("RMTKERNELS_BACKEND") or None]]
_warned: set[str] = set()
_available: dict[tuple[str, str], str] = {}


def cpu_isa() -> str:
    """Instruction set the CPU kernels use: "avx2" or "baseline"; "none" if they are not built."""
    return _native.cpu_isa()


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that were built and that this processor has, best first."""
    return _native.cpu_isas()


def set_cpu_isa(name: str) -> None:
    """Use "avx2", "baseline" or the best one ("auto") from now on, in every thread.

    Raises:
        BackendError: if it was not built or this processor lacks it.
    """
    if not _native.set_cpu_isa(name):
        raise BackendError(
            f"instruction set {name!r} is not available here; there is: {', '.join(cpu_isas()) or 'none'}"
        )
    _available.clear()


def backends(operator: str) -> dict[str, str]:
    """Backend name -> "available", or why it is not."""
    return {backend: _status(operator, backend) for backend in BACKENDS}


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block every operator uses `backend` ("cpu", "cuda", "triton" or "reference"), in every thread.

    Raises:
        BackendError: if there is no such backend.
    """
    choice: list[str | None] = [_checked(backend)]  # an object of its own: blocks of two threads need not end in order
    _forced.append(choice)
    try:
        yield
    finally:
        _forced[:] = [other for other in _forced if other is not choice]


def choice(backend: str | None = None) -> str | None:
    """The backend chosen by hand, by this argument, a block or the environment; None if nobody chose."""
    return backend if backend is not None else _forced[-1][0]


def cpu_is_automatic(operator: str) -> bool:
    """Whether tensors on the CPU get the compiled kernel without anybody's choice: `select` at a third of its cost."""
    return _forced[-1][0] is None and _status(operator, "cpu") == "available"


def has_kernel(operator: str, backend: str) -> bool:
    """Whether the backend has a kernel, and it can run here."""
    return _status(operator, backend) == "available"


def select(operator: str, device: torch.device, backend: str | None = None) -> str:
    """The backend that `operator` uses for tensors on `device`.

    Raises:
        BackendError: if the backend asked for is missing, or does not run on `device`.
    """
    chosen = choice(backend)
    if chosen is None:
        return _automatic(operator, device.type)
    if _checked(chosen) == "reference":
        return chosen
    if device.type not in (triton.DEVICE_TYPES if chosen == "triton" else (chosen,)):
        raise BackendError(f"{operator}: backend {chosen!r} was asked for, but the tensors are on {device.type!r}")
    if _status(operator, chosen) != "available":
        raise BackendError(f"{operator}: backend {chosen!r} was asked for: {_status(operator, chosen)}")
    return chosen


def _automatic(operator: str, device_type: str) -> str:
    if device_type == "meta" or _status(operator, device_type) == "available":
        return device_type
    if device_type == "cuda" and _status(operator, "triton") == "available":
        return "triton"
    if device_type == "cpu" and _native.isa_error:
        raise BackendError(_native.isa_error)
    return fall_back(operator, f"{device_type}: {_status(operator, device_type)} (`python -m rmtkernels` says more)", 5)


def fall_back(operator: str, why: str, stacklevel: int = 3) -> str:
    """Says once that the reference runs though nobody chose it; `stacklevel` frames up is the user's call."""
    if operator not in _warned:
        _warned.add(operator)
        warnings.warn(
            f"rmtkernels: {operator} runs on its slow float64 reference: {why}", RuntimeWarning, stacklevel=stacklevel
        )
    return "reference"


def _checked(backend: str) -> str:
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; there is: {', '.join(BACKENDS)}")
    return backend


def _status(operator: str, backend: str) -> str:
    try:
        return _available[operator, backend]
    except KeyError:
        status = _available[operator, backend] = _find_status(operator, backend)
        return status


# A hook may be traced before any operator has run. This is all that torch.compiler.assume_constant_result does, but
# that imports the compiler, which takes more than a second.
_status._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_status(operator: str, backend: str) -> str:
    if backend == "reference":
        return "available"
    if backend == "triton":
        return triton.status(operator)
    library = _LIBRARY_OF.get(backend)
    if library is None:
        return f"rmtkernels has no kernels for {backend!r}"
    if backend == "cpu" and _native.isa_error:
        return _native.isa_error
    if _native.STATUS[library] != "loaded":
        return f"rmtkernels.{library} {_native.STATUS[library]}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"rmtkernels::{operator}", backend.upper()):
        return f"no {backend} kernel yet"
    if backend == "cuda" and not torch.cuda.is_available():
        return "built, but this torch sees no CUDA device"
    return "available"
