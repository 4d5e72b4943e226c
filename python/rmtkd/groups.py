"""What is looked at in a model: taps, and the groups of taps that share one projection."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tap:
    """One side of one module.

    Attributes:
        module: qualified name, as in `model.named_modules()`.
        side: "input" (its first argument) or "output" (its result, or the first of a tuple).
    """

    module: str
    side: str


@dataclass(frozen=True)
class Group:
    """Taps whose activations have one covariance, and so one projection.

    Attributes:
        name: unique in the model, shown in the plan.
        taps: pooled: a row of any of them is a row of the group.
        width: groups of the same `width` get the same rank, as one setting of the model's config ("hidden_size",
            "intermediate_size", "hidden_sizes.0"); "" if the group has a rank of its own.
        multiple: the rank must be divisible by this whatever the config says (a head's width: heads stay whole).
        share: the setting called `width` is this many times the group's rank (a ResNet's bottleneck: 4).
        ranked: False if only the second moment is wanted, and no rank (which heads stay depends on it).
        scaled: rows are divided by their root mean square first: what is read through an RMSNorm has no scale.
    """

    name: str
    taps: tuple[Tap, ...]
    width: str = ""
    multiple: int = 1
    share: int = 1
    ranked: bool = True
    scaled: bool = False
