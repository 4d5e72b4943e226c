"""lanczos: top eigenpairs of a large symmetric matrix, or of X'X without forming it."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rmtkernels.errors import DeviceError, DtypeError, MatrixError, ShapeError
from rmtkernels.ops.lanczos_basis import Basis, Ritz, random_source
from rmtkernels.ops.lanczos_multiply import LinearMap, check_first_product, in_full_precision

BLOCK = 8  # the kernel's lanes: wider blocks need more products, narrower ones waste them
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
_PATIENCE = 3  # times that the recurrence may promise what the products do not keep


@dataclass(frozen=True)
class LanczosResult:
    """Eigenpairs, largest first, and what they are worth.

    Attributes:
        eigenvalues: (k,) of the matrix's dtype.
        eigenvectors: (d, k), columns of norm 1; the entry of largest magnitude is positive.
        residuals: (k,) float64, norms of A v - lambda v over the largest magnitude among the eigenvalues found.
        converged: (k,) bool, residuals that met the tolerance.
        complete: whether everything that was asked for is there and has converged.
        steps: products of the matrix with a block of vectors.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    converged: Tensor
    complete: bool
    steps: int


def lanczos_eigh(
    matrix: Tensor,
    k: int,
    *,
    gram: bool = False,
    center: bool = False,
    tol: float | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    max_steps: int = 1000,
    backend: str | None = None,
) -> LanczosResult:
    """The k largest eigenvalues and their eigenvectors, by block Lanczos with full reorthogonalisation.

    Args:
        matrix: A, (d, d) float32 or float64 and symmetric, or with `gram` the samples X, (n, d).
        k: how many, 1 to d.
        gram: eigenpairs of X'X (no division by n), which is never formed.
        center: subtract the mean of the samples first, in effect.
        tol: highest residual, at least 8 roundings of the dtype; default 1e-5 for float32 and 1e-10 for float64.
            Rounding may end the search above a tol near that limit; `converged` then says so.
        start: (d, vectors), where to begin, for instance the eigenvectors of a similar matrix; eight random vectors
            join it, for what it lacks. Default: these alone.
        seed: of all random vectors.
        max_steps: products of the matrix with a block after which to stop, converged or not.
        backend: "cpu", "cuda", "triton" (the block step; products by the vendor's library) or "reference" (products in
            float64 by PyTorch) instead of the automatic choice.

    Returns:
        A `LanczosResult`. Look at `complete`, or at `converged`, before you use it. No gradient.

    Raises:
        ShapeError, DtypeError, DeviceError: on bad arguments.
        MatrixError: if an entry is not finite, the matrix is plainly not symmetric, or the eigenvalues overflow or
            underflow its dtype, as those of X'X do for samples of 1e-22 in float32.
        BackendError: if `backend` is missing.
    """
    multiply = LinearMap(matrix, gram, center, backend)
    if type(k) is not int or not 1 <= k <= multiply.dim:
        raise ShapeError(f"k must be a whole number from 1 to {multiply.dim}, got {k!r}")
    return _solve(multiply, _Largest(k), tol, start, seed, max_steps)


def lanczos_above(
    matrix: Tensor,
    threshold: float,
    *,
    gram: bool = False,
    center: bool = False,
    tol: float | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    max_steps: int = 1000,
    backend: str | None = None,
) -> LanczosResult:
    """All eigenvalues above a threshold and their eigenvectors.

    As many are sought as it takes for one to fall below the threshold. The first one below need not converge: its
    distance from the threshold must exceed its residual.

    Args:
        threshold: in the matrix's own unit, for instance an edge from `rmtkernels.laws`; with `gram` times n.
        matrix, gram, center, tol, start, seed, max_steps, backend: as of `lanczos_eigh`.

    Returns:
        A `LanczosResult` with as many eigenpairs as there are above, perhaps none. `complete` says that all of these
        have converged and that random starts showed no other; if it is False there may be others.

    Raises:
        As `lanczos_eigh`.
    """
    if not math.isfinite(threshold):
        raise ShapeError(f"the threshold must be finite, got {threshold}")
    multiply = LinearMap(matrix, gram, center, backend)
    return _solve(multiply, _Above(threshold), tol, start, seed, max_steps)


