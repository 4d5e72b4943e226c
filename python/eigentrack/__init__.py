"""EigenTrack: the spectrum of a language model's hidden states, watched while it generates."""

from eigentrack.errors import EigenTrackError, TapError, UnsupportedGenerationError, UnsupportedModelError
from eigentrack.monitor import EigenTrack, Overhead

__all__ = [
    "EigenTrack",
    "EigenTrackError",
    "Overhead",
    "TapError",
    "UnsupportedGenerationError",
    "UnsupportedModelError",
]
