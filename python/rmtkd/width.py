"""Width mode: an ordinary model of a smaller config, for the families of models that are known."""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from rmtkd import width_bert, width_llama, width_resnet
from rmtkd.calibration import Batch
from rmtkd.config import Config
from rmtkd.errors import ModelError, PlanError
from rmtkd.groups import Group
from rmtkd.norms import fit_norms

_FAMILIES: dict[str, ModuleType] = {"bert": width_bert, "llama": width_llama, "resnet": width_resnet}


def groups(model: nn.Module) -> list[Group]:
    """What narrowing looks at: the residual stream, the inner neurons layer by layer, and (BERT) what heads write.

    Raises:
        ModelError: if the model is of no known family.
    """
    found: list[Group] = _family(model).groups(model)
    return found


def narrow(
    model: nn.Module,
    widths: Mapping[str, int],
    covariances: Mapping[str, Tensor],
    config: Config,
    calibration: Iterable[Batch] | None = None,
) -> Any:
    """A narrower model of the same class, which `save_pretrained` and stock `AutoModel.from_pretrained` take.

    The residual stream is projected on the leading eigenvectors of its pooled second moment, one projection for the
    whole network, so that shortcuts stay the identity. Where the stock config ties heads to the width of the stream
    (BERT), fewer heads stay, whole, and the output layer is fitted to them. Inner neurons are chosen as
    `config.neurons` says. Norm layers do not commute with a projection: see "What narrowing loses" in docs/rmtkd.md.

    Args:
        model: unchanged.
        widths: by `Group.width`, as in a plan; a width that is not named stays.
        covariances: (d, d) second moments, not centred, by `Group.name`.
        config: `neurons` is read.
        calibration: batches on which gains and offsets of layer norms and batch norms are fitted, 4,096 rows. Without
            it they follow from the projection alone, which is worse before distillation. Llama makes no use of it.

    Returns:
        A model on the same device, in the same dtype and mode.

    Raises:
        ModelError: if the model is of no known family.
        PlanError: if widths or covariances do not fit the model.
        CalibrationError: if the model does not take a batch of `calibration`.
    """
    family = _family(model)
    known = {group.width for group in family.groups(model) if group.ranked}
    if unknown := sorted(set(widths) - known):
        raise PlanError(f"this model has no width {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    narrowed = family.narrow(model, widths, covariances, config)
    if calibration is not None:
        fit_norms(model, narrowed, calibration)
    return narrowed.model


def _family(model: nn.Module) -> ModuleType:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or type(model).__name__ not in family.CLASSES:
        supported = ", ".join(name for known in _FAMILIES.values() for name in known.CLASSES)
        raise ModelError(
            f"{type(model).__name__} cannot be narrowed; supported are {supported} of transformers. "
            'mode="factor" takes any model'
        )
    return family
