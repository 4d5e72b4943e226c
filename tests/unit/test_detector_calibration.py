"""Probabilities that are right on average, and thresholds with the false alarms that they promise."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eigentrack import Detector, MismatchError, NotFittedError
from eigentrack.calibration import fit_map, threshold_for
from tests.helpers import generator, normal, same_bits


def labelled_logits(count: int, slope: float, intercept: float, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """One to three tokens a sequence, whose class is 1 with the probability that slope and intercept say."""
    random = generator(seed)
    logits = torch.randn(count, generator=random) * 3
    labels = (torch.rand(count, generator=random) < torch.sigmoid(slope * logits + intercept)).float()
    return [logits[i].repeat(1 + i % 3) for i in range(count)], labels


def test_platt_finds_the_line() -> None:
    found = fit_map(*labelled_logits(20_000, 0.6, -1.2), "platt")
    assert found.slope == pytest.approx(0.6, abs=0.03) and found.intercept == pytest.approx(-1.2, abs=0.08)


def test_platt_is_at_the_minimum() -> None:
    logits, labels = labelled_logits(200, 1.0, 0.5)
    found = fit_map(logits, labels, "platt")
    wrong = float(labels.sum())
    target = torch.where(labels == 1, (wrong + 1) / (wrong + 2), 1 / (202 - wrong)).double()
    one = torch.stack([x[0] for x in logits]).double()
    line = torch.tensor([found.slope, found.intercept], dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(line[0] * one + line[1], target)
    (gradient,) = torch.autograd.grad(loss, line)
    assert gradient.abs().max() < 1e-4


def test_platt_keeps_the_order_of_what_says_nothing() -> None:
    logits, labels = labelled_logits(300, -2.0, 0.0)
    found = fit_map(logits, labels, "platt")
    assert found.slope > 0 and abs(float(found(torch.zeros(()))) - float(labels.mean())) < 0.1


def test_isotonic_is_right_within_bins_of_any_shape() -> None:
    random = generator(1)
    x = torch.rand(20_000, generator=random) * 6 - 3
    truth = 0.1 + 0.3 * (x > -1) + 0.5 * (x > 2)
    labels = (torch.rand(20_000, generator=random) < truth).float()
    found = fit_map(list(x[:, None]), labels, "isotonic")
    for low, high in ((-3, -1.2), (-0.8, 1.8), (2.2, 3)):
        inside = (x > low) & (x < high)
        assert (found(x[inside]) - truth[inside]).abs().mean() < 0.04
    grid = found(torch.linspace(-5, 5, 2001))
    assert (grid.diff() >= 0).all() and grid[0] > 0 and grid[-1] < 1


def test_isotonic_interpolates_as_numpy_does() -> None:
    found = fit_map(*labelled_logits(400, 1.0, 0.0), "isotonic")
    x = normal(50, seed=2) * 4
    np.testing.assert_allclose(found(x), np.interp(x, found.knots, found.values), atol=2e-6)


@pytest.mark.parametrize("labels", [[1, 0], [0, 1]])
def test_isotonic_of_the_smallest_data(labels: list[int]) -> None:
    found = fit_map([torch.zeros(1), torch.ones(1)], torch.tensor(labels).float(), "isotonic")
    low, high = found(torch.tensor([-1.0, 2.0])).tolist()
    assert (low, high) == ((0.5, 0.5) if labels == [1, 0] else (0.25, 0.75))


def test_equal_logits_have_one_probability() -> None:
    found = fit_map([torch.zeros(2)] * 30, torch.tensor([0.0, 1, 0] * 10), "isotonic")
    assert found(torch.zeros(1)).item() == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_the_threshold_keeps_its_promise_on_new_sequences(rate: float) -> None:
    random = generator(3)
    alarms = []
    for _ in range(400):
        limit = threshold_for(torch.rand(150, generator=random), rate)
        alarms.append(float((torch.rand(200, generator=random) > limit).float().mean()))
    assert rate - 0.012 < np.mean(alarms) < rate + 0.004


def test_the_threshold_is_between_two_sequences() -> None:
    highest = torch.arange(19.0) / 19
    assert threshold_for(highest, 0.05) == pytest.approx((18 / 19 + 1) / 2)
    assert threshold_for(highest, 0.1) == pytest.approx(17.5 / 19)
    with pytest.raises(MismatchError, match="takes 19 right sequences"):
        threshold_for(highest[1:], 0.05)
    with pytest.raises(MismatchError, match="takes 99 "):
        threshold_for(highest, 0.01)


def fitted() -> tuple[Detector, list[Tensor], list[int]]:
    sequences = [normal(6 + i % 4, 3, seed=i) + 0.7 * (i % 2) for i in range(200)]
    detector = Detector(["a", "b", "c"])
    detector.fit(sequences, [i % 2 for i in range(200)], items=range(200), epochs=8, progress=False)
    held = [normal(6 + i % 4, 3, seed=500 + i) + 0.7 * (i % 2) for i in range(400)]
    return detector, held, [i % 2 for i in range(400)]


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_a_calibrated_detector_raises_so_many_false_alarms(method: str) -> None:
    detector, sequences, labels = fitted()
    raw = detector.score(sequences)
    returned = detector.calibrate(sequences, labels, false_alarms=0.1, method=method)
    assert returned == detector.threshold and detector.calibration.false_alarms == 0.1
    risks = detector.score(sequences)
    alarms = torch.tensor([bool((risk > detector.threshold).any()) for risk in risks])
    right = torch.tensor(labels) == 0
    assert 0.05 <= alarms[right].float().mean() <= 0.1 < alarms[~right].float().mean()
    mean = torch.tensor([risk.mean() for risk in risks])
    assert abs(float(mean.mean()) - 0.5) < 0.05
    order = torch.cat(raw).argsort()
    assert (torch.cat(risks)[order].diff() >= -1e-6).all(), "a higher risk stays a higher risk"


def test_calibrating_again_starts_from_the_network() -> None:
    detector, sequences, labels = fitted()
    detector.calibrate(sequences, labels, method="isotonic")
    first = detector.calibrate(sequences, labels)
    scores = detector.score(sequences)
    assert detector.calibrate(sequences, labels) == first
    assert all(map(same_bits, detector.score(sequences), scores))
    step = detector.step(sequences[0][:1])[0]
    torch.testing.assert_close(step, scores[0][:1], rtol=0, atol=1e-6)
    detector.fit(sequences, labels, items=range(400), epochs=1, progress=False)
    with pytest.raises(NotFittedError, match="threshold"):
        detector.threshold  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "temperature"}, "method"),
        ({"false_alarms": 0.0}, "false_alarms"),
        ({"false_alarms": 1.0}, "false_alarms"),
        ({"false_alarms": math.nan}, "false_alarms"),
        ({"false_alarms": 0.001}, "takes 999"),
        ({"labels": [1] * 400}, "both classes"),
        ({"labels": [0]}, "400 sequences"),
    ],
)
def test_what_cannot_be_calibrated_on_changes_nothing(changes: dict[str, Any], message: str) -> None:
    detector, sequences, labels = fitted()
    detector.calibrate(sequences, labels)
    before = detector.calibration
    with pytest.raises(MismatchError, match=message):
        detector.calibrate(sequences, **({"labels": labels} | changes))
    assert detector.calibration is before
