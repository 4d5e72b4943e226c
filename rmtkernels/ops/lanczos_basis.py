"""The Krylov basis of block Lanczos: steps, restarts, Ritz values. Vectors are rows; nothing waits for the device."""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from rmtkernels.ops.lanczos_multiply import LinearMap
from rmtkernels.ops.lanczos_orthonormalize import Orthonormal, orthonormalize


def random_source(seed: int) -> torch.Generator:
    """Not the numbers of `torch.manual_seed(seed)`: samples drawn with the same seed would be the starts themselves."""
    digest = hashlib.sha256(f"rmtkernels.lanczos {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class Ritz(NamedTuple):
    """Approximate eigenpairs, largest first, on the host, in float64.

    Attributes:
        values: (m,). shares: (m, m), column i holds the coefficients of vector i in the basis.
        bounds: (m,), the residual norms that the recurrence promises.
        scale: largest magnitude among the values.
    """

    values: Tensor
    shares: Tensor
    bounds: Tensor
    scale: float


class Basis:
    """Orthonormal rows Q, their images A Q, and the projection Q A Q'; `rest` is what comes next.

    A Q = Q T + rest' coupling, where only the last block of Q takes part in the coupling.
    """

    def __init__(self, multiply: LinearMap, capacity: int, start: Tensor, generator: torch.Generator) -> None:
        self.multiply, self.generator = multiply, generator
        self.vectors = multiply.matrix.new_empty(0, multiply.dim)
        self.images, self.projected = self.vectors, torch.zeros(0, 0, dtype=torch.float64, device=multiply.device)
        self.size, self.steps = 0, 0
        self.scale = multiply.matrix.new_zeros((), dtype=torch.float64)
        self.noise = self.random(start.shape[0])
        self.reserve(capacity)
        self.rest, self.coupling, _ = self._orthonormal(start)

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` vectors, or as many as there can be."""
        capacity = min(capacity, self.multiply.dim)
        if capacity <= len(self.vectors):
            return
        grown = self.vectors.new_empty(2, capacity, self.multiply.dim)
        projected = self.projected.new_zeros(capacity, capacity)
        grown[0, : self.size], grown[1, : self.size] = self.vectors[: self.size], self.images[: self.size]
        projected[: self.size, : self.size] = self.projected[: self.size, : self.size]
        self.vectors, self.images, self.projected = grown[0], grown[1], projected

    def full(self) -> bool:
        """Whether the next block has no room."""
        return self.size + len(self.rest) > len(self.vectors)

    def step(self) -> None:
        """Takes the next block into the basis."""
        first, last = self.size, self.size + len(self.rest)
        image = self.multiply(self.rest)
        self.vectors[first:last], self.images[first:last] = self.rest, image
        self.size, self.steps = last, self.steps + 1
        self.scale = torch.maximum(self.scale, image.norm(dim=1, dtype=torch.float64).max())
        self.rest, self.coupling, products = self._orthonormal(image)
        self.projected[first:last, :last] = products
        self.projected[:first, first:last] = products[:, :first].mT

    def ritz(self) -> Ritz:
        """Eigenpairs of the projection. Waits for the device, once."""
        projected = self.projected[: self.size, : self.size]
        last = self.coupling.shape[1]
        packed = torch.cat([projected.flatten(), self.coupling.double().flatten()]).cpu()
        projected, coupling = packed[: self.size**2].view(self.size, -1), packed[self.size**2 :].view(-1, last)
        if not packed.isfinite().all():
            nan = torch.full((self.size,), torch.nan, dtype=torch.float64)
            return Ritz(nan, nan.expand(self.size, -1), nan, torch.nan)
        values, shares = torch.linalg.eigh((projected + projected.mT) / 2)
        values, shares = values.flip(0), shares.flip(1)
        bounds = (coupling @ shares[self.size - last :]).norm(dim=0)
        return Ritz(values, shares, bounds, float(values.abs().max()))

    def combine(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the vectors with these shares (m, count), and of their images."""
        weights = shares.mT.to(self.vectors)
        return weights @ self.vectors[: self.size], weights @ self.images[: self.size]

    def restart(self, ritz: Ritz, keep: int) -> None:
        """Keeps the first Ritz vectors only; the next block goes on where this one ended."""
        self.vectors[:keep], self.images[:keep] = self.combine(ritz.shares[:, :keep])
        self.projected[:keep, :keep] = ritz.values[:keep].diag()
        self.coupling = self.coupling @ ritz.shares[self.size - self.coupling.shape[1] :, :keep].to(self.coupling)
        self.size = keep

    def widen(self) -> None:
        """Adds random vectors to the next block and to all that follow."""
        extra = min(len(self.noise), self.multiply.dim - self.size - len(self.rest))
        if extra <= 0:
            return
        wider = torch.cat([self.rest, self.random(extra)])
        self.noise = self.random(len(wider))
        self.rest = self._orthonormal(wider).unit

    def random(self, count: int) -> Tensor:
        """Rows of norm about 1, from the seed."""
        rows: Tensor = torch.randn(count, self.multiply.dim, generator=self.generator, dtype=self.multiply.dtype)
        return rows.to(self.multiply.device) / math.sqrt(self.multiply.dim)

    def _orthonormal(self, rows: Tensor) -> Orthonormal:
        """What comes after the basis, from `rows`: those that depend on it to rounding give way to random ones."""
        return orthonormalize(
            rows,
            self.vectors[: self.size],
            self.noise,
            16 * torch.finfo(rows.dtype).eps * self.scale,
            self.steps % self.multiply.dim,
            backend=self.multiply.backend,
        )