class _Goal(Protocol):
    def begin(self) -> int:
        """Eigenpairs to make room for at first."""

    def excess(self, ritz: Ritz, allowed: float) -> tuple[int, Tensor]:
        """How many Ritz pairs are wanted, and residual bounds over what they may be; at most 1 when done."""

    def lowest(self, ritz: Ritz) -> float:
        """The eigenvalue of which further copies would make no difference."""


class _Largest:
    def __init__(self, k: int) -> None:
        self.k = k

    def begin(self) -> int:
        return self.k

    def excess(self, ritz: Ritz, allowed: float) -> tuple[int, Tensor]:
        return self.k, ritz.bounds[: self.k] / allowed

    def lowest(self, ritz: Ritz) -> float:
        return float(ritz.values[: self.k][-1])


class _Above:
    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def begin(self) -> int:
        return 2 * BLOCK

    def excess(self, ritz: Ritz, allowed: float) -> tuple[int, Tensor]:
        count = int((ritz.values > self.threshold).sum())
        excess = ritz.bounds[: count + 1] / allowed
        if count < len(excess):
            excess[count] = ritz.bounds[count] / max(allowed, self.threshold - float(ritz.values[count]))
        return count, excess

    def lowest(self, ritz: Ritz) -> float:
        return self.threshold


@in_full_precision
def _solve(
    multiply: LinearMap, goal: _Goal, tol: float | None, start: Tensor | None, seed: int, max_steps: int
) -> LanczosResult:
    tol = TOLERANCE[multiply.dtype] if tol is None else tol
    smallest = 8 * torch.finfo(multiply.dtype).eps
    if not smallest <= tol < 1 or max_steps < 1:
        raise ShapeError(
            f"tol must be {smallest:.1g} (rounding) or more and below 1, max_steps positive, got {tol} and {max_steps}"
        )
    tiny = torch.finfo(multiply.dtype).tiny
    basis = _begin(multiply, goal.begin(), start, seed)
    schedule = _Schedule(goal.begin())
    until, once, failures = schedule.first, 0, 0
    earliest = 0 if start is None else min(BLOCK, max_steps)  # what the start lacks is for the random vectors to find
    while True:
        while basis.size < until and not basis.full() and len(basis.rest) and basis.steps < max_steps:
            basis.step()
        ritz = basis.ritz()
        multiply.check_scale(max(ritz.scale, tiny))
        allowed = tol * max(ritz.scale, tiny)
        wanted, excess = goal.excess(ritz, allowed)
        if start is not None:
            excess = torch.cat([excess, _next_unsettled(ritz, wanted, goal.lowest(ritz), allowed)])
        exhausted = basis.size == multiply.dim
        done = exhausted or (float(excess.max()) <= 1 and basis.steps >= earliest and wanted <= basis.size)
        if done or basis.steps >= max_steps:
            result = _result(basis, ritz, wanted, tol, done)
            hidden = done and not exhausted and _may_hide_copies(ritz, wanted, goal.lowest(ritz), tol, basis)
            failures += not result.complete
            if exhausted or basis.steps >= max_steps or failures == _PATIENCE or (result.complete and not hidden):
                if done:
                    multiply.check_scale(ritz.scale)
                return result
            if hidden:
                once = once or basis.steps
                earliest = min(max_steps, basis.steps + once)  # as long again for what was added
                basis.widen()
        until = schedule.next(basis, ritz, wanted, excess)


