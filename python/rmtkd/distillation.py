"""Distillation: a student trained on labels and on the logits of its teacher."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from rmtkd.config import Config
from rmtkd.errors import ConfigError, ModelError
from rmtkd.training import fit


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Iterable[Mapping[str, Any]] | Dataset[Any],
    config: Config,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Trains the student for `config.epochs` on α·CE + (1 − α)·T²·KL(teacher ‖ student), with AdamW.

    The learning rate falls linearly from `learning_rate` at the first step to `final_learning_rate` at the last.
    Equal calls give equal bits, on one thread of one machine: everything random starts from `config.seed`, the
    loader's own generators too, and the random states of the caller are as before afterwards.

    A model's logits are what it returns, or the `logits` of that; it is called with the batch without its labels.
    Causal language models of transformers are scored against labels one position later; the labels of any other model
    have the shape of its logits but for the last dimension. What is labelled -100 counts in neither term.

    Args:
        student: trained in place, on the device it is on.
        teacher: runs in eval mode and without gradients; not a bit of it changes, nor its mode. May be on another
            device. None trains on labels alone, and wants `config.alpha` to be 1.
        train: a loader or list of batches, each a mapping with "labels"; or a data set of such mappings, from which
            batches of 32 are drawn in random order.
        config: epochs, alpha, temperature, learning rates, weight decay and seed are read.
        evaluate: score of a model, shown on the bar after each epoch; called in eval mode, without gradients.
        progress: whether to show a bar; without it nothing is printed.

    Returns:
        The student, in eval mode.

    Raises:
        ConfigError: if there is no teacher and alpha is below 1.
        ModelError: if the teacher shares parameters with the student, nothing in the student can be trained, or one of
            them returns no logits.
        TrainingError: if there are no batches, a batch has no labels, shapes disagree, or the loss is not finite.
    """
    if teacher is None:
        if config.alpha < 1:
            raise ConfigError(f"without a teacher alpha must be 1, got {config.alpha}")
    else:
        own = {parameter.data_ptr() for parameter in student.parameters()}
        if any(parameter.data_ptr() in own for parameter in teacher.parameters()):
            raise ModelError("the teacher shares parameters with the student, and would change: give a deepcopy of it")
    return fit(
        student,
        teacher,
        train,
        config,
        epochs=config.epochs,
        label="training" if teacher is None else "distillation",
        evaluate=evaluate,
        progress=progress,
    )


def train(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | Dataset[Any],
    config: Config,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Trains the model on labels alone: `distill` without a teacher, whatever `config.alpha` says."""
    return distill(model, None, batches, replace(config, alpha=1.0), evaluate=evaluate, progress=progress)
