"""Spiked covariances against planted spikes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmtkernels import ShapeError
from rmtkernels.laws import (
    bbp_threshold,
    marchenko_pastur_edges,
    sample_to_spike,
    spike_overlap,
    spike_to_sample,
)

ratios = st.floats(min_value=-7, max_value=3).map(lambda e: 10.0**e)


@given(ratios)
def test_the_threshold_of_the_population_lands_on_the_edge_of_the_sample(q: float) -> None:
    edge = marchenko_pastur_edges(q)[1]
    assert spike_to_sample(bbp_threshold(q), q) == edge
    assert spike_to_sample(bbp_threshold(q) * (1 + 1e-9), q) == pytest.approx(edge, rel=1e-9)
    assert spike_to_sample(edge, q) > edge  # a population eigenvalue at the sample's edge is well beyond the threshold
    assert sample_to_spike(edge, q) == bbp_threshold(q)


@given(ratios, st.floats(min_value=-3, max_value=6).map(lambda e: 10.0**e))
def test_maps_invert_each_other(q: float, beyond: float) -> None:
    threshold = bbp_threshold(q)
    theta = threshold * (1 + beyond)
    value = spike_to_sample(theta, q)
    # Near the threshold the map is flat: a last bit of the sample is a larger one of the population.
    excess = theta - 1
    slope = 1 - q / excess**2
    assert sample_to_spike(value, q) == pytest.approx(theta, abs=1e-15 * value / slope + 1e-14 * theta)


def test_known_values() -> None:
    assert spike_to_sample(3.0, 0.25) == pytest.approx(3.375)
    assert sample_to_spike(3.375, 0.25) == pytest.approx(3.0)
    assert spike_overlap(3.0, 0.25) == pytest.approx((1 - 1 / 16) / (1 + 1 / 8))
    assert spike_to_sample(math.inf, 0.25) == math.inf
    assert sample_to_spike(math.inf, 0.25) == math.inf
    assert spike_overlap(math.inf, 0.25) == 1


def test_below_the_threshold() -> None:
    theta = np.array([0.0, 0.3, 1.0, 1.4, 1.5])
    assert spike_to_sample(theta, 0.25).tolist() == [2.25] * 5
    assert spike_overlap(theta, 0.25).tolist() == [0] * 5
    assert np.isnan(sample_to_spike(np.array([-1.0, 1.0, 2.2499]), 0.25)).all()
    assert np.isnan(spike_to_sample(math.nan, 0.25)) and np.isnan(spike_overlap(math.nan, 0.25))


@given(ratios)
def test_the_overlap_grows_from_zero_to_one(q: float) -> None:
    theta = 1 + math.sqrt(q) * (1 + np.logspace(-6, 9, 200))
    overlap = spike_overlap(theta, q)
    assert np.all(np.diff(overlap) >= 0) and overlap[0] < 1e-4 and 1 - 1e-5 < overlap[-1] <= 1


@pytest.mark.parametrize(("n", "dim"), [(300, 1200), (400, 200)])
def test_planted_spikes(n: int, dim: int) -> None:
    """n variables, dim samples: three spikes, one of them too weak to be seen."""
    q = n / dim
    threshold = bbp_threshold(q)
    spikes = np.array([6 * threshold, 2.5 * threshold, 1 + 0.3 * (threshold - 1)])
    rng = np.random.default_rng(4)
    scale = np.ones(n)
    scale[:3] = np.sqrt(spikes)
    values, overlaps = [], []
    for _ in range(12):
        rows = scale[:, None] * rng.standard_normal((n, dim))
        eigenvalues, vectors = np.linalg.eigh(rows @ rows.T / dim)
        values.append(eigenvalues[[-1, -2, -3]])
        overlaps.append([vectors[0, -1] ** 2, vectors[1, -2] ** 2, vectors[2, -3] ** 2])
    value, overlap = np.mean(values, axis=0), np.mean(overlaps, axis=0)
    # sd of a sample spike: theta sqrt(2 (1 - q / (theta - 1)^2) / dim); other spikes shift it by O(1 / dim)
    error = spikes * np.sqrt(2 / dim / len(values))
    assert np.all(np.abs(value - spike_to_sample(spikes, q))[:2] < 3.5 * error[:2])
    assert value[2] == pytest.approx(marchenko_pastur_edges(q)[1], rel=0.04)
    assert overlap[:2] == pytest.approx(spike_overlap(spikes, q)[:2], abs=0.03)
    assert spike_overlap(spikes[2], q) == 0 and overlap[2] < 0.05
    assert sample_to_spike(value[:2], q) == pytest.approx(spikes[:2], rel=0.1)


def test_a_spike_of_the_covariance_is_one_of_the_gram_matrix() -> None:
    n, dim = 100, 900  # rows, and their width
    in_covariance = 1 + 5 * math.sqrt(dim / n)
    q = n / dim
    in_gram = 1 + q * (in_covariance - 1)
    assert q * spike_to_sample(in_covariance, 1 / q) == pytest.approx(spike_to_sample(in_gram, q), rel=1e-14)
    rng = np.random.default_rng(6)
    largest = []
    for _ in range(20):
        rows = rng.standard_normal((n, dim))
        rows[:, 0] *= math.sqrt(in_covariance)
        largest.append(np.linalg.eigvalsh(rows @ rows.T / dim)[-1])
    assert np.mean(largest) == pytest.approx(spike_to_sample(in_gram, q), rel=0.07)


@pytest.mark.parametrize("q", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("call", [spike_to_sample, sample_to_spike, spike_overlap, lambda _, q: bbp_threshold(q)])
def test_a_ratio_that_is_not_positive_is_refused(call, q: float) -> None:
    with pytest.raises(ShapeError, match="ratio"):
        call(2.0, q)