class _Schedule:
    """When to look at the Ritz values next: where the residuals would arrive if they fell faster than they did.

    Residuals of a Krylov basis fall faster and faster: the line through the last two looks arrives late by a fifth or
    more, and a fall of e for a block is common at the end. A look costs as much as two blocks: some are added.
    """

    def __init__(self, k: int) -> None:
        self.first = max(2 * k, k + 8 * BLOCK) - BLOCK
        self.last: tuple[int, float] | None = None

    def next(self, basis: Basis, ritz: Ritz, wanted: int, excess: Tensor) -> int:
        """The size until which the basis shall grow. Restarts it, or makes room, if it is full."""
        width = len(basis.rest)
        worst = math.log(max(float(excess.max()), 1e-300))
        ahead = most = int(max(2.0, 1.25 * worst + 1)) * width
        if self.last is not None and basis.size > self.last[0] and worst < self.last[1]:
            ahead = int(0.8 * worst * (basis.size - self.last[0]) / (self.last[1] - worst)) + width
        ahead = min(max(ahead, width), most, max(wanted, 8 * BLOCK))
        self.last = basis.size, worst
        basis.reserve(room_for(wanted))
        if basis.full() and basis.size < basis.multiply.dim:
            basis.restart(ritz, wanted + min((basis.size - wanted) // 2, wanted // 2 + 2 * width))
            self.last = None
            ahead = len(basis.vectors)
        return basis.size + ahead


def room_for(k: int) -> int:
    """Vectors a basis may hold to find k."""
    return 5 * k + 16 * BLOCK


def _begin(multiply: LinearMap, k: int, start: Tensor | None, seed: int) -> Basis:
    """A basis of one block, after the first product has shown whether the matrix can be worked with."""
    generator = random_source(seed)
    given = multiply.matrix.new_empty(0, multiply.dim) if start is None else _checked_start(multiply, start)
    missing = min(BLOCK, multiply.dim - len(given))
    rows = torch.randn(missing, multiply.dim, generator=generator, dtype=multiply.dtype)
    rows = torch.cat([given, rows.to(multiply.device)])
    basis = Basis(multiply, room_for(max(k, len(rows))), rows, generator)
    basis.step()
    check_first_product(basis.vectors[: basis.size], basis.images[: basis.size])
    return basis


def _checked_start(multiply: LinearMap, start: Tensor) -> Tensor:
    if start.dim() != 2 or start.shape[0] != multiply.dim or not 1 <= start.shape[1] <= multiply.dim:
        raise ShapeError(f"start must be ({multiply.dim}, 1 to {multiply.dim} vectors), got {tuple(start.shape)}")
    if start.dtype != multiply.dtype:
        raise DtypeError(f"start must have the matrix's dtype {multiply.dtype}, got {start.dtype}")
    if start.device != multiply.device:
        raise DeviceError(f"start must be on the matrix's device {multiply.device}, got {start.device}")
    if not start.isfinite().all():
        raise MatrixError("start has an entry that is not finite")
    return start.detach().mT


def _next_unsettled(ritz: Ritz, wanted: int, lowest: float, allowed: float) -> Tensor:
    """Residual bound over distance from the lowest of the first Ritz value behind those wanted that is not settled.

    With a start that was given others may be settled from the first look, and say nothing about what the start lacks.
    Further copies of the lowest do not count: new ones come up again and again.
    """
    gaps, bounds = lowest - ritz.values[wanted:], ritz.bounds[wanted:]
    return (bounds / gaps)[(bounds > allowed) & (gaps[:1] > allowed)][:1]


def _may_hide_copies(ritz: Ritz, wanted: int, lowest: float, tol: float, basis: Basis) -> bool:
    """Whether an eigenvalue above the lowest was found as often as the start has vectors, and so may have more.

    Those closer together than the tolerance count as one: the search ends before it can tell them apart.
    """
    width = len(basis.rest)
    values = ritz.values[:wanted].tolist()
    near = max(64 * torch.finfo(basis.multiply.dtype).eps, tol) * ritz.scale
    pairs = zip(values, values[width - 1 :], strict=False)
    return any(high - low <= near and low > lowest + near for high, low in pairs)


def _result(basis: Basis, ritz: Ritz, wanted: int, tol: float, done: bool) -> LanczosResult:
    """Eigenpairs and their residuals, from the products themselves: the recurrence is not trusted."""
    wanted = min(wanted, basis.size)
    vectors, images = basis.combine(ritz.shares[:, :wanted])
    values = ritz.values[:wanted].to(vectors)
    norms = torch.addcmul(images.double(), vectors.double(), values.double()[:, None], value=-1).norm(dim=1)
    residuals = norms / max(ritz.scale, torch.finfo(torch.float64).tiny)
    converged = residuals <= tol
    peaks = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    eigenvectors = (vectors * peaks.sign()).mT
    return LanczosResult(values, eigenvectors, residuals, converged, done and bool(converged.all()), basis.steps)
