"""plan: what a compression would do, measured on the model and the data, before anything is done."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from rmtkd import factor, processes
from rmtkd.calibration import Batch, as_it_was, calibrate, run
from rmtkd.config import Config
from rmtkd.errors import CalibrationError, ModelError
from rmtkd.groups import Group
from rmtkd.latency import milliseconds
from rmtkd.plans import LayerPlan, Plan
from rmtkd.progress import with_bar
from rmtkd.rank import Choice, choose, kept_energy, round_rank

__all__ = ["LayerPlan", "Plan", "plan"]

_SLOWER = 1.05  # times as slow: what the medians of two equal layers differ by on a busy machine


def plan(model: nn.Module, calibration: Iterable[Batch], config: Config, *, progress: bool = True) -> Plan:
    """What `compress` would do to a model, and why. Changes nothing in the model.

    In factor mode every layer is timed dense and projected, at the shape of its input in the first batch. One that
    would not get smaller, or is measured to be slower, is to stay dense (`LayerPlan.keep_dense`); `config.keep_slower`
    projects the slower ones too. In width mode the whole model is narrowed and timed on the first batch. Timings take
    as many threads as PyTorch has; all other figures are the same each time.

    Args:
        model: any in factor mode, one of the families of docs/rmtkd.md in width mode.
        calibration: batches, see `calibrate`; a list or a loader, because they are read more than once.
        config: settings.
        progress: whether to show a bar.

    Raises:
        ModelError: if the model is of no known family (width mode), or no layer matches `config.modules` (factor mode).
        CalibrationError: as `calibrate`, and if `calibration` can be read only once.
        ConfigError: if `config.noise` is "spikes" and a width is below 512.
    """
    if isinstance(calibration, Iterator):
        raise CalibrationError("calibration batches are read more than once: give a list or a loader, not an iterator")
    groups = _groups(model, config)
    states = calibrate(model, calibration, groups, rows=config.calibration_rows, progress=progress)
    moments = {group.name: states[group.name].covariance(center=False) for group in groups}
    findings = []
    for group in with_bar([group for group in groups if group.ranked], "spectra", progress):
        eigenvalues = torch.linalg.eigvalsh(moments[group.name]).flip(0).cpu()
        choice = choose(eigenvalues.numpy(), states[group.name].effective_rows, config, group.multiple)
        findings.append(_Finding(group, eigenvalues, choice))
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # a loader that shuffles draws from the global state
        batch = next(iter(calibration))
    if config.mode == "width":
        return _width_plan(model, batch, config, findings, moments)
    return _factor_plan(model, batch, config, findings, moments, progress)


def _groups(model: nn.Module, config: Config) -> list[Group]:
    if config.mode == "factor":
        return factor.groups(model, config)
    from rmtkd import width  # transformers take seconds to import, and factor mode may do without

    return width.groups(model)


@dataclass(frozen=True)
class _Finding:
    group: Group
    eigenvalues: Tensor
    choice: Choice

    def layer_plan(self, rank: int, comparison: "_Comparison | None" = None) -> LayerPlan:
        spectrum = self.eigenvalues.tolist()
        energy = kept_energy(spectrum, rank)
        layer = LayerPlan(self.group.name, self.group.width, self.choice, rank, energy, tuple(spectrum))
        return layer if comparison is None else replace(layer, **asdict(comparison))


def _width_plan(
    model: nn.Module, batch: Batch, config: Config, findings: Sequence[_Finding], covariances: dict[str, Tensor]
) -> Plan:
    from rmtkd import width

    widths, reasons = _common_widths(findings, config)
    layers = tuple(finding.layer_plan(widths[finding.group.width] // finding.group.share) for finding in findings)
    narrowed = width.narrow(model, widths, covariances, config)
    with as_it_was(model), as_it_was(narrowed):
        times = milliseconds({"before": lambda: run(model, batch), "after": lambda: run(narrowed, batch)})
        before, after = processes.agreed(times.values())
    sizes = parameters(model), parameters(narrowed)
    return Plan(config, layers, widths, reasons, {}, sizes, (before, after), covariances)


def _common_widths(findings: Sequence[_Finding], config: Config) -> tuple[dict[str, int], dict[str, str]]:
    """One width for the groups that share one, and how it came about.

    The paper does not say how ranks of single layers become a width of all. Here it is their mean: what the parameters
    of all layers together would be at their own ranks.
    """
    widths, reasons = {}, {}
    for name in dict.fromkeys(finding.group.width for finding in findings):
        sharing = [finding for finding in findings if finding.group.width == name]
        dims = {finding.choice.dim * finding.group.share for finding in sharing}
        if len(dims) > 1:
            raise ModelError(f"activations of the width {name} differ in width: {sorted(dims)}")
        raw = [finding.choice.raw_rank * finding.group.share for finding in sharing]
        mean = sum(raw) / len(raw)
        multiple = math.lcm(config.multiple, *(group.multiple * group.share for group in (f.group for f in sharing)))
        least = config.min_ratio * max(finding.choice.support * finding.group.share for finding in sharing)
        widths[name], clamped = round_rank(mean, dims.pop(), least, multiple)
        source = f"mean {mean:.1f} of {', '.join(map(str, raw))}" if len(raw) > 1 else str(raw[0])
        rounding = "rounded up" if multiple == config.multiple else f"rounded up to a multiple of {multiple}"
        reasons[name] = f"{source}, {rounding}" + (f", held by min_ratio {config.min_ratio:g}" if clamped else "")
    return widths, reasons


@dataclass(frozen=True)
class _Comparison:
    """A layer dense and projected: fields of LayerPlan."""

    parameters: int
    parameters_projected: int
    milliseconds: float | None
    milliseconds_projected: float | None
    keep_dense: str


def _factor_plan(
    model: nn.Module,
    batch: Batch,
    config: Config,
    findings: Sequence[_Finding],
    covariances: dict[str, Tensor],
    progress: bool,
) -> Plan:
    inputs = _inputs(model, batch, [finding.group for finding in findings])
    layers = []
    for finding in with_bar(findings, "timing layers", progress):
        comparison = _compare(model, finding, config, inputs[finding.group.name])
        layers.append(finding.layer_plan(finding.choice.rank, comparison))
    before = parameters(model)
    saved = sum((layer.parameters or 0) - (layer.parameters_projected or 0) for layer in layers if not layer.keep_dense)
    skipped = factor.skipped(model, config)
    return Plan(config, tuple(layers), {}, {}, skipped, (before, before - saved), None, covariances)


def _compare(model: nn.Module, finding: _Finding, config: Config, given: Tensor) -> _Comparison:
    """Neither size nor speed depends on the basis, so any will do."""
    (tap,) = finding.group.taps
    rank = finding.choice.rank
    dense = model.get_submodule(tap.module)
    side = factor.side_of(dense, config)
    sizes = factor.parameters(dense, rank, side)
    if sizes[1] >= sizes[0]:
        return _Comparison(*sizes, None, None, f"would not be smaller at rank {rank}")
    basis = torch.eye(finding.choice.dim, rank, device=given.device)
    projected = factor.layer(model, tap.module, basis, side)
    with as_it_was(dense), as_it_was(projected):
        times = milliseconds({"dense": lambda: dense(given), "projected": lambda: projected(given)})
        slow, fast = processes.agreed(times.values())
    slower = fast > _SLOWER * slow and not config.keep_slower
    return _Comparison(*sizes, slow, fast, "measured to be slower projected" if slower else "")


def _inputs(model: nn.Module, batch: Batch, groups: Sequence[Group]) -> dict[str, Tensor]:
    """For each layer a tensor of its input's shape and dtype: token ids as they came, else random numbers."""
    inputs: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            given = (*args, *kwargs.values())[0]
            if given.is_floating_point():
                given = torch.randn(given.shape, generator=generator).to(given)
            inputs[name] = given

        return hook

    with as_it_was(model), ExitStack() as hooks:
        for group in groups:
            module = model.get_submodule(group.taps[0].module)
            handle = module.register_forward_pre_hook(remember(group.name), with_kwargs=True)
            hooks.callback(handle.remove)
        run(model, batch)
    return inputs


def parameters(model: nn.Module) -> int:
    """Numbers in the parameters; a tensor that is used in two places counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
