"""EigenTrack: the spectrum of a language model's hidden states, watched while it generates."""

from eigentrack.clock import Overhead
from eigentrack.detector import Detector
from eigentrack.errors import (
    CallbackError,
    EigenTrackError,
    FileFormatError,
    MismatchError,
    NotFittedError,
    TapError,
    UnsupportedGenerationError,
    UnsupportedModelError,
)
from eigentrack.files import Settings
from eigentrack.identity import ModelIdentity
from eigentrack.monitor import EigenTrack
from eigentrack.recording import Recording, load
from eigentrack.reference import Reference
from eigentrack.step import Step
from eigentrack.training import TrainingHistory

__all__ = [
    "CallbackError",
    "Detector",
    "EigenTrack",
    "EigenTrackError",
    "FileFormatError",
    "MismatchError",
    "ModelIdentity",
    "NotFittedError",
    "Overhead",
    "Recording",
    "Reference",
    "Settings",
    "Step",
    "TapError",
    "TrainingHistory",
    "UnsupportedGenerationError",
    "UnsupportedModelError",
    "load",
]
