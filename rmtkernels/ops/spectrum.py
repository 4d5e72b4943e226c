"""spectrum: eigenvalues of many small symmetric matrices, and the descriptors made of them."""

import torch
from torch import Tensor

from rmtkernels._library import define
from rmtkernels.dispatch import choice, fall_back, select
from rmtkernels.errors import DeviceError, DtypeError, ShapeError
from rmtkernels.ops.law_table import law_table, law_table_size
from rmtkernels.ops.sliding_window import MAX_WINDOW
from rmtkernels.reference import spectrum as reference
from rmtkernels.triton import MAX_MATRIX
from rmtkernels.triton import operators as triton

# The order of csrc/include/rmtkernels/spectrum.h; formulas in docs/conventions.md.
DESCRIPTORS = (
    *(f"share_{i}" for i in range(1, 6)),
    "share_top5",
    *(f"ratio_{i}" for i in range(1, 5)),
    "log_trace",
    "mean_share",
    "entropy",
    "participation",
    "variance",
    "skewness",
    "log_median",
    "early_enrichment",
    "mp_kl",
    "mp_wasserstein",
    "tracy_widom",
    "tracy_widom_log_survival",
    "overlap",
    "above_edge",
)
_tables: dict[tuple[int, int, torch.device], Tensor] = {}
_JOINT = {None: 0, "none": 1, "trace": 2}
_NOISE = {"median": 0, "trace": 1}
_NORMALIZE = {None: False, "rms": True}

define("spectrum_eigvalsh(Tensor matrices) -> Tensor")
define(
    "spectrum_descriptors_(Tensor(a!) descriptors, Tensor(b!) eigenvalues, Tensor gram, Tensor seen, "
    "Tensor laws, int dim, bool center, int joint, bool normalize, int noise) -> ()"
)
define("spectrum_laws(Tensor like, int window, int dim) -> Tensor")
_DESCRIPTORS_OP = torch.ops.rmtkernels.spectrum_descriptors_.default  # looked up once: this runs at every token


@torch.library.register_fake("rmtkernels::spectrum_eigvalsh")
def _spectrum_eigvalsh_fake(matrices: Tensor) -> Tensor:
    return matrices.new_empty(matrices.shape[:-1])


@torch.library.register_fake("rmtkernels::spectrum_descriptors_")
def _spectrum_descriptors_fake(
    descriptors: Tensor,
    eigenvalues: Tensor,
    gram: Tensor,
    seen: Tensor,
    laws: Tensor,
    dim: int,
    center: bool,
    joint: int,
    normalize: bool,
    noise: int,
) -> None:
    for tensor in (descriptors, eigenvalues, seen, laws):  # one without data brings the whole call here
        if tensor.device != gram.device:
            raise DeviceError(f"all tensors must be on the Gram matrices' device {gram.device}, got {tensor.device}")


@torch.library.register_fake("rmtkernels::spectrum_laws")
def _spectrum_laws_fake(like: Tensor, window: int, dim: int) -> Tensor:
    return like.new_empty(law_table_size(window), dtype=torch.float64)


def spectrum_eigvalsh(matrices: Tensor, *, backend: str | None = None) -> Tensor:
    """All eigenvalues of many small symmetric matrices, as `torch.linalg.eigvalsh`.

    Computed in float64 whatever the input: the error is a few float64 roundings of the largest eigenvalue. Where the
    diagonal spans orders of magnitude, as with massive activations, small eigenvalues keep their own digits too.

    Args:
        matrices: (..., N, N) float32 or float64, N <= 128. Only the lower triangle is read.
        backend: "cpu", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        (..., N) of the input's dtype, ascending. NaN for a matrix with an entry that is not finite. No gradient.

    Raises:
        ShapeError, DtypeError: on bad arguments.
        BackendError: if `backend` is missing, or is "triton" and N > 64.
    """
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ShapeError(f"matrices must be (..., N, N), got {tuple(matrices.shape)}")
    if not 1 <= matrices.shape[-1] <= MAX_WINDOW:
        raise ShapeError(f"N must be 1 to {MAX_WINDOW}, got {matrices.shape[-1]}; use torch.linalg.eigvalsh beyond")
    if matrices.dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"matrices must be float32 or float64, got {matrices.dtype}")
    selected = select("spectrum_eigvalsh", matrices.device, backend)
    if selected == "triton" and matrices.shape[-1] > MAX_MATRIX and choice(backend) is None:
        selected = fall_back("spectrum_eigvalsh", f"the triton kernel takes N up to {MAX_MATRIX}")
    if selected == "triton":
        return triton.spectrum_eigvalsh(matrices.detach())  # type: ignore[no-any-return]
    if selected == "reference":
        return reference.spectrum_eigvalsh_ref(matrices.detach()).to(matrices.dtype)
    return torch.ops.rmtkernels.spectrum_eigvalsh(matrices.detach())  # type: ignore[no-any-return]


