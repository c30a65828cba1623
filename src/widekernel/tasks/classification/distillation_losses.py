"""Losses by which one classifier, the student, learns from the outputs of another one, the teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from widekernel.errors import ArgumentError


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return `T² KL(teacher ‖ student)` of the class probabilities at temperature `T`, the mean over images.

    The factor keeps the size of the gradient when the temperature changes (Hinton et al., arXiv 1503.02531).

    Args:
        student: logits `(n, classes)`.
        teacher: logits `(n, classes)`, which get no gradient.
        temperature: number by which the logits are divided.
    """
    _check(student, teacher)
    ours = F.log_softmax(student.float() / temperature, dim=1)
    theirs = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def hard_label_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy with the class that the teacher thinks most likely, the mean over images.

    Args:
        student: logits `(n, classes)`.
        teacher: logits `(n, classes)`.
    """
    _check(student, teacher)
    return F.cross_entropy(student.float(), teacher.argmax(dim=1))


def normalized_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the two parts of normalized knowledge distillation (NKD, Yang et al., arXiv 2303.13005).

    With the label `c`, the probabilities `p` of the student and `t` of the teacher, and the probabilities `p'` and `t'`
    among the other classes at temperature `T`, they are the means over images of `-t_c log p_c` and of
    `-α T² Σ_{i≠c} t'_i log p'_i`. Both are computed from log-probabilities, so that they and their gradients are finite for
    any finite logits.

    Args:
        student: logits `(n, classes)` of at least two classes.
        teacher: logits `(n, classes)`, which get no gradient.
        labels: class indices `(n,)`.
        temperature: number by which the logits of the other classes are divided.
        alpha: weight of the second part.
    """
    _check(student, teacher)
    if student.shape[1] < 2:
        raise ArgumentError(f"NKD compares the classes besides the right one, but there are {student.shape[1]} class(es)")
    student, teacher, labels = student.float(), teacher.detach().float(), labels[:, None]
    right = F.log_softmax(student, dim=1).gather(1, labels)
    trusted = F.softmax(teacher, dim=1).gather(1, labels)
    is_right = torch.zeros_like(student, dtype=torch.bool).scatter(1, labels, True)
    ours = F.log_softmax((student / temperature).masked_fill(is_right, -torch.inf), dim=1).masked_fill(is_right, 0.0)
    theirs = F.softmax((teacher / temperature).masked_fill(is_right, -torch.inf), dim=1)
    others = -(theirs * ours).sum(dim=1).mean()
    return -(trusted * right).mean(), alpha * temperature**2 * others


def feature_loss(student: Tensor, teacher: Tensor, beta: float = 2.0) -> Tensor:
    """Return the smooth L1 distance of two equally shaped features, the mean over images and channels.

    Args:
        student: projected features `(n, channels)`.
        teacher: features `(n, channels)`, which get no gradient.
        beta: distance from which the loss is linear; 0 is the L1 distance.
    """
    return F.smooth_l1_loss(student.float(), teacher.detach().float(), beta=beta)


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.dim() != 2:
        raise ArgumentError(
            f"The logits are {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher, but both "
            "must be (images, classes)"
        )
