"""What a detector has to beat: cheap statistics, distances, probes of hidden states and of attention, on one set."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from bench.experiments.detector.data import Data
from bench.experiments.detector.metrics import auroc
from bench.experiments.detector.probes import Scored, best, judged, probe, probe_layers
from bench.experiments.detector.sets import word_overlap
from bench.experiments.detector.vectors import lookback
from rmtkernels import DESCRIPTORS

Array = NDArray[np.float64]
LAYERS = ["embedding", *(f"layer{index}" for index in range(2, 30, 3))]
TOPS = (5, 10, 20, 50)  # eigenvalues of the attention Laplacian per head


def baselines(data: Data, prompts_differ: bool = False) -> dict[str, Callable[[], Scored]]:
    """By name. Prompt-only methods where prompts differ; else they are at chance by construction."""
    found: dict[str, Callable[[], Scored]] = {
        "length": lambda: length(data),
        "words that the prompt has": lambda: shared_words(data),
        "mean embedding (layer 0)": lambda: _probe(data, data.mean[:, 0].numpy()),
        "last hidden state, best layer": lambda: hidden_probe(data, data.last[:, 1:], LAYERS[1:]),
        "mean hidden state, best layer": lambda: hidden_probe(data, data.mean[:, 1:], LAYERS[1:]),
        "mean hidden state, all layers": lambda: _probe(data, data.mean.flatten(1).numpy()),
        "cosine distance": lambda: distance(data, cosine),
        "Mahalanobis distance": lambda: distance(data, mahalanobis),
        "HaloScope": lambda: haloscope(data),
        "LapEigvals": lambda: attention_laplacian(data),
        "lookback ratios": lambda: lookback_ratios(data),
        "best single descriptor": lambda: single_descriptor(data),
        "logistic regression on averaged descriptors": lambda: _probe(data, averaged(data.descriptors)),
    }
    if prompts_differ:
        found["last prompt token, best layer"] = lambda: hidden_probe(data, data.prompt)
    for name in CHOICE_SCORES:
        found[name] = lambda name=name: choice_score(data, name)  # type: ignore[misc]
    return found


def length(data: Data) -> Scored:
    values = np.array([len(answer) for answer in data.answers], dtype=float)
    return best([judged(sign * values, data.labels, data.where("validation"), sign=sign) for sign in (1, -1)])


def shared_words(data: Data) -> Scored:
    """No model: the share of the answer's words, without the commonest, that are not in the prompt."""
    values = np.array([1 - word_overlap(answer.text, answer.item.prompt) for answer in data.answers])
    return judged(values, data.labels, data.where("validation"))


CHOICE_SCORES = {
    "perplexity": (0, -1),
    "token entropy": (1, 1),
    "maximum softmax probability": (2, -1),
    "energy": (3, -1),
    "logistic regression on these four": None,
}


def choice_score(data: Data, name: str) -> Scored:
    """Of the distributions that chose the tokens: unsure = riskier. Which statistic of it, validation says."""
    choices = [answer.choice.double().numpy() for answer in data.answers]
    taken = CHOICE_SCORES[name]
    if taken is None:
        return _probe(data, np.array([np.concatenate([c.mean(0), c.min(0), c.max(0), c[0], c[-1]]) for c in choices]))
    column, sign = taken
    rows = [sign * choice[:, column] for choice in choices]
    statistics = {"mean": np.mean, "max": np.max, "min": np.min, "first": lambda row: row[0]}
    return best(
        [
            judged(np.array([float(take(row)) for row in rows]), data.labels, data.where("validation"), statistic=kind)
            for kind, take in statistics.items()
        ]
    )


def hidden_probe(data: Data, states: Tensor, layers: list[str] = LAYERS) -> Scored:
    return probe_layers(states, layers, data.labels, data.where("train"), data.where("validation"))


def distance(data: Data, measure: Callable[[Array, NDArray[np.intp]], Array]) -> Scored:
    """Of the mean hidden state from those of right training answers; the layer is chosen on validation."""
    train = data.where("train")
    right = train[data.labels[train] == 0]
    return best(
        [
            judged(measure(data.mean[:, i].double().numpy(), right), data.labels, data.where("validation"), layer=layer)
            for i, layer in enumerate(LAYERS)
        ]
    )


