"""How strange descriptors are beside those of ordinary text: a score that needs no labels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eigentrack.errors import FileFormatError, MismatchError
from eigentrack.files import Settings, read, settings_fields, settings_of, write
from eigentrack.step import Step

KIND, VERSION = "eigentrack.reference", 1
POOLED = 50  # values behind each median, at least
FOLDS = 5
CLIP = 3.0  # no descriptor counts for more than this many deviations
FLOOR, SPREAD_FLOOR = 1e-3, 0.1
QUANTILES = 1001
DTYPES = {
    "median": torch.float32,
    "scale": torch.float32,
    "counts": torch.int64,
    "quantiles": torch.float32,
    "used": torch.bool,
}


class Watched(Protocol):
    """What a Recording and an EigenTrack have in common."""

    @property
    def descriptors(self) -> Tensor: ...

    @property
    def watched(self) -> Tensor: ...

    @property
    def settings(self) -> Settings: ...


@dataclass(frozen=True, eq=False)
class Reference:
    """Medians and deviations of the descriptors of ordinary text, for windows of 1, 2, ... N activations.

    The score of a step is the root mean square over the descriptors of z = (x - median) / scale, clipped to ±3 so that
    one descriptor alone cannot decide. It is about 1 for ordinary text, at most 3, higher = stranger. Descriptors are
    taken one by one: what several say together counts several times, and an odd combination of ordinary values is not
    seen. It knows nothing of truth, and docs/eigentrack.md says what beats it.

    Attributes:
        median, scale: (N, F) float32; row n - 1 belongs to windows of n activations. NaN for windows fuller than any of
            the reference's.
        counts: (N,) int64, values behind each row.
        quantiles: (1001,) float32, from least to highest, of the scores that the reference's tokens get from a
            reference made without their fifth of the texts.
        used: (F,) bool, which descriptors count.
        settings: of the monitor it was made with.

    Source: ours. Robust z-scores as in Iglewicz and Hoaglin (1993).
    """

    median: Tensor
    scale: Tensor
    counts: Tensor
    quantiles: Tensor
    used: Tensor
    settings: Settings
    _on_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _checked: Settings | None = field(default=None, init=False, repr=False)

    @staticmethod
    def fit(recordings: Iterable[Watched], only: Sequence[str] = ()) -> "Reference":
        """From recordings of ordinary text, made with the settings that will be used later; a few thousand tokens.

        A window still filling differs from a full one, so each level has statistics of its own, from its values and
        those of the levels nearest to it, as many as it takes to have 50; a level beyond the fullest of the reference
        has none, so that length alone is never strange. scale = 1.4826 MAD + 0.1 s + 0.001, where s is the range that
        holds nine tenths of the values, over 3.29 (the deviation, if they were normal): a count that is mostly the
        same, or a constant, has a MAD of 0.

        Args:
            recordings: Recordings, or EigenTracks that have watched.
            only: the descriptors that count, as in `rmtkernels.DESCRIPTORS` or as in `names`; by default all.

        Raises:
            MismatchError: if the recordings' settings differ, there are too few tokens or texts, or no descriptor has
                a name in `only`.
        """
        values, levels, groups = [], [], []
        settings: Settings | None = None
        sequences = 0
        for recording in recordings:
            settings = settings or recording.settings
            _check_settings(settings, recording.settings)
            descriptors, watched = recording.descriptors.cpu(), recording.watched.cpu()
            usable = watched & descriptors.isfinite().all(-1)
            group = torch.arange(sequences, sequences + len(watched))[:, None].expand_as(watched)
            sequences += len(watched)
            values.append(descriptors[usable])
            levels.append(_rows(watched, settings.window)[usable])
            groups.append(group[usable] % FOLDS)
        if settings is None:
            raise MismatchError("a reference needs recordings of ordinary text, got none")
        pool, level, fold = torch.cat(values), torch.cat(levels), torch.cat(groups)
        least = len(pool) - int(fold.bincount().max()) if len(pool) else 0
        if least < POOLED:
            raise MismatchError(
                f"a reference needs several texts, and {POOLED} watched tokens without any fifth of them, got {least}: "
                "record more text"
            )
        used = _used(settings.names, only)

        def made(chosen: Tensor, quantiles: Tensor) -> Reference:
            statistics = _statistics(pool[chosen], level[chosen], settings.window)
            return Reference(*statistics, quantiles, used, settings)

        held_out = []
        for one in fold.unique():
            rest = made(fold != one, torch.empty(0))
            held_out.append(rest._distance(pool[fold == one], level[fold == one]))
        found = torch.cat(held_out)
        quantiles = np.quantile(found[~found.isnan()].numpy(), np.linspace(0, 1, QUANTILES))
        return made(fold >= 0, torch.from_numpy(quantiles).float())

    def score(self, watched: Watched | Tensor) -> Tensor:
        """(B, T) float32 on the descriptors' device; NaN where a sequence was not watched, or its window is fuller
        than any of the reference's: a limit is then not exceeded.

        Args:
            watched: an EigenTrack, a Recording, or (B, T, F) descriptors that begin with an empty window.

        Raises:
            MismatchError: if settings differ from the reference's, or descriptors are not (B, T, F).
        """
        if isinstance(watched, Tensor):
            descriptors = watched
            if descriptors.dim() != 3 or descriptors.shape[2] != self.median.shape[1]:
                raise MismatchError(
                    f"descriptors must be (B, T, {self.median.shape[1]}), got {tuple(descriptors.shape)}"
                )
            mask = ~descriptors.isnan().all(-1)
        else:
            _check_settings(self.settings, watched.settings)
            descriptors, mask = watched.descriptors, watched.watched
        return self._distance(descriptors, _rows(mask, self.settings.window))

    def score_step(self, step: Step) -> Tensor:
        """(B,) float32: the same for one step while the model generates, as `track.stop_when` wants it.

        Cheap: 30 µs for the 240 descriptors of ten layers on one CPU core, and as much again for the Step itself.

        Raises:
            MismatchError: if settings differ from the reference's, or the step has another number of descriptors.
        """
        if step.descriptors.shape[1] != self.median.shape[1]:
            raise MismatchError(
                f"the reference has {self.median.shape[1]} descriptors, the step {step.descriptors.shape[1]}: "
                "use the settings it was made with"
            )
        if step.settings is not None and step.settings is not self._checked:
            _check_settings(self.settings, step.settings)
            object.__setattr__(self, "_checked", step.settings)  # one look per monitor, not per token
        return self._distance(step.descriptors, step.rows)

    def threshold(self, share: float) -> float:
        """The score that this share of ordinary tokens exceeds, 0 to 1: where to begin with a limit.

        Found on the reference's own texts, each fifth of them scored by the rest; a hundred texts or more make it firm.

        Raises:
            MismatchError: if share is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise MismatchError(f"share must be from 0 to 1, got {share}")
        return float(np.interp(1 - share, np.linspace(0, 1, QUANTILES), self.quantiles.numpy()))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all; `Reference.load` gives back the same bits.

        Raises:
            OSError: if it cannot be written, or `path` names no file.
        """
        tensors = {name: getattr(self, name) for name in DTYPES}
        write(path, KIND, VERSION, tensors, {"settings": settings_fields(self.settings)})

    @staticmethod
    def load(path: str | Path) -> "Reference":
        """The reference in a file that `save` wrote.

        Raises:
            FileFormatError: if the file is not a reference, is damaged, contradicts itself, or is of a newer version.
            OSError: if it cannot be read.
        """
        tensors, described = read(path, KIND, VERSION, DTYPES)
        settings = settings_of(described.get("settings"), path)
        shape = settings.window, len(settings.names)
        wanted = {"median": shape, "scale": shape, "counts": shape[:1], "quantiles": (QUANTILES,), "used": shape[1:]}
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != wanted[name]:
                raise FileFormatError(
                    f"{path} contradicts itself: {name} is {tuple(tensor.shape)}, its settings say {wanted[name]}"
                )
        known = tensors["counts"] > 0
        if not tensors["used"].any():
            raise FileFormatError(f"{path} contradicts itself: no descriptor is used")
        scale, median, quantiles = tensors["scale"][known], tensors["median"][known], tensors["quantiles"]
        if not (scale > 0).all() or not scale.isfinite().all() or not median.isfinite().all():
            raise FileFormatError(f"{path} contradicts itself: a deviation is not positive, or a value not finite")
        if (tensors["counts"] < 0).any():
            raise FileFormatError(f"{path} contradicts itself: a count is negative")
        if not quantiles.isfinite().all() or not (quantiles.diff() >= 0).all():
            raise FileFormatError(f"{path} contradicts itself: quantiles must be finite and ascend")
        return Reference(**tensors, settings=settings)

    def _distance(self, descriptors: Tensor, rows: Tensor) -> Tensor:
        """(..., F) descriptors of windows of (...) activations -> (...)."""
        device = descriptors.device
        if device not in self._on_device:
            index = self.used.nonzero()[:, 0]
            self._on_device[device] = (
                index.to(device),
                self.median[:, index].to(device),
                self.scale[:, index].to(device),
            )
        index, median, scale = self._on_device[device]
        level = (rows - 1).clamp_(min=0)
        z = (descriptors[..., index] - median[level]).div_(scale[level]).clamp_(-CLIP, CLIP)
        return z.square_().mean(-1).sqrt_()


def _used(names: Sequence[str], only: Sequence[str]) -> Tensor:
    """(F,) bool: the descriptors named, in full or by their last part; all if none is."""
    known = {*names, *(name.rpartition(".")[2] for name in names)}
    unknown = [name for name in only if name not in known]
    if isinstance(only, str) or unknown:
        raise MismatchError(f"only must list names of descriptors, got {only!r}; there are {', '.join(sorted(known))}")
    return torch.tensor([not only or name in only or name.rpartition(".")[2] in only for name in names])


def _rows(watched: Tensor, window: int) -> Tensor:
    """(B, T): how many activations each window holds."""
    return watched.cumsum(1).clamp_(max=window)


def _statistics(pooled: Tensor, levels: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Median and scale (N, F) and the number of values behind them (N,)."""
    values, level = pooled.double().numpy(), levels.numpy()
    shape = window, values.shape[1]
    medians, scales, counts = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(window, np.int64)
    for row in range(int(level.max())):
        distance = abs(level - 1 - row)
        pool = values[distance <= np.sort(distance)[POOLED - 1]]
        medians[row] = np.median(pool, axis=0)
        low, high = np.quantile(pool, (0.05, 0.95), axis=0)
        deviation = 1.4826 * np.median(abs(pool - medians[row]), axis=0)
        scales[row] = deviation + SPREAD_FLOOR * (high - low) / 3.29 + FLOOR
        counts[row] = len(pool)
    return torch.from_numpy(medians).float(), torch.from_numpy(scales).float(), torch.from_numpy(counts)


def _check_settings(ours: Settings, theirs: Settings) -> None:
    """Raises MismatchError if descriptors made with these settings cannot be compared."""
    # Names of separate spectra tell their layers; those of a joint one do not.
    free = {"end_tokens"} | ({"taps", "layers", "layer_scale"} if ours.spectra == "per_layer" else set())
    for name in (one.name for one in fields(Settings) if one.name not in free):
        one, other = getattr(ours, name), getattr(theirs, name)
        if one != other:
            shown = "the descriptors" if name == "names" else f"{name} {one!r} and {other!r}"
            raise MismatchError(
                f"what the monitors of reference and text were set to differs: {shown}; record both with one setting"
            )
