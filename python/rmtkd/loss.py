"""The loss of a distillation: cross-entropy with labels, and the divergence of a student from its teacher."""

import torch
from torch import Tensor
from torch.nn import functional

from rmtkd.errors import TrainingError

IGNORED = -100  # the label of what does not count, as everywhere in PyTorch


def distillation_loss(
    student: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    *,
    alpha: float = 0.7,
    temperature: float = 1.0,
    shift: bool = False,
) -> Tensor:
    """α·CE(labels, student) + (1 − α)·T²·KL(teacher ‖ student), with softmax(logits / T) in the divergence.

    Eqs. 13 and 19 of arXiv 2601.17357. T² keeps the size of the gradient whatever T is; without it, as at T = 1, this
    is the paper's loss. Both terms are means over the positions that have a label, in float32 at least; 0 if there is
    none.

    Args:
        student, teacher: (..., C) logits. The teacher may be left out if alpha is 1.
        labels: (...) class indices; -100 where neither term counts.
        alpha: weight of the cross-entropy, 0 to 1.
        temperature: T, above 0.
        shift: whether logits at position t are of the label at t + 1, as in a causal language model.

    Returns:
        A scalar.

    Raises:
        TrainingError: if shapes disagree or labels are no class indices.
    """
    if labels.is_floating_point() or labels.shape != student.shape[:-1]:
        raise TrainingError(
            f"labels must be class indices of shape {tuple(student.shape[:-1])}, one for each row of logits, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if teacher is not None and teacher.shape != student.shape:
        raise TrainingError(f"the teacher's logits are {tuple(teacher.shape)}, the student's {tuple(student.shape)}")
    if shift:
        student, labels = student[..., :-1, :], labels[..., 1:]
        teacher = None if teacher is None else teacher[..., :-1, :]
    counted = labels != IGNORED
    labels = labels[counted]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < student.shape[-1]:
        raise TrainingError(
            f"labels must be from 0 to {student.shape[-1] - 1}, or {IGNORED} where none counts; "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    student = _precise(student[counted])
    rows = max(len(labels), 1)
    loss = alpha * functional.cross_entropy(student, labels, reduction="sum")
    if alpha < 1 and teacher is not None:
        divergence = functional.kl_div(
            functional.log_softmax(student / temperature, -1),
            functional.log_softmax(_precise(teacher[counted]) / temperature, -1),
            reduction="sum",
            log_target=True,
        )
        loss = loss + (1 - alpha) * temperature**2 * divergence
    return loss / rows


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
