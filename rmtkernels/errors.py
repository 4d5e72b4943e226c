"""Typed errors. Each is raised before any state changes, and its message says what to do."""


class RmtkernelsError(Exception):
    """Base of every error this package raises on purpose."""


class ShapeError(RmtkernelsError, ValueError):
    """A tensor has the wrong shape, or a size is out of range."""


class DtypeError(RmtkernelsError, TypeError):
    """A tensor has a dtype the operator does not take."""


class DeviceError(RmtkernelsError, ValueError):
    """Tensors that must live on one device do not."""


class RangeError(RmtkernelsError, ValueError):
    """A number lies outside what the operator takes, or what comes out would not fit its dtype."""


class StateError(RmtkernelsError, RuntimeError):
    """What a state has been through does not allow what was asked of it."""


class BackendError(RmtkernelsError, RuntimeError):
    """A backend was asked for that is not there, or none is."""


class MatrixError(RmtkernelsError, ValueError):
    """A matrix holds numbers that the operator does not take: NaN, Inf, or a matrix that must be symmetric is not."""
