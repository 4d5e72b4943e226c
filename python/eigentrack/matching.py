"""Whether a detector, its data and a monitor fit each other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eigentrack.errors import MismatchError
from eigentrack.files import Settings
from eigentrack.training import Labelled
from rmtkernels.ops.sliding_window import MAX_WINDOW

# What a monitor's settings must have in common with the detector's; names are looked up one by one. Names of separate
# spectra tell their layers; those of a joint one do not.
_SHARED = ("spectra", "start", "normalize", "center", "noise")
_SHARED_IF_JOINT = ("taps", "layers", "layer_scale")


def check_names(names: Sequence[str], settings: Settings | None) -> None:
    """Raises MismatchError unless they are distinct names, all among those of the settings if there are any."""
    if isinstance(names, str) or not names or not all(type(name) is str for name in names):
        raise MismatchError(f"names must list the descriptors, got {names!r:.60}")
    if len(set(names)) < len(names):
        raise MismatchError("names of descriptors must differ")
    unknown = sorted(set(names) - set(settings.names)) if settings is not None else []
    if unknown:
        raise MismatchError(f"the settings do not name {unknown[0]!r} among their descriptors")


def common_window(window: int | None, settings: Settings | None) -> int | None:
    """The window that both say.

    Raises:
        MismatchError: if they contradict each other, or it is impossible.
    """
    if settings is not None:
        if window not in (None, settings.window):
            raise MismatchError(f"window {window} contradicts the settings, which say {settings.window}")
        return settings.window
    if window is not None and (type(window) is not int or not 1 <= window <= MAX_WINDOW):
        raise MismatchError(f"window must be 1 to {MAX_WINDOW}, got {window!r}")
    return window


def columns_of(names: Sequence[str], window: int | None, own: Settings | None, theirs: Settings) -> list[int]:
    """Where the descriptors `names` are among those of a monitor with settings `theirs`.

    Raises:
        MismatchError: if one is missing, or the monitor makes them in another way than `own`.
    """
    if window is not None and theirs.window != window:
        raise MismatchError(f"the detector is for windows of {window}, the monitor's are {theirs.window}")
    if own is not None:
        for name in _SHARED + (_SHARED_IF_JOINT if own.spectra == "joint" else ()):
            if getattr(own, name) != getattr(theirs, name):
                raise MismatchError(
                    f"the detector was made with {name} {getattr(own, name)!r}, the monitor has "
                    f"{getattr(theirs, name)!r}"
                )
    places = {name: place for place, name in enumerate(theirs.names)}
    missing = [name for name in names if name not in places]
    if missing:
        raise MismatchError(
            f"the monitor does not make {len(missing)} of the detector's descriptors, {missing[0]!r} among them: "
            "watch the layers it was made with"
        )
    return [places[name] for name in names]


def checked(sequence: Any, index: int, features: int) -> Tensor:
    """A (T, F) sequence on the CPU in float32.

    Raises:
        MismatchError: if it is none.
    """
    if not isinstance(sequence, Tensor) or sequence.dim() != 2 or sequence.shape[1] != features:
        found = shape_of(sequence) if isinstance(sequence, Tensor) else type(sequence).__name__
        raise MismatchError(f"sequence {index} must be a (T, {features}) tensor, got {found}")
    return sequence.detach().to("cpu", torch.float32)


def labelled(sequences: Sequence[Tensor], labels: Sequence[int] | Tensor, features: int) -> Labelled:
    """Sequences without absent rows, and labels as a tensor.

    Raises:
        MismatchError: if they do not fit, a label is neither 0 nor 1, or a sequence has no token.
    """
    values = torch.as_tensor(labels).to("cpu", torch.float32)
    if values.dim() != 1 or len(values) != len(sequences):
        raise MismatchError(f"there are {len(sequences)} sequences and labels of shape {shape_of(values)}")
    if not ((values == 0) | (values == 1)).all():
        raise MismatchError("labels must be 0 or 1")
    kept = []
    for index, sequence in enumerate(sequences):
        rows = checked(sequence, index, features)
        absent = rows.isnan().all(1)
        if absent.all():
            raise MismatchError(f"sequence {index} has no token: leave it out")
        kept.append(rows[~absent] if absent.any() else rows)
    return Labelled(kept, values)


def need_both_classes(data: Labelled, what: str) -> None:
    """Raises MismatchError if one is missing."""
    if len(data.labels.unique()) < 2:
        raise MismatchError(f"{what} needs sequences of both classes")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
