"""EigenTrack: the spectrum of a language model's hidden states, watched while it generates."""

from eigentrack.clock import Overhead
from eigentrack.errors import (
    CallbackError,
    EigenTrackError,
    FileFormatError,
    MismatchError,
    TapError,
    UnsupportedGenerationError,
    UnsupportedModelError,
)
from eigentrack.files import Settings
from eigentrack.monitor import EigenTrack
from eigentrack.recording import Recording, load
from eigentrack.reference import Reference
from eigentrack.step import Step

__all__ = [
    "CallbackError",
    "EigenTrack",
    "EigenTrackError",
    "FileFormatError",
    "MismatchError",
    "Overhead",
    "Recording",
    "Reference",
    "Settings",
    "Step",
    "TapError",
    "UnsupportedGenerationError",
    "UnsupportedModelError",
    "load",
]
