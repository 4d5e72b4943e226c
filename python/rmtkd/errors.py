"""Typed errors of RMT-KD."""

from rmtkernels.errors import RmtkernelsError


class RmtkdError(RmtkernelsError):
    """Base of RMT-KD's errors."""


class ConfigError(RmtkdError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class ModelError(RmtkdError, TypeError):
    """The model cannot be compressed in this way: no known family, or no module that matches."""


class CalibrationError(RmtkdError, ValueError):
    """Calibration data cannot be used: no batches, no rows, not finite, or batches the model does not take."""


class PlanError(RmtkdError, ValueError):
    """A plan does not fit the model it is applied to."""


class FileFormatError(RmtkdError, ValueError):
    """A file is not what it should be: of another kind, damaged, contradicting itself, or of a newer version."""


class TrainingError(RmtkdError, ValueError):
    """Training cannot start or go on: no batches, no labels, logits that do not fit, or a loss that is not finite."""


class ResumeError(RmtkdError, ValueError):
    """A folder holds the checkpoints of another run."""
