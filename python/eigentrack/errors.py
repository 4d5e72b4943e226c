"""Typed errors of the monitor."""

from rmtkernels.errors import RmtkernelsError


class EigenTrackError(RmtkernelsError):
    """Base of the monitor's errors."""


class TapError(EigenTrackError, ValueError):
    """The layers to watch cannot be found or do not fit the model."""


class UnsupportedModelError(EigenTrackError, TypeError):
    """The model cannot be watched: it is compiled already, or not decoder-only."""


class UnsupportedGenerationError(EigenTrackError, RuntimeError):
    """The way the model is called cannot be followed: beam search, or generation without a cache."""


class CallbackError(EigenTrackError, TypeError):
    """A function given to the monitor answered with something that cannot be used."""


class FileFormatError(EigenTrackError, ValueError):
    """A file is not what it should be: of another kind, damaged, contradicting itself, or of a newer version."""


class MismatchError(EigenTrackError, ValueError):
    """Descriptors do not fit the reference: other names, another window, other settings, or too few to make one."""
