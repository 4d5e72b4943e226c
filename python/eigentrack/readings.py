"""What the user reads of a monitor."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from eigentrack.errors import EigenTrackError
from eigentrack.files import Settings
from eigentrack.recording import Recording, current_versions
from eigentrack.report import runs_of, write_report
from eigentrack.windows import Windows

if TYPE_CHECKING:
    from eigentrack.detector import Detector


class Readings:
    """The readable side of an EigenTrack: the last request's values, and what the monitor is set to."""

    detector: "Detector | None"
    _settings: Settings
    _windows: Windows

    @abstractmethod
    def _read(self, name: str) -> Tensor: ...

    @abstractmethod
    def _settle(self) -> None: ...

    @property
    def names(self) -> list[str]:
        """Names of the F descriptors: "layer12.entropy", "layer12.mlp.entropy" for tap="mlp", "entropy" if joint."""
        return list(self._settings.names)

    @property
    def descriptors(self) -> Tensor:
        """(B, T, F) float32; [:, t] belongs to the token fed at step t. NaN where a sequence was not watched."""
        return self._read("descriptors").flatten(2)

    @property
    def risk(self) -> Tensor:
        """(B, T) float32: the detector's risk behind the token fed at step t, higher = riskier; NaN likewise.

        Raises:
            EigenTrackError: if there is no detector, or nothing has been watched yet.
        """
        if self.detector is None:
            raise EigenTrackError("no risk without a detector: EigenTrack(model, detector=...)")
        return self._read("risk")

    @property
    def eigenvalues(self) -> Tensor:
        """(B, T, S, N) float32, largest first, S the number of watched layers, or 1 for joint spectra."""
        return self._read("eigenvalues")

    @property
    def tokens(self) -> Tensor:
        """(B, T) int64: the token fed at each step; -1 where the model was fed embeddings."""
        return self._read("tokens")

    @property
    def watching(self) -> bool:
        """Whether a token of the running request has been watched yet; until then there is nothing to read."""
        self._settle()
        return self._windows.steps > 0

    @property
    def steps(self) -> int:
        """T: steps of the running request watched so far."""
        self._settle()
        return self._windows.steps

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: how many steps of each sequence were watched."""
        return self._read("watched").sum(1)

    @property
    def watched(self) -> Tensor:
        """(B, T) bool: in which steps each sequence took part."""
        return self._read("watched")

    def recording(self) -> Recording:
        """The request as it stands, copied to the CPU.

        Raises:
            EigenTrackError: if nothing has been watched yet.
        """
        values = {name: getattr(self, name).cpu() for name in ("descriptors", "eigenvalues", "tokens", "watched")}
        risk = None if self.detector is None else self.risk.cpu()
        return Recording(**values, settings=self.settings, versions=current_versions(), risk=risk)

    def save(self, path: str | Path) -> None:
        """Writes the request as it stands to one safetensors file, whole or not at all; read it with `eigentrack.load`.

        Raises:
            EigenTrackError: if nothing has been watched yet.
            OSError: if the file cannot be written, or `path` names no file.
        """
        self.recording().save(path)

    def report(self, path: str | Path, tokenizer: Any = None, prompts: Sequence[str] | None = None) -> None:
        """Writes the request as it stands to one HTML page that loads nothing: tokens coloured by risk, descriptors,
        eigenvalues, and where the detector's threshold would have stopped it.

        Args:
            path: of the page.
            tokenizer: for the tokens' text; without it they are numbers.
            prompts: of each sequence, to be shown above it.

        Raises:
            EigenTrackError: if nothing has been watched yet.
            MismatchError: if there are not as many prompts as sequences.
            OSError: if the file cannot be written, or `path` names no file.
        """
        threshold = self.detector.threshold if self.detector is not None and self.detector.calibrated else None
        write_report(path, runs_of(self.recording(), tokenizer, prompts, threshold))

    # What the monitor is set to

    @property
    def settings(self) -> Settings:
        """What this monitor is set to: what `save` writes beside the values."""
        return self._settings

    @property
    def window(self) -> int:
        """As given, and so are the next six: what a monitor is set to stays so."""
        return self._settings.window

    @property
    def spectra(self) -> str:
        return self._settings.spectra

    @property
    def start(self) -> str:
        return self._settings.start

    @property
    def normalize(self) -> str | None:
        return self._settings.normalize

    @property
    def center(self) -> bool:
        return self._settings.center

    @property
    def noise(self) -> str:
        return self._settings.noise

    @property
    def layer_scale(self) -> str:
        return self._settings.layer_scale
