"""ResNet, narrowed: channels chosen per stage, because ReLU and batch norm commute with a choice, not with a rotation.

The channels of a stage's shortcut are one choice for all its layers, so the shortcut stays the identity; the channels
between the convolutions of a layer are that layer's own. Channels that go are interpolated from those that stay,
and the interpolation is folded into the convolutions that read them: padding is zero, and 0 is interpolated as 0.
"""

import copy
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rmtkd.config import Config
from rmtkd.errors import ConfigError, PlanError
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
            for inner in range(_inners(model)):
                tap = Tap(f"{layer}.layer.{inner}", "output")
                name = _inner(index, number, inner)
                found.append(Group(name, (tap,), width=f"hidden_sizes.{index}", share=_reduction(model)))
    return found


def narrow(model: Layer, widths: Mapping[str, int], covariances: Mapping[str, Tensor], config: Config) -> Narrowed:
    """See `rmtkd.width.narrow`. A stem that is not the stock one (CIFAR) is kept, and then stock classes do not load.

    Raises:
        ConfigError: if `config.neurons` is "projection".
    """
    if config.neurons != "leverage":
        raise ConfigError('batch norm acts channel by channel, so channels cannot be mixed: set neurons="leverage"')
    sizes = [
        width_of(widths, f"hidden_sizes.{index}", size, _reduction(model))
        for index, size in enumerate(model.config.hidden_sizes)
    ]
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
            inner = [choices[_inner(index, number, inner)] for inner in range(_inners(model))]
            builder.layer(index, number, [before, *inner, choices[_stage(index)]])
            before = choices[_stage(index)]
    if hasattr(model, "classifier") and isinstance(model.classifier[-1], nn.Linear):
        write(new.classifier[-1], weight_of(model.classifier[-1]) @ before.after, bias_of(model.classifier[-1]))
    return Narrowed(new, tuple(builder.norms))


def _choose(model: Layer, covariances: Mapping[str, Tensor], stem_size: int, sizes: list[int]) -> dict[str, Neurons]:
    old = model.config
    full = {"embedding_size": old.embedding_size} | {
        f"hidden_sizes.{i}": size for i, size in enumerate(old.hidden_sizes)
    }
    kept = {"embedding_size": stem_size} | {f"hidden_sizes.{i}": size for i, size in enumerate(sizes)}
    wanted = {
        group.name: (full[group.width] // group.share, kept[group.width] // group.share) for group in groups(model)
    }
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

    def layer(self, stage: int, number: int, channels: list[Neurons]) -> None:
        """`channels` before the layer, between its convolutions, and after it."""
        name = f"{self.prefix}encoder.stages.{stage}.layers.{number}"
        for place, (read, written) in enumerate(itertools.pairwise(channels)):
            self._convolution(f"{name}.layer.{place}", read, written)
        if not isinstance(self.old.get_submodule(f"{name}.shortcut"), nn.Identity):
            self._convolution(f"{name}.shortcut", channels[0], channels[-1])

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


def _inners(model: Layer) -> int:
    """How often the channels change inside a layer: a bottleneck has three convolutions, a basic layer two."""
    return 2 if model.config.layer_type == "bottleneck" else 1


def _reduction(model: Layer) -> int:
    """How many times narrower a layer is inside, which the config does not set."""
    return 4 if model.config.layer_type == "bottleneck" else 1


def _stage(index: int) -> str:
    return f"stage.{index}"


def _inner(index: int, number: int, inner: int) -> str:
    return f"stage.{index}.layer.{number}.inner{inner or ''}"
