"""The detector's experiments: figures against plain definitions, splits, and features against slow formulas."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from bench.experiments.detector import early, metrics
from bench.experiments.detector.items import Item, merge_groups, shuffled, split_of
from bench.experiments.detector.sets import word_overlap


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 2, 200).astype(float)
    return np.round(labels + generator.normal(0, 1, 200), 1), labels  # rounded: there are ties


def test_figures_are_those_of_scikit_learn(scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = scored
    assert metrics.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert metrics.precision_area(scores, labels) == pytest.approx(average_precision_score(labels, scores))
    assert metrics.f1(scores, labels, 0.5) == pytest.approx(f1_score(labels, scores >= 0.5))
    false_rate, true_rate, _ = roc_curve(labels, scores, drop_intermediate=False)
    at = [0.0, 0.03, 0.5, 1.0]
    upper = [true_rate[false_rate <= one].max() for one in false_rate]
    assert metrics.hits_at(scores, labels, at) == pytest.approx(np.interp(at, false_rate, upper))
    assert metrics.false_alarms_at(scores, labels) == pytest.approx(false_rate[true_rate >= 0.95][0])


def test_weights_are_repetitions(scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = scored
    times = np.random.default_rng(0).integers(0, 3, len(scores))
    repeated = metrics.auroc(scores.repeat(times), labels.repeat(times))
    assert metrics.auroc(scores, labels, times.astype(float)) == pytest.approx(repeated)
    assert metrics.auroc(scores, labels, np.stack([times, times]).astype(float)).shape == (2,)


def test_whole_groups_are_drawn() -> None:
    weights = metrics.resampled(["a", "b", "a", "c"], draws=50)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()


def test_a_method_does_not_differ_from_itself(scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = scored
    groups = [str(index) for index in range(len(scores))]
    assert metrics.difference(scores, scores, labels, groups) == [0.0, 0.0, 0.0]


def test_twins_are_compared_with_each_other() -> None:
    labels = np.array([0.0, 1, 0, 1, 0, 1])
    assert metrics.pairs_right(np.array([1.0, 2, 9, 8, 4, 4]), labels, list("aabbcc")) == pytest.approx(0.5)


def test_calibration_error() -> None:
    probabilities, labels = np.array([0.05, 0.05, 0.95, 0.95]), np.array([0.0, 0, 1, 0])
    assert metrics.calibration_error(probabilities, labels) == pytest.approx(0.5 * 0.05 + 0.5 * 0.45)


def test_sources_keep_their_split_and_shares() -> None:
    splits = [split_of(f"source {index}") for index in range(4000)]
    assert splits == [split_of(f"source {index}") for index in range(4000)]
    for name, share in (("train", 0.5), ("validation", 0.2), ("test", 0.3)):
        assert splits.count(name) / 4000 == pytest.approx(share, abs=0.03)


def test_rows_that_share_a_link_are_one_group() -> None:
    groups = merge_groups([("a", "x"), ("b", "y"), ("c", "x"), ("b", "z"), ("d", "z")])
    assert groups[0] == groups[2] and groups[1] == groups[3] == groups[4] and groups[0] != groups[1]


def test_the_order_does_not_depend_on_what_else_there_is() -> None:
    items = [Item(str(index), str(index), "", (), ()) for index in range(20)]
    some = [item for item in shuffled(items) if int(item.key) < 10]
    assert shuffled(items[:10]) == some


def test_word_overlap_leaves_common_words_out() -> None:
    assert word_overlap("Who wrote the Emma novel?", "Emma was written in 1815") == pytest.approx(1 / 3)


def test_stopping_counts_tokens() -> None:
    risks = [torch.tensor([0.1, 0.9, 0.2, 0.1]), torch.tensor([0.1, 0.2]), torch.tensor([0.8, 0.1]), torch.zeros(2)]
    found = early.stopping(risks, np.array([1.0, 1, 0, 0]), 0.5)
    assert found["wrong answers stopped"] == 0.5 and found["right answers stopped"] == 0.5
    assert found["median tokens left when stopped"] == 2
    assert found["tokens of wrong answers saved"] == round(2 / 6, 3)
    assert found["tokens of right answers lost"] == 0.25


def test_the_threshold_is_exceeded_by_one_right_answer_in_twenty() -> None:
    risks = [torch.tensor([0.0, index / 100]) for index in range(100)]
    level = early.threshold(risks, np.zeros(100))
    assert sum(float(risk.max()) > level for risk in risks) <= 5
