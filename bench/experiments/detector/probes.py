"""Logistic regressions on vectors, with what is free (layer, strength) chosen on validation."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bench.experiments.detector.metrics import auroc

Array = NDArray[np.float64]
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass
class Scored:
    """A method's scores.

    Attributes:
        values: (n,), higher = riskier, for every answer of the set.
        choice: what was chosen on validation, and how.
        validation: AUROC there.
    """

    values: Array
    choice: dict[str, Any] = field(default_factory=dict)
    validation: float = float("nan")


def judged(values: Array, labels: Array, validation: NDArray[np.intp], **choice: Any) -> Scored:
    return Scored(values, choice, float(auroc(values[validation], labels[validation])))


def best(candidates: list[Scored]) -> Scored:
    """The first of those that are best on validation."""
    return max(candidates, key=lambda one: one.validation)


def together(one: Scored, other: Scored, labels: Array, validation: NDArray[np.intp]) -> Scored:
    """The sum of both, each divided by its deviation over validation."""
    values = one.values / one.values[validation].std() + other.values / other.values[validation].std()
    return judged(values, labels, validation)


def logistic(strength: float, components: int | None = None) -> Any:
    steps: list[Any] = [StandardScaler()]
    if components:
        steps.append(PCA(components, svd_solver="randomized", random_state=0))
    return make_pipeline(*steps, LogisticRegression(C=strength, max_iter=500, class_weight="balanced"))


def probe(
    features: Array,
    labels: Array,
    train: NDArray[np.intp],
    validation: NDArray[np.intp],
    components: int | None = None,
    **choice: Any,
) -> Scored:
    """(n, D) features; the strength of regularisation is chosen on validation."""
    found = []
    features = np.nan_to_num(np.asarray(features, dtype=np.float64))
    for strength in STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged: a weaker regularisation than asked for, no more
            fitted = logistic(strength, components).fit(features[train], labels[train])
        values = fitted.decision_function(features)
        found.append(judged(values, labels, validation, strength=strength, **choice))
    return best(found)


def probe_layers(
    features: Any,
    layers: list[str],
    labels: Array,
    train: NDArray[np.intp],
    validation: NDArray[np.intp],
) -> Scored:
    """(n, layers, D): the best layer on validation."""
    return best(
        [
            probe(features[:, index].numpy(), labels, train, validation, layer=layer)
            for index, layer in enumerate(layers)
        ]
    )
