"""Ranks from spectra: what stands out of the noise, and the subspace it spans."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rmtkd.config import Config
from rmtkd.errors import ConfigError
from rmtkernels import lanczos_eigh, spike_count
from rmtkernels.errors import MatrixError
from rmtkernels.laws import marchenko_pastur_edges, noise_variance
from rmtkernels.laws.noise import METHODS

MIN_SPIKES_WIDTH = 512  # what `rmtkernels.spike_count` needs
# Float64 block Lanczos took .24 s where eigh took .80 s (192 of 1536) and 21 ms against 27 ms (48 of 384), one thread;
# at d / 4 it was no faster.
_LANCZOS_SHARE = 8
# Of the mean eigenvalue. Rounding of float32 activations left 1e-12 to 5e-15 of it outside of the subspace that a layer
# of 384 inputs fills among its 1536 outputs; within, the smallest eigenvalue was 2e-3 of it.
_ZERO = 1e-10


@dataclass(frozen=True)
class Choice:
    """The rank of a group, and all that it could have been.

    Attributes:
        dim, rows: d, and n, the number of samples behind the covariance.
        support: how many dimensions the activations vary in: d, or fewer if they fill a subspace only, as the outputs
            of a layer that is wider than its input do. Zeros that come from n < d are not meant.
        q: support / n.
        sigma2: noise variance by every method of `rmtkernels.laws.noise_variance`.
        edges: sigma2 (1 + sqrt q)^2, by method.
        outliers: eigenvalues above that edge, by method.
        spikes: `rmtkernels.spike_count`, which needs no noise variance; None where it has no answer (support < 512).
        raw_rank: the count by `Config.noise`.
        rank: raw_rank rounded up to a multiple, not below `min_ratio` of the support, at most d.
        clamped: whether `min_ratio` raised it.
        kept_energy: share of the trace in the `rank` largest eigenvalues.
    """

    dim: int
    rows: float
    support: int
    q: float
    sigma2: dict[str, float]
    edges: dict[str, float]
    outliers: dict[str, int]
    spikes: int | None
    raw_rank: int
    rank: int
    clamped: bool
    kept_energy: float


def choose(eigenvalues: ArrayLike, rows: float, config: Config, multiple: int = 1) -> Choice:
    """The rank that `config` gives a group of these eigenvalues.

    The rule is RMT-KD's (arXiv 2509.15724): keep what exceeds the Marchenko-Pastur edge of the noise variance. Rounding
    goes up, so that no outlier is lost to it. Where activations fill a subspace, eigenvalues beyond it are no noise but
    zero, and noise and edge are those of the spectrum within: without this, every outlier of a layer whose outputs are
    wider than its inputs would stand out of rounding errors.

    Args:
        eigenvalues: (d,), of the second moment Σ x xᵀ / n, in any order.
        rows: n.
        config: `noise`, `quantile`, `multiple` and `min_ratio` are read.
        multiple: the rank is divisible by this and by `config.multiple`, unless it is d.

    Raises:
        ConfigError: if `config.noise` is "spikes" and the support is less than 512.
        ShapeError: if the eigenvalues are no spectrum (not finite, negative beyond rounding).
    """
    spectrum = np.sort(np.asarray(eigenvalues, dtype=np.float64))[::-1]
    dim = len(spectrum)
    zero = _ZERO * noise_variance(spectrum, dim / rows, "trace")  # the mean; refuses what is no spectrum
    support = int((spectrum > zero).sum())
    if support >= min(dim, int(rows)):
        support = dim
    within = spectrum[: max(support, 1)]
    q = len(within) / rows
    factor = marchenko_pastur_edges(q)[1]
    sigma2 = {
        method: noise_variance(within, q, method, *((config.quantile,) if method in ("quantile", "fit") else ()))
        for method in METHODS
    }
    edges = {method: variance * factor for method, variance in sigma2.items()}
    outliers = {method: int((spectrum > max(edge, zero)).sum()) for method, edge in edges.items()}
    spikes = _spikes(np.maximum(within, 0.0))
    if config.noise == "spikes":
        if spikes is None:
            raise ConfigError(
                f'noise="spikes" needs activations of at least {MIN_SPIKES_WIDTH} dimensions, and there are some of '
                f'{len(within)}; take "median" or "fit"'
            )
        raw = spikes
    else:
        raw = outliers[config.noise]
    rank, clamped = round_rank(raw, dim, config.min_ratio * support, math.lcm(config.multiple, multiple))
    energy = kept_energy(spectrum, rank)
    return Choice(dim, rows, support, q, sigma2, edges, outliers, spikes, raw, rank, clamped, energy)


def leading_eigenvectors(covariance: Tensor, k: int) -> Tensor:
    """The eigenvectors of the k largest eigenvalues.

    Args:
        covariance: (d, d) symmetric, float32 or float64.
        k: 1 to d.

    Returns:
        (d, k) float32 on the covariance's device, orthonormal to 1e-6; the entry of largest magnitude of each is
        positive. Computed in float64.
    """
    matrix = covariance.double()
    if _LANCZOS_SHARE * k <= len(matrix):
        found = lanczos_eigh(matrix, k)
        if found.complete:
            return found.eigenvectors.float().contiguous()
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :k]
    peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * peaks.sign()).float().contiguous()


def round_rank(raw: float, dim: int, least: float, multiple: int) -> tuple[int, bool]:
    """The larger of `raw` and `least`, rounded up to a multiple of at least one, but not above `dim`.

    Returns:
        The rank, and whether it is larger for `least`.
    """
    free, held = (min(max(1, math.ceil(wanted / multiple)) * multiple, dim) for wanted in (raw, least))
    return max(free, held), held > free


def kept_energy(eigenvalues: ArrayLike, rank: int) -> float:
    """Share of the trace in the largest eigenvalues; 1 if there is no trace."""
    spectrum = np.sort(np.maximum(np.asarray(eigenvalues, dtype=np.float64), 0.0))[::-1]
    total = float(spectrum.sum())
    return float(spectrum[:rank].sum()) / total if total > 0 else 1.0


def _spikes(spectrum: NDArray[np.float64]) -> int | None:
    """Spikes are counted from the spectrum alone, so any matrix that has it will do."""
    if len(spectrum) < MIN_SPIKES_WIDTH or spectrum[0] == 0:
        return None
    try:
        return spike_count(torch.diag(torch.from_numpy(spectrum.copy()))).count
    except MatrixError:
        return None
