"""The detector: a small recurrent network that turns descriptors over time into a risk per token."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eigentrack import detector_file
from eigentrack.calibration import METHODS, Calibration, fit_map, threshold_for, uncalibrated
from eigentrack.detector_file import MAX_UNITS, Parts
from eigentrack.errors import MismatchError, NotFittedError
from eigentrack.files import Settings
from eigentrack.identity import ModelIdentity
from eigentrack.matching import (
    check_names,
    checked,
    columns_of,
    common_window,
    labelled,
    need_both_classes,
    shape_of,
)
from eigentrack.network import CELLS, Network, Stepper, padded
from eigentrack.reference import Watched
from eigentrack.standardisation import Standardisation
from eigentrack.training import Plan, TrainingHistory, one_thread, split_by_item, train

CLIP = 5.0
SCORED_AT_ONCE = 128


def _full_precision() -> torch.autocast:
    """Whatever autocast the caller is in."""
    return torch.autocast("cpu", enabled=False)


class Detector:
    """Risk per token from spectral descriptors: linear projection, one recurrent layer, a head.

    The risk is the probability that a sequence is of class 1, seen from its first t tokens; higher = riskier. What that
    class is, the labels say. Before `calibrate` the probability is the network's own, for classes of equal size; after
    it, that of the sequences calibrated on, with as many of class 1 as there were among them.

    A row that is NaN in all descriptors stands for a step in which the sequence took no part: its risk is NaN, and the
    sequence goes on behind it as if it were not there. A single NaN counts as the descriptor's mean.

    Args:
        names: of the F descriptors, as `EigenTrack.names`; some of them are enough.
        window: N of the windows that they describe; None if it is not to be checked.
        settings: of the monitor (`track.settings`, `recording.settings`); EigenTrack takes its own from them.
        model: the language model (`ModelIdentity.of(model, tokenizer)`), to be checked when the detector is attached.
        cell: "rnn", "gru" or "lstm".
        hidden, projection: their widths.
        clip: standardised descriptors count for at most so many deviations.

    Raises:
        MismatchError: if names repeat, are not among those of the settings, or a width or the window is impossible.

    Source: EigenTrack (arXiv 2509.15735) sections III-A and IV; hidden size 16 is the paper's.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        window: int | None = None,
        settings: Settings | None = None,
        model: ModelIdentity | None = None,
        cell: str = "gru",
        hidden: int = 16,
        projection: int = 16,
        clip: float = CLIP,
    ) -> None:
        check_names(names, settings)
        window = common_window(window, settings)
        if cell not in CELLS:
            raise MismatchError(f"cell must be one of {', '.join(map(repr, CELLS))}, got {cell!r}")
        for name, units in (("hidden", hidden), ("projection", projection)):
            if type(units) is not int or not 1 <= units <= MAX_UNITS:
                raise MismatchError(f"{name} must be 1 to {MAX_UNITS}, got {units!r}")
        if not 0 < clip < float("inf"):
            raise MismatchError(f"clip must be above 0, got {clip!r}")
        self.names, self.window, self.settings, self.model = list(names), window, settings, model
        self.cell, self.hidden, self.projection, self.clip = cell, hidden, projection, float(clip)
        self._network: Network | None = None
        self._standardisation: Standardisation | None = None
        self._calibration = uncalibrated()
        self._steppers: dict[tuple[torch.device, tuple[str, ...] | None], Stepper] = {}

    @property
    def fitted(self) -> bool:
        """Whether there are weights."""
        return self._network is not None

    @property
    def calibrated(self) -> bool:
        """Whether there is a threshold."""
        return self._calibration.method is not None

    @property
    def parameters(self) -> int:
        """How many there are, or will be."""
        with torch.device("meta"):  # draws no random numbers
            network = Network(len(self.names), self.cell, self.hidden, self.projection)
        return sum(parameter.numel() for parameter in network.parameters())

    @property
    def threshold(self) -> float:
        """The risk that a right sequence's highest exceeds with a probability of at most `false_alarms`.

        Raises:
            NotFittedError: before `calibrate`.
        """
        if not self.calibrated:
            raise NotFittedError("the detector has no threshold yet: call calibrate on sequences that fit did not see")
        return self._calibration.threshold

    @property
    def calibration(self) -> Calibration:
        """The map from logits to risks."""
        return self._calibration

    # Learning

    def fit(
        self,
        sequences: Sequence[Tensor],
        labels: Sequence[int] | Tensor,
        *,
        items: Sequence[Hashable] | None = None,
        validation: float | tuple[Sequence[Tensor], Sequence[int] | Tensor] = 0.2,
        epochs: int = 100,
        patience: int = 10,
        batch_size: int = 64,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-4,
        seed: int = 0,
        progress: bool = True,
    ) -> TrainingHistory:
        """Trains from scratch; same data and seed, same bits, on one machine (it uses one thread).

        Every token is trained towards its sequence's label; tokens are averaged within a sequence, and both classes
        count the same. Training ends when the validation loss (which changes less by chance than the AUROC of a few
        hundred sequences) has not fallen for `patience` epochs, and the weights of its lowest are kept. An earlier
        calibration is forgotten. Adam; gradients of norm above 1 are shortened to it.

        Args:
            sequences: (T_i, F) descriptors, one row per token.
            labels: 0 (right, ordinary) or 1 for each.
            items: where each sequence comes from: those of one item are all trained on, or all held out. Not needed
                with validation sequences of your own.
            validation: the share of items to hold out, or (sequences, labels).
            epochs: at most.
            patience, batch_size, learning_rate, weight_decay: as usual.
            seed: of first weights, of the split and of the order.
            progress: show a bar (needs tqdm).

        Raises:
            MismatchError: if the data do not fit each other or the detector, or one class is missing.
        """
        plan = Plan(epochs, patience, batch_size, learning_rate, weight_decay, seed, progress)
        given = labelled(sequences, labels, len(self.names))
        generator = torch.Generator().manual_seed(seed)
        history = TrainingHistory()
        if isinstance(validation, tuple):
            held = labelled(*validation, len(self.names))
            if not held.sequences:
                raise MismatchError("validation has no sequences")
        else:
            train_part, held_part = split_by_item(items, given.labels, validation, generator)
            history.train_indices, history.validation_indices = train_part, held_part
            given, held = given.subset(train_part), given.subset(held_part)
        need_both_classes(given, "training")
        with one_thread(), torch.inference_mode(False), torch.enable_grad(), _full_precision():
            standardisation = Standardisation.fit(given.sequences, self.clip, generator)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch every GPU's as well
                network = Network(len(self.names), self.cell, self.hidden, self.projection)
            train(network, standardisation, given, held, plan, history)
        self._take(network.requires_grad_(False), standardisation, uncalibrated())
        return history

    def calibrate(
        self,
        sequences: Sequence[Tensor],
        labels: Sequence[int] | Tensor,
        *,
        false_alarms: float = 0.05,
        method: str = "platt",
    ) -> float:
        """Makes risks probabilities and finds the threshold, which it returns, on sequences that `fit` did not see.

        The threshold is one for the running maximum of the risk, which is what stops a sequence: at most `false_alarms`
        of right sequences ever exceed it, if they are drawn as those given, and as long as they (a longer sequence has
        more tokens to exceed it). "platt" keeps the order of risks; "isotonic" assumes no shape, needs more data (a
        thousand sequences), and gives equal risks to tokens that it cannot tell apart.

        Raises:
            NotFittedError: before `fit`.
            MismatchError: if the data do not fit, a class is missing, or they are too few for so low a rate.
        """
        self._fitted()
        if method not in METHODS:
            raise MismatchError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
        data = labelled(sequences, labels, len(self.names))
        need_both_classes(data, "calibration")
        threshold_for(data.labels[data.labels == 0], false_alarms)  # says so before anything has changed
        logits = self._logits(data.sequences)
        found = fit_map(logits, data.labels, method)
        highest = torch.stack([found(logits[i]).max() for i in range(len(logits)) if data.labels[i] == 0])
        threshold = threshold_for(highest, false_alarms)
        self._calibration = replace(found, threshold=threshold, false_alarms=false_alarms)
        self._steppers = {}
        return threshold

    # Judging

    def score(self, sequences: Sequence[Tensor] | Tensor | Watched) -> Any:
        """Risks of every token, from those before it and itself.

        Args:
            sequences: list of (T_i, F) descriptors, for a list of (T_i,) float32 risks on their devices; or (B, T, F)
                with NaN where a sequence took no part, for (B, T); or an EigenTrack or a Recording, likewise.

        Raises:
            NotFittedError: before `fit`.
            MismatchError: if shapes, names or settings do not fit.
        """
        self._fitted()
        if not isinstance(sequences, Tensor | Sequence):
            sequences = sequences.descriptors[..., self.columns(sequences.settings)]
        if isinstance(sequences, Tensor):
            if sequences.dim() != 3:
                raise MismatchError(f"sequences must be (B, T, {len(self.names)}), got {shape_of(sequences)}")
            scored = self.score(list(sequences))
            return torch.stack(scored) if scored else sequences.new_empty(sequences.shape[:2], dtype=torch.float32)
        given = [checked(sequence, i, len(self.names)) for i, sequence in enumerate(sequences)]
        present = [~sequence.isnan().all(1) for sequence in given]
        kept = [sequence[mask] for sequence, mask in zip(given, present, strict=True)]
        risks = []
        for sequence, mask, logits in zip(sequences, present, self._logits(kept), strict=True):
            risk = torch.full((len(mask),), torch.nan)
            risk[mask] = self._calibration(logits)
            risks.append(risk.to(sequence.device))
        return risks

    def step(self, descriptors: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token of each sequence, on any device.

        Args:
            descriptors: (B, F); a row of NaN for who took no part.
            state: what the step before returned; None at the beginning. It is not changed.

        Returns:
            (B,) risks, and the state to give to the next step.

        Raises:
            NotFittedError: before `fit`.
            MismatchError: if shapes do not fit.
        """
        stepper = self.stepper(descriptors.device)
        if descriptors.dim() != 2 or descriptors.shape[1] != len(self.names):
            raise MismatchError(f"descriptors must be (B, {len(self.names)}), got {shape_of(descriptors)}")
        if state is None:
            state = stepper.start(len(descriptors))
        elif state.shape != (len(descriptors), stepper.state_width):
            raise MismatchError(
                f"the state must be ({len(descriptors)}, {stepper.state_width}), got {shape_of(state)}: begin with None"
            )
        descriptors = descriptors.detach()
        absent = descriptors.isnan().all(1, keepdim=True)
        risk, state = stepper(descriptors, state, absent)
        return risk.masked_fill_(absent, torch.nan).squeeze(1), state

    def stepper(self, device: torch.device, settings: Settings | None = None) -> Stepper:
        """The network for single steps on a device, of monitors with these settings.

        Raises:
            NotFittedError: before `fit`.
            MismatchError: if names or settings do not fit.
        """
        network, standardisation = self._fitted()
        key = device, None if settings is None else settings.names
        if key not in self._steppers:
            columns = range(len(self.names)) if settings is None else self.columns(settings)
            width = len(self.names) if settings is None else len(settings.names)
            self._steppers[key] = Stepper(network, standardisation, self._calibration, columns, width, device)
        return self._steppers[key]

    # Fitting a monitor and its model

    def columns(self, settings: Settings) -> list[int]:
        """Where this detector's descriptors are among those of a monitor.

        Raises:
            MismatchError: if one is missing, or the monitor makes them in another way.
        """
        return columns_of(self.names, self.window, self.settings, settings)

    def check_model(self, model: nn.Module, tokenizer: Any = None, *, stacklevel: int = 2) -> None:
        """Refuses a model that this detector is not for; warns if only its weights are others.

        Raises:
            MismatchError: if architecture, width, depth or vocabulary differ, or the tokenizer where both are known.
        """
        if self.model is None:
            return
        found = ModelIdentity.of(model, tokenizer)
        differences = self.model.differences(found)
        if differences:
            raise MismatchError(f"the detector is for another model than this: {'; '.join(differences)}")
        if found.weights != self.model.weights:
            warnings.warn(
                "the detector was trained on a model of this architecture with other weights: its risks are not "
                "calibrated for this one",
                RuntimeWarning,
                stacklevel=stacklevel,
            )

    # Keeping

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `detector.safetensors` into the folder, whole or not at all: weights, and JSON that describes them.

        Raises:
            NotFittedError: before `fit`.
            FileFormatError: if the names take more than a megabyte.
            OSError: if it cannot be written.
        """
        network, standardisation = self._fitted()
        detector_file.save(
            folder,
            Parts(
                tuple(self.names),
                self.window,
                self.settings,
                self.model,
                network,
                standardisation,
                self._calibration,
            ),
        )

    @staticmethod
    def from_pretrained(name: str | Path) -> "Detector":
        """The detector in a folder that `save_pretrained` wrote, or else the one of this name that the package ships.

        Raises:
            FileFormatError: if the file is not a detector, is damaged, contradicts itself, or is of a newer version.
            OSError: if it cannot be read, or there is none.
        """
        parts = detector_file.load(name)
        network = parts.network
        detector = Detector(
            parts.names,
            window=parts.window,
            settings=parts.settings,
            model=parts.model,
            cell=network.cell,
            hidden=network.recurrent.hidden_size,
            projection=network.recurrent.input_size,
            clip=parts.standardisation.clip,
        )
        detector._take(network, parts.standardisation, parts.calibration)
        return detector

    # Within

    def _take(self, network: Network, standardisation: Standardisation, calibration: Calibration) -> None:
        self._network, self._standardisation, self._calibration = network.eval(), standardisation, calibration
        self._steppers = {}

    def _fitted(self) -> tuple[Network, Standardisation]:
        if self._network is None or self._standardisation is None:
            raise NotFittedError("the detector knows nothing yet: call fit, or load one with Detector.from_pretrained")
        return self._network, self._standardisation

    @torch.no_grad()
    @_full_precision()
    def _logits(self, sequences: list[Tensor]) -> list[Tensor]:
        """(T_i,) each, of sequences without absent rows."""
        network, standardise = self._fitted()
        found: list[Tensor] = []
        for start in range(0, len(sequences), SCORED_AT_ONCE):
            part = sequences[start : start + SCORED_AT_ONCE]
            batch, _ = padded(part)
            logits = network(standardise(batch)) if batch.shape[1] else batch.new_empty(batch.shape[:2])
            found.extend(one[: len(sequence)] for one, sequence in zip(logits, part, strict=True))
        return found
