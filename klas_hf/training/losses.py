"""Losses, as sums over labels, so that any split into batches adds up to the same."""

import torch
import torch.nn.functional as F
from torch import Tensor

from klas_hf.training.data import IGNORED


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy summed over labels, in nats.

    Args:
        logits: `(batch, tokens, vocabulary)`.
        labels: `(batch, tokens)`, -100 where no loss is taken.
    """
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def distillation_sum(logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of next-token distributions summed over labels, in nats, times temperature².

    Shapes as for `cross_entropy_sum`. The factor keeps gradients of one size (Hinton et al. 2015).
    """
    kept = labels[:, 1:] != IGNORED
    student = (logits[:, :-1][kept].float() / temperature).log_softmax(-1)
    teacher = (teacher_logits[:, :-1][kept].float() / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def label_count(labels: Tensor) -> Tensor:
    """Number of labels that are predicted, as a float64 scalar tensor."""
    return (labels[:, 1:] != IGNORED).sum().to(torch.float64)


def soft_cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of class probabilities summed over images, in nats.

    Args:
        logits: `(images, classes)`.
        targets: `(images, classes)` probabilities.
    """
    return F.cross_entropy(logits, targets, reduction="sum")


def soft_distillation_sum(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of class distributions summed over images, in nats, times temperature².

    Both `(images, classes)`.
    """
    student, teacher = ((x / temperature).log_softmax(-1) for x in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def hard_distillation_sum(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's best class summed over images, in nats (Touvron et al. 2021, Eq. 3).

    Both `(images, classes)`.
    """
    return F.cross_entropy(logits, teacher_logits.argmax(-1), reduction="sum")
