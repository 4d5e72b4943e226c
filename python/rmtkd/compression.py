"""compress: carry out a plan."""

from collections.abc import Iterable

from torch import nn

from rmtkd.calibration import Batch
from rmtkd.errors import PlanError
from rmtkd.plans import Plan


def compress(model: nn.Module, plan: Plan, calibration: Iterable[Batch] | None = None) -> nn.Module:
    """A new, smaller model as planned; the one given is not changed, and shares no memory with it.

    Factor mode gives the same class with layers replaced by `ProjectedLinear`, `ProjectedEmbedding` and
    `ProjectedConv2d`; layers that the plan keeps dense are copied. Width mode gives an ordinary model of the same class
    and a smaller config.

    Args:
        model: the one that was planned for, in the state in which it was.
        plan: as `rmtkd.plan` returned it. One that was read from JSON has no covariances.
        calibration: width mode: batches on which gains and offsets of norm layers are fitted to what the model had
            there. Without them they follow from the projection alone, and more is left for distillation to repair.

    Raises:
        PlanError: if the plan is of another model, as far as layers and parameters tell, or without covariances.
        ModelError: width mode, if the model is of no known family.
    """
    if missing := [layer.name for layer in plan.layers if layer.name not in plan.covariances]:
        raise PlanError(
            f"the plan has no covariance of {missing[0]}: one that was read from JSON tells what was planned, but "
            "cannot be carried out; plan again"
        )
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != plan.model_parameters[0]:
        raise PlanError(f"the plan is of a model with {plan.model_parameters[0]:,} parameters, this one has {found:,}")
    if plan.config.mode == "factor":
        from rmtkd import factor

        return factor.compress(model, plan)
    from rmtkd import width

    narrowed: nn.Module = width.narrow(model, plan.widths, plan.covariances, plan.config, calibration)
    return narrowed
