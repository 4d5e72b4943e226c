"""ResNet, narrowed: channels chosen per stage, because ReLU and batch norm commute with a choice, not with a rotation.

The channels of a stage's shortcut are one choice for all its layers, so the shortcut stays the identity; the channels
between the two convolutions of a layer are that layer's own. Channels that go are interpolated from those that stay,
and the interpolation is folded into the convolutions that read them: padding is zero, and 0 is interpolated as 0.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rmtkd.config import Config
from rmtkd.errors import ConfigError, ModelError, PlanError
from rmtkd.groups import Group, Tap
from rmtkd.neurons import Neurons, choose_neurons
from rmtkd.width_parts import (
    Layer,
    Narrowed,
    Norm,
    bias_of,
    moment_of,
    name_prefix,
    smaller,
    weight_of,
    width_of,
    write,
)

CLASSES = ("ResNetModel", "ResNetForImageClassification")

_STEM = "stem"


def groups(model: Layer) -> list[Group]:
    """Every stage's channels, together with the stem's where the first shortcut is the identity; and layers' own."""
    _check(model)
    prefix = name_prefix(model, model.base_model)
    stem = Tap(f"{prefix}embedder", "output")
    found = [] if _joined(model) else [Group(_STEM, (stem,), width="embedding_size")]
    for index, stage in enumerate(model.base_model.encoder.stages):
        layers = [f"{prefix}encoder.stages.{index}.layers.{number}" for number in range(len(stage.layers))]
        taps = tuple(Tap(layer, "output") for layer in layers)
        if index == 0 and _joined(model):
            taps = (stem, *taps)
        found.append(Group(_stage(index), taps, width=f"hidden_sizes.{index}"))
        for number, layer in enumerate(layers):
            tap = Tap(f"{layer}.layer.0", "output")
            found.append(Group(_inner(index, number), (tap,), width=f"hidden_sizes.{index}"))
    return found


def narrow(model: Layer, widths: Mapping[str, int], covariances: Mapping[str, Tensor], config: Config) -> Narrowed:
    """See `rmtkd.width.narrow`. A stem that is not the stock one (CIFAR) is kept, and then stock classes do not load.

    Raises:
        ConfigError: if `config.neurons` is "projection".
    """
    _check(model)
    if config.neurons != "leverage":
        raise ConfigError('batch norm acts channel by channel, so channels cannot be mixed: set neurons="leverage"')
    sizes = [width_of(widths, f"hidden_sizes.{index}", size) for index, size in enumerate(model.config.hidden_sizes)]
    stem_size = sizes[0] if _joined(model) else width_of(widths, "embedding_size", model.config.embedding_size)
    if not _joined(model) and not model.config.downsample_in_first_stage and stem_size == sizes[0]:
        raise PlanError(
            f"embedding_size and hidden_sizes.0 cannot both be {stem_size}: the stock model would drop the first "
            "shortcut's convolution; change one of them"
        )
    choices = _choose(model, covariances, stem_size, sizes)
    new = smaller(model, embedding_size=stem_size, hidden_sizes=sizes)
    builder = _Builder(new, model)
    builder.stem(choices[_STEM])
    before = choices[_STEM]
    for index, stage in enumerate(model.base_model.encoder.stages):
        for number in range(len(stage.layers)):
            builder.layer(index, number, before, choices[_inner(index, number)], choices[_stage(index)])
            before = choices[_stage(index)]
    if hasattr(model, "classifier") and isinstance(model.classifier[-1], nn.Linear):
        write(new.classifier[-1], weight_of(model.classifier[-1]) @ before.after, bias_of(model.classifier[-1]))
    return Narrowed(new, tuple(builder.norms))


def _choose(model: Layer, covariances: Mapping[str, Tensor], stem_size: int, sizes: list[int]) -> dict[str, Neurons]:
    old = model.config
    wanted = {} if _joined(model) else {_STEM: (old.embedding_size, stem_size)}
    for index, stage in enumerate(model.base_model.encoder.stages):
        for name in (_stage(index), *(_inner(index, number) for number in range(len(stage.layers)))):
            wanted[name] = (old.hidden_sizes[index], sizes[index])
    moments = {name: moment_of(covariances, name, full) for name, (full, _) in wanted.items()}
    choices = {name: choose_neurons(moments[name], size, "leverage") for name, (_, size) in wanted.items()}
    if _joined(model):
        choices[_STEM] = choices[_stage(0)]
    return choices


class _Builder:
    """Writes convolutions and batch norms, and remembers what the norms should give."""

    def __init__(self, new: Layer, old: Layer) -> None:
        self.new, self.old = new, old
        self.prefix = name_prefix(old, old.base_model)
        self.norms: list[Norm] = []

    def stem(self, channels: Neurons) -> None:
        new, old = self.new.base_model.embedder, self.old.base_model.embedder
        new.pooler = copy.deepcopy(old.pooler)
        new.embedder.convolution = _like(old.embedder.convolution, len(channels.before))
        pixels = torch.eye(old.embedder.convolution.in_channels, dtype=torch.float64, device=channels.after.device)
        self._convolution(f"{self.prefix}embedder.embedder", Neurons(pixels, pixels), channels)

    def layer(self, stage: int, number: int, before: Neurons, inner: Neurons, after: Neurons) -> None:
        name = f"{self.prefix}encoder.stages.{stage}.layers.{number}"
        self._convolution(f"{name}.layer.0", before, inner)
        self._convolution(f"{name}.layer.1", inner, after)
        if not isinstance(self.old.get_submodule(f"{name}.shortcut"), nn.Identity):
            self._convolution(f"{name}.shortcut", before, after)

    def _convolution(self, name: str, read: Neurons, written: Neurons) -> None:
        """A convolution and the batch norm after it, which keeps its statistics until they are fitted."""
        new, old = self.new.get_submodule(name), self.old.get_submodule(name)
        weight = torch.einsum("po,oihw,ic->pchw", written.before, weight_of(old.convolution), read.after)
        write(new.convolution, weight, written.before @ bias_of(old.convolution))
        norm, old_norm = new.normalization, old.normalization
        write(norm, written.before @ weight_of(old_norm), written.before @ bias_of(old_norm))
        norm.running_mean.copy_(written.before @ old_norm.running_mean.double())
        norm.running_var.copy_(written.before @ old_norm.running_var.double())
        norm.num_batches_tracked.copy_(old_norm.num_batches_tracked)
        norm.eps, norm.momentum = old_norm.eps, old_norm.momentum
        self.norms.append(Norm(f"{name}.normalization", written.before.T))


def _like(old: nn.Conv2d, channels: int) -> nn.Conv2d:
    """A convolution of the same geometry with fewer channels, not yet written."""
    new: nn.Conv2d = nn.utils.skip_init(
        nn.Conv2d,
        old.in_channels,
        channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        dilation=old.dilation,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    new.weight.requires_grad_(old.weight.requires_grad)
    new.train(old.training)
    return new


def _joined(model: Layer) -> bool:
    """Whether the first layer adds the stem's channels to its own."""
    return isinstance(model.base_model.encoder.stages[0].layers[0].shortcut, nn.Identity)


def _check(model: Layer) -> None:
    if model.config.layer_type != "basic":
        raise ModelError(
            f'a ResNet of {model.config.layer_type} layers cannot be narrowed, only of layer_type="basic": the config '
            "ties the width inside such a layer to the width between layers"
        )


def _stage(index: int) -> str:
    return f"stage.{index}"


def _inner(index: int, number: int) -> str:
    return f"stage.{index}.layer.{number}.inner"
