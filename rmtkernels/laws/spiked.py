"""Spiked covariances (Baik, Ben Arous, Peche): a population eigenvalue that stands out, and what a sample shows of it.

Two thresholds that papers confuse, EigenTrack's and RMT-KD's among them, in units of sigma^2: a *population* eigenvalue
must exceed 1 + sqrt(q) to be seen at all; the *sample* eigenvalue it then causes exceeds the edge (1 + sqrt q)^2.
`spike_to_sample` maps the one onto the other.

`theta` is the population eigenvalue itself, signal plus noise: theta = 1 is no spike. It belongs to the covariance
whose ratio is q. The n x n matrix H H^T / D of n rows of width D has q = n / D; their D x D covariance H^T H / n has
1 / q, and a signal that is a spike theta there is a spike 1 + q (theta - 1) here.

All of this is for large n and D and few spikes, well apart.

Source: Baik and Silverstein 2006 (eigenvalues); Paul 2007, Benaych-Georges and Nadakuditi 2012 (eigenvectors).
"""

import math
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from rmtkernels.laws._arrays import Array, like
from rmtkernels.laws.marchenko_pastur import check_ratio, marchenko_pastur_edges


def bbp_threshold(q: float) -> float:
    """The population eigenvalue 1 + sqrt(q), in units of sigma^2, beyond which a spike leaves the bulk of the sample.

    Raises:
        ShapeError: if q is not positive and finite.
    """
    check_ratio(q)
    return 1 + math.sqrt(q)


@overload
def spike_to_sample(theta: float, q: float) -> float: ...
@overload
def spike_to_sample(theta: ArrayLike, q: float) -> float | Array: ...
def spike_to_sample(theta: ArrayLike, q: float) -> float | Array:
    """Sample eigenvalue theta + q theta / (theta - 1) of a population spike, in units of sigma^2.

    The upper edge (1 + sqrt q)^2 for spikes at the threshold or below, which stay in the bulk.
    """
    threshold = bbp_threshold(q)
    spikes = np.asarray(theta, dtype=np.float64)
    seen = np.maximum(spikes, threshold)
    sample = seen + q + q / (seen - 1)
    return like(theta, np.where(spikes <= threshold, marchenko_pastur_edges(q)[1], sample))


@overload
def sample_to_spike(value: float, q: float) -> float: ...
@overload
def sample_to_spike(value: ArrayLike, q: float) -> float | Array: ...
def sample_to_spike(value: ArrayLike, q: float) -> float | Array:
    """Population spike behind a sample eigenvalue, in units of sigma^2: the inverse of `spike_to_sample`.

    NaN below the upper edge, where no spike can be told from noise; the threshold 1 + sqrt q at the edge.
    """
    check_ratio(q)
    low, high = marchenko_pastur_edges(q)
    values = np.asarray(value, dtype=np.float64)
    seen = np.where(values >= high, values, np.nan)
    # theta - 1 - sqrt(q) = (t + sqrt(t (t + 4 sqrt q))) / 2 with t beyond the edge: nothing cancels
    beyond = seen - high
    return like(value, bbp_threshold(q) + 0.5 * (beyond + np.sqrt(beyond) * np.sqrt(seen - low)))


@overload
def spike_overlap(theta: float, q: float) -> float: ...
@overload
def spike_overlap(theta: ArrayLike, q: float) -> float | Array: ...
def spike_overlap(theta: ArrayLike, q: float) -> float | Array:
    """Squared cosine between a spike's eigenvectors in sample and population; `theta` is the population's eigenvalue.

    (1 - q / (theta - 1)^2) / (1 + q / (theta - 1)), and 0 for spikes at the threshold or below.
    """
    threshold = bbp_threshold(q)
    spikes = np.asarray(theta, dtype=np.float64)
    excess = np.maximum(spikes, threshold) - 1
    return like(theta, np.where(spikes <= threshold, 0.0, (1 - q / excess / excess) / (1 + q / excess)))