def spectrum_descriptors(
    gram: Tensor,
    seen: Tensor,
    dim: int,
    *,
    center: bool = True,
    joint: str | None = None,
    normalize: str | None = None,
    noise: str = "median",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Eigenvalues and spectral descriptors of the windows behind Gram matrices, in one call.

    The eigenvalues are those of G / D, largest first. A centred window has rows - 1 of them. Absent ones are 0.

    Args:
        gram: (L, B, N, N) float32: Gram matrices of L layers and B sequences, N <= 128, as `window_push_` leaves them.
        seen: (B,) int64: rows pushed so far; the first min(seen, N) slots are in use, (seen - 1) mod N is the newest.
        dim: width D of a row of one layer.
        center: subtract the mean row of the window first (on the Gram matrix, in float64; its entries are float32, so
            of a mean a thousand times the deviations a per cent is lost, and of one three thousand times all).
        joint: None for one spectrum per layer; "trace" or "none" for one spectrum per sequence from the sum of its
            layers' Gram matrices, each divided by its own trace or as it is (the concatenated activations, width L D).
        normalize: "rms" divides every row of activations by its root mean square first (on the Gram matrix, before
            centring), None leaves them as they are.
        noise: noise variance: "median", the median eigenvalue over the law's median, or "trace", the mean eigenvalue.
        backend: "cpu", "cuda", "triton" or "reference" instead of the automatic choice.

    Returns:
        descriptors (L, B, F), named by `DESCRIPTORS`, and eigenvalues (L, B, N), float32; L is 1 if joint.

    Raises:
        ShapeError, DtypeError, DeviceError: on bad arguments.
        BackendError: if `backend` is missing, or is "triton" and N > 64.

    Source: EigenTrack (arXiv 2509.15735) section III-B; scales, floors and dual form are ours (docs/conventions.md).
    """
    _check_gram(gram)
    layers, batch, window = gram.shape[:3]
    spectra = layers if joint is None else 1
    descriptors = gram.new_empty(spectra, batch, len(DESCRIPTORS))
    eigenvalues = gram.new_empty(spectra, batch, window)
    spectrum_descriptors_(
        descriptors,
        eigenvalues,
        gram.contiguous(),
        seen,
        dim,
        center=center,
        joint=joint,
        normalize=normalize,
        noise=noise,
        backend=backend,
    )
    return descriptors, eigenvalues


def spectrum_descriptors_(
    descriptors: Tensor,
    eigenvalues: Tensor,
    gram: Tensor,
    seen: Tensor,
    dim: int,
    *,
    center: bool = True,
    joint: str | None = None,
    normalize: str | None = None,
    noise: str = "median",
    backend: str | None = None,
) -> None:
    """`spectrum_descriptors` into the caller's buffers (float32, unit last stride).

    Allocates nothing, but for the Triton form's scratch. `gram` must be contiguous.
    """
    selected = select("spectrum_descriptors_", gram.device, backend)
    if selected == "triton" and gram.shape[-1] > MAX_MATRIX and choice(backend) is None:
        selected = fall_back("spectrum_descriptors_", f"the triton kernel takes N up to {MAX_MATRIX}")
    if selected == "reference":
        _check_arguments(descriptors, eigenvalues, gram, seen, dim, joint, normalize, noise)
        values = reference.spectrum_descriptors_ref(
            gram.detach().cpu(), seen.cpu(), dim, center=center, joint=joint, normalize=normalize, noise=noise
        )
        descriptors.copy_(values[0])
        eigenvalues.copy_(values[1])
        return
    try:
        laws = _laws(gram.shape[-1], dim if joint is None else dim * gram.shape[0], gram)
        (triton.spectrum_descriptors_ if selected == "triton" else _DESCRIPTORS_OP)(
            descriptors, eigenvalues, gram, seen, laws, dim, center, _JOINT[joint], _NORMALIZE[normalize], _NOISE[noise]
        )
    except (RuntimeError, KeyError, ValueError, ZeroDivisionError):
        # All was checked before anything was written; here the refusal gets its type.
        _check_arguments(descriptors, eigenvalues, gram, seen, dim, joint, normalize, noise)
        raise


def _laws(window: int, dim: int, like: Tensor) -> Tensor:
    """The table of laws of `law_table` for windows of rows of width `dim`, as a float64 tensor beside `like`."""
    # A kept table cannot be traced, nor may one made while something traces be kept.
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return torch.ops.rmtkernels.spectrum_laws(like, window, dim)  # type: ignore[no-any-return]
    key = (window, dim, like.device)
    table = _tables.get(key)
    if table is None:
        with torch.inference_mode(False):
            table = torch.tensor(law_table(window, dim), dtype=torch.float64, device=like.device)
        if not _intercepted():
            _tables[key] = table
    return table


def _intercepted() -> bool:
    """Whether a dispatch mode or a functorch transform sees every new tensor."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


@torch.library.impl("rmtkernels::spectrum_laws", "CompositeExplicitAutograd")
def _spectrum_laws(like: Tensor, window: int, dim: int) -> Tensor:
    return _laws(window, dim, like).clone()  # on the device: a table brought there anew would make the host wait


def _check_arguments(
    descriptors: Tensor,
    eigenvalues: Tensor,
    gram: Tensor,
    seen: Tensor,
    dim: int,
    joint: str | None,
    normalize: str | None,
    noise: str,
) -> None:
    if joint not in _JOINT:
        raise ShapeError(f'joint must be None, "trace" or "none", got {joint!r}')
    if normalize not in _NORMALIZE:
        raise ShapeError(f'normalize must be None or "rms", got {normalize!r}')
    if noise not in _NOISE:
        raise ShapeError(f'noise must be "median" or "trace", got {noise!r}')
    check_buffers(descriptors, eigenvalues, gram, seen, dim, joint is not None)


def check_buffers(descriptors: Tensor, eigenvalues: Tensor, gram: Tensor, seen: Tensor, dim: int, joined: bool) -> None:
    """Raises ShapeError, DtypeError or DeviceError unless `spectrum_descriptors_` takes these."""
    _check_gram(gram)
    layers, batch, window = gram.shape[:3]
    if joined and layers == 0:
        raise ShapeError("a joint spectrum needs at least one layer")
    if dim < 1:
        raise ShapeError(f"dim must be positive, got {dim}")
    if seen.shape != (batch,):
        raise ShapeError(f"seen must be ({batch},), got {tuple(seen.shape)}")
    if seen.dtype != torch.int64:
        raise DtypeError(f"seen must be int64, got {seen.dtype}")
    if seen.device != gram.device:
        raise DeviceError(f"seen must be on the Gram matrices' device {gram.device}, got {seen.device}")
    spectra = 1 if joined else layers
    _check_out("descriptors", descriptors, (spectra, batch, len(DESCRIPTORS)), gram.device)
    _check_out("eigenvalues", eigenvalues, (spectra, batch, window), gram.device)


def _check_gram(gram: Tensor) -> None:
    if gram.dim() != 4 or gram.shape[-1] != gram.shape[-2]:
        raise ShapeError(f"gram must be (L, B, N, N), got {tuple(gram.shape)}")
    if not 1 <= gram.shape[-1] <= MAX_WINDOW:
        raise ShapeError(f"N must be 1 to {MAX_WINDOW}, got {gram.shape[-1]}")
    if gram.dtype != torch.float32:
        raise DtypeError(f"gram must be float32, got {gram.dtype}")


def _check_out(name: str, out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if out.shape != shape or out.stride(-1) != 1:
        raise ShapeError(
            f"{name} must be {shape} with unit last stride, got {tuple(out.shape)}, strides {out.stride()}"
        )
    if out.dtype != torch.float32:
        raise DtypeError(f"{name} must be float32, got {out.dtype}")
    if out.device != device:
        raise DeviceError(f"{name} must be on {device}, got {out.device}")
