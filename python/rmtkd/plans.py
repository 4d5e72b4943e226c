"""Plan and LayerPlan: what `plan` found, as a table, as JSON and as a picture."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from rmtkd.config import NOISE, Config
from rmtkd.decoding import decode
from rmtkd.errors import FileFormatError
from rmtkd.rank import Choice
from rmtkd.table import aligned, change, count

FORMAT, VERSION = "rmtkd.plan", 1
_LONGEST_NAME = 44


@dataclass(frozen=True)
class LayerPlan:
    """What is planned for a group: a layer in factor mode, activations with one covariance in width mode.

    Attributes:
        name: of the group. width: the setting of the model's config that its rank becomes; "" if it keeps its own.
        choice: the spectrum's verdict on this group alone.
        rank: of what is kept: `choice.rank`, or the common width.
        kept_energy: share of the trace in the `rank` largest eigenvalues.
        eigenvalues: all d of them, largest first.
        parameters, parameters_projected: of the layer, dense and projected. None in width mode.
        milliseconds, milliseconds_projected: of a forward pass of it. None where it was not measured.
        keep_dense: why the layer stays as it is; "" if it is projected.
    """

    name: str
    width: str
    choice: Choice
    rank: int
    kept_energy: float
    eigenvalues: tuple[float, ...] = field(repr=False)
    parameters: int | None = None
    parameters_projected: int | None = None
    milliseconds: float | None = field(default=None, compare=False)
    milliseconds_projected: float | None = field(default=None, compare=False)
    keep_dense: str = ""

    @property
    def dim(self) -> int:
        """d, the width of the activations."""
        return self.choice.dim


@dataclass(frozen=True)
class Plan:
    """What `compress` will do to a model. Two plans are equal if they say so but for their timings.

    Attributes:
        config: the settings it was made with.
        layers: one per group, in the order in which they run.
        widths: width mode: the new value of each setting of the model's config.
        reasons: width mode: how each width came about.
        skipped: factor mode: layers that `config.modules` names and that cannot be projected, and why.
        model_parameters: of the model, before and after.
        model_milliseconds: of a forward pass of the first calibration batch, before and after. None in factor mode.
        covariances: (d, d) second moments by group. In memory only: a plan read from JSON cannot be carried out.
    """

    config: Config
    layers: tuple[LayerPlan, ...]
    widths: dict[str, int]
    reasons: dict[str, str]
    skipped: dict[str, str]
    model_parameters: tuple[int, int]
    model_milliseconds: tuple[float, float] | None = field(default=None, compare=False)
    covariances: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False, metadata={"json": False})

    def layer(self, name: str) -> LayerPlan:
        """The plan of one group.

        Raises:
            KeyError: if there is none of that name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def table(self) -> str:
        """What a person wants to see of it, in some lines of text."""
        return "\n".join([self.method, "", aligned(self.rows()), "", *self.notes()])

    @property
    def method(self) -> str:
        """How ranks were chosen."""
        noise = self.config.noise + (f" {self.config.quantile:g}" if self.config.noise == "quantile" else "")
        return f"{self.config.mode} mode, ranks by {noise}, rounded up to multiples of {self.config.multiple}"

    def rows(self) -> list[list[str]]:
        """The table's cells, its head first."""
        head = ["layer", "d", "n", "σ²", "edge", *NOISE, "rank", "energy"]
        factors = self.config.mode == "factor"
        head += ["parameters", "ms"] if factors else []
        return [head, *(self._row(layer, factors) for layer in self.layers)]

    def notes(self) -> list[str]:
        """What is to be said below the table, a line each."""
        lines = []
        for name, width in self.widths.items():
            before = max(layer.dim for layer in self.layers if layer.width == name)
            lines.append(f"{name}: {before} → {width} ({self.reasons[name]})")
        if held := [layer.name for layer in self.layers if layer.choice.clamped and not layer.width]:
            lines.append(f"held by min_ratio {self.config.min_ratio:g}: {', '.join(held)}")
        if few := [layer for layer in self.layers if layer.choice.rows < layer.dim]:
            names = f"{few[0].name} and others have" if len(few) > 1 else f"{few[0].name} has"
            lines.append(f"{names} fewer rows than dimensions: calibrate on more data")
        lines += [f"{layer.name} stays dense: {layer.keep_dense}" for layer in self.layers if layer.keep_dense]
        lines += [f"{name} is left out: {reason}" for name, reason in self.skipped.items()]
        first, last = self.model_parameters
        lines.append(f"parameters: {count(first)} → {count(last)} ({change(first, last)})")
        if self.model_milliseconds is not None:
            slow, fast = self.model_milliseconds
            times = f"{slow:.1f} → {fast:.1f}, {slow / fast:.2f} times as fast"
            lines.append(f"milliseconds for the first calibration batch: {times}")
        return lines

    def _row(self, layer: LayerPlan, factors: bool) -> list[str]:
        choice = layer.choice
        method = "quantile" if self.config.noise == "spikes" else self.config.noise
        counts = {**choice.outliers, "spikes": choice.spikes}
        name = layer.name if len(layer.name) <= _LONGEST_NAME else "…" + layer.name[1 - _LONGEST_NAME :]
        row = [
            name,
            str(choice.dim),
            f"{choice.rows:.0f}",
            f"{choice.sigma2[method]:.3g}",
            f"{choice.edges[method]:.3g}",
            *("-" if counts[noise] is None else str(counts[noise]) for noise in NOISE),
            str(layer.rank),
            f"{layer.kept_energy:.1%}",
        ]
        if factors:
            row.append(f"{count(layer.parameters or 0)} → {count(layer.parameters_projected or 0)}")
            measured = layer.milliseconds is not None and layer.milliseconds_projected is not None
            row.append(f"{layer.milliseconds:.2f} → {layer.milliseconds_projected:.2f}" if measured else "-")
        return row

    def to_json(self) -> str:
        """Everything but the covariances."""
        found = asdict(replace(self, covariances={}))
        del found["covariances"]
        return json.dumps({"format": FORMAT, "format_version": VERSION} | found, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises FileFormatError if the text is no plan, or one of another version."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"this plan is not JSON: {error}") from error
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise FileFormatError(f"this is no plan: its format is not {FORMAT}")
        version = found.pop("format_version", None)
        if version != VERSION:
            raise FileFormatError(
                f"this plan has format version {version!r:.20}, this rmtkd reads {VERSION}: plan anew"
            )
        return decode(cls, found, "plan")

    def plot(self, path: str | Path) -> Path:
        """Draws each spectrum with the Marchenko-Pastur law over it, see `rmtkd.plot.plot_plan`."""
        from rmtkd.plot import plot_plan

        return plot_plan(self, path)