def cosine(states: Array, right: NDArray[np.intp]) -> Array:
    centre = states[right].mean(0)
    values: Array = 1 - states @ centre / (np.linalg.norm(states, axis=1) * np.linalg.norm(centre))
    return values


def mahalanobis(states: Array, right: NDArray[np.intp]) -> Array:
    values: Array = LedoitWolf().fit(states[right]).mahalanobis(states)
    return values


def haloscope(data: Data) -> Scored:
    """arXiv 2409.17504 on last-token states: membership score |mean_j s_j <f, v_j>| of the training answers without
    their labels; pseudo-labels above a quantile of it; a network with one hidden layer trained on those. Layer,
    components, sign and quantile on validation. Smaller than the paper's: 256 units and 9 quantiles (1024 and 38)."""
    train, validation, labels = data.where("train"), data.where("validation"), data.labels
    candidates = []
    for index, layer in enumerate(LAYERS[1:], 1):
        states = data.last[:, index].double().numpy()
        centred = states - states[train].mean(0)
        _, sizes, directions = np.linalg.svd(centred[train], full_matrices=False)
        for count in range(1, 11):
            values = np.abs((centred @ directions[:count].T * sizes[:count]).mean(1))
            candidates += [
                judged(s * values, labels, validation, layer=layer, components=count, sign=s) for s in (1, -1)
            ]
    membership = best(candidates)
    states = data.last[:, LAYERS.index(membership.choice["layer"])].double().numpy()
    states = (states - states[train].mean(0)) / (states[train].std(0) + 1e-6)
    found = []
    for quantile in np.arange(1, 10) / 10:
        pseudo = membership.values[train] > np.quantile(membership.values[train], quantile)
        network = MLPClassifier((256,), batch_size=256, max_iter=30, alpha=3e-4, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 30 epochs are not convergence
            values = network.fit(states[train], pseudo).predict_proba(states)[:, 1]
        found.append(judged(values, labels, validation, **membership.choice, quantile=float(quantile)))
    return best(found)


def attention_laplacian(data: Data) -> Scored:
    """LapEigvals, arXiv 2502.17598: the k largest per head and block, PCA to 512, logistic regression."""
    spectra = torch.stack([answer.laplacian for answer in data.answers])
    train = data.where("train")
    components = min(512, len(train) - 1)
    return best(
        [
            probe(
                spectra[..., :top].flatten(1).numpy(),
                data.labels,
                train,
                data.where("validation"),
                components=components if spectra[0, ..., :top].numel() > components else None,
                k=top,
            )
            for top in TOPS
        ]
    )


def lookback_ratios(data: Data) -> Scored:
    """Lookback Lens, arXiv 2407.07071: attention to the prompt over attention to prompt and answer, averaged over the
    answer, per block and head; logistic regression."""
    return _probe(data, np.stack([rows.double().mean(0).numpy() for rows in lookback(data)]))


def single_descriptor(data: Data) -> Scored:
    """The best of all, of its mean and its last value, in either direction; chosen on training and validation
    together, since nothing is fitted."""
    known = np.concatenate([data.where("train"), data.where("validation")])
    names = [f"{layer}.{name}" for layer in LAYERS[1:] for name in DESCRIPTORS]
    tables = {
        "mean": np.stack([rows.double().mean(0).numpy() for rows in data.descriptors]),
        "last": np.stack([rows[-1].double().numpy() for rows in data.descriptors]),
    }
    found = []
    for kind, table in tables.items():
        for column, name in enumerate(names):
            area = float(auroc(table[known, column], data.labels[known]))
            sign = 1 if area >= 0.5 else -1
            choice = {"descriptor": name, "taken": kind, "sign": sign}
            found.append(Scored(sign * table[:, column], choice, max(area, 1 - area)))
    chosen = best(found)
    chosen.validation = float(auroc(chosen.values[data.where("validation")], data.labels[data.where("validation")]))
    return chosen


def averaged(sequences: list[Tensor]) -> Array:
    """(n, 2 F): mean over the tokens, and the last token's."""
    return np.stack([torch.cat([rows.double().mean(0), rows[-1].double()]).numpy() for rows in sequences])


def _probe(data: Data, features: Array) -> Scored:
    return probe(features, data.labels, data.where("train"), data.where("validation"))
