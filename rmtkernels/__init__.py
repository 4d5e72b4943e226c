"""rmtkernels: streaming covariances and spectra of activations, fused.

Operators that take and return tensors and know nothing of models. `python -m rmtkernels` says what runs here.
"""

from importlib import metadata

from rmtkernels import _native
from rmtkernels.dispatch import cpu_isa, cpu_isas, set_cpu_isa, use_backend
from rmtkernels.errors import (
    BackendError,
    DeviceError,
    DtypeError,
    MatrixError,
    RangeError,
    RmtkernelsError,
    ShapeError,
    StateError,
)
from rmtkernels.ops import (
    DESCRIPTORS,
    LanczosResult,
    SpikeCount,
    covariance_update_,
    lanczos_above,
    lanczos_density,
    lanczos_eigh,
    lanczos_multiply,
    lanczos_multiply_gram,
    lowrank_linear,
    spectrum_descriptors,
    spectrum_descriptors_,
    spectrum_eigvalsh,
    spike_count,
    window_gram,
    window_push_,
)
from rmtkernels.states import SlidingWindow
from rmtkernels.streaming_covariance import StreamingCovariance

_native.load()

try:
    __version__ = metadata.version("rmtkernels")
except metadata.PackageNotFoundError:
    __version__ = "0+source"

if _native.STATUS["_C"] == "not built":
    import warnings

    warnings.warn(
        f"rmtkernels was imported from {__path__[0]}, where no kernels are compiled; only the slow float64 reference "
        "runs. In the source folder type `pip install -e .`; if it is installed already, start Python elsewhere.",
        RuntimeWarning,
        stacklevel=2,
    )

__all__ = [
    "DESCRIPTORS",
    "BackendError",
    "DeviceError",
    "DtypeError",
    "LanczosResult",
    "MatrixError",
    "RangeError",
    "RmtkernelsError",
    "ShapeError",
    "SlidingWindow",
    "SpikeCount",
    "StateError",
    "StreamingCovariance",
    "covariance_update_",
    "cpu_isa",
    "cpu_isas",
    "lanczos_above",
    "lanczos_density",
    "lanczos_eigh",
    "lanczos_multiply",
    "lanczos_multiply_gram",
    "lowrank_linear",
    "set_cpu_isa",
    "spectrum_descriptors",
    "spectrum_descriptors_",
    "spectrum_eigvalsh",
    "spike_count",
    "use_backend",
    "window_gram",
    "window_push_",
]
