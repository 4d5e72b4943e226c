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
    """Descriptors or a model do not fit the reference or detector: other names, settings, or too few to make one."""


class NotFittedError(EigenTrackError, RuntimeError):
    """A detector is asked for what it has not learnt yet."""


class ServingError(EigenTrackError, RuntimeError):
    """vLLM cannot be watched as it is: another version, or set to do what the plugin does not follow."""
