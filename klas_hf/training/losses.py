"""Losses of labels, and sums over them, so that any split into batches adds up to the same.

Logits are `(labels, classes)`: of next tokens or of images.
"""

import torch.nn.functional as F
from torch import Tensor


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, `(labels,)`, with class numbers `(labels,)` or probabilities `(labels, classes)`."""
    soft = targets.is_floating_point()
    return F.cross_entropy(logits, targets.to(logits.dtype) if soft else targets, reduction="none")


def soft_distillation_sum(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) in nats, times temperature², which keeps gradients of one size (Hinton et al. 2015)."""
    student, teacher = ((x / temperature).log_softmax(-1) for x in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def hard_distillation_sum(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's best class, in nats (Touvron et al. 2021, Eq. 3)."""
    return F.cross_entropy(logits, teacher_logits.argmax(-1), reduction="sum")
