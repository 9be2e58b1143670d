"""The loss of images with any number of labels: binary cross-entropy of every class."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from klas_hf.anchors.classes import check_classes
from klas_hf.training.augmentation import Augmentation, as_floats, augment
from klas_hf.training.config import TrainingConfig
from klas_hf.training.data import EpochOrder
from klas_hf.training.images import image_loader
from klas_hf.training.objectives import Objective, laplace_loss

_SINGLE = ("mixup", "cutmix", "label_smoothing")  # of one label per image


class MultiLabelObjective(Objective):
    """Binary cross-entropy, in nats, a mean over the classes of each image.

    Args:
        data: map-style dataset of `(pixels (channels, height, width), (classes,))`, 1 at the classes of the image.

    Raises:
        ValueError: the data do not fit the model, distillation, or augmentation that mixes labels; as `Objective`.
    """

    kind = "images with any number of labels"
    may_skip_parameters = True

    def __init__(self, model: PreTrainedModel, data: Any, config: TrainingConfig, teacher: PreTrainedModel | None):
        check_classes(data, model.config)
        if not len(data):
            raise ValueError("got no images to train on; expected at least one")
        check_present(torch.as_tensor(data[0][1])[None], model.config.num_labels)
        super().__init__(model, config, teacher)
        self.data, self.augmentation = data, config.augmentation or Augmentation()
        wrong = [name for name in _SINGLE if getattr(self.augmentation, name)]
        if wrong or self.teacher is not None:
            raise ValueError(
                f"got {wrong or 'distillation'} for images with any number of labels; expected the labels as they are. "
                "Leave it out"
            )

    def batches(self, multiple: int) -> tuple[DataLoader, EpochOrder]:
        return image_loader(self.data, self.config, multiple)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["labels"]), device=batch["labels"].device)

    def inputs(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
        config, pixels, labels = self.config, as_floats(batch["pixel_values"], self.config), batch["labels"]
        if len(labels):
            check_present(labels, self.model.config.num_labels)
            whole = labels.new_zeros(len(labels))  # as if of one class, so that pixels alone change
            pixels, _ = augment(pixels, whole, self.augmentation, config.mean, config.std, 1)
        return {"pixel_values": pixels}, labels

    def labelled(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        return output.logits[: len(batch["labels"])]  # none of a blank image

    def own_losses(self, output: Any, logits: Tensor, targets: Tensor) -> Tensor:
        present = targets.view(logits.shape).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, present, reduction="none").mean(1)

    def chance(self) -> float:
        labels = torch.cat([batch["labels"] for batch in self.batches(1)[0]]).double()
        counts = torch.stack([labels.sum(0), (1 - labels).sum(0)], 1)  # of each class, there and not there
        return sum(map(laplace_loss, counts)) / len(counts)

    def classes(self, model: PreTrainedModel) -> int:
        return model.config.num_labels


def is_multilabel(model: PreTrainedModel) -> bool:
    """Whether an image may have any number of a model's classes."""
    return model.config.problem_type == "multi_label_classification"


def check_present(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless labels are `(batch, classes)`, each 0 or 1."""
    if labels.ndim != 2 or labels.shape[1] != classes or ((labels != 0) & (labels != 1)).any():
        raise ValueError(
            f"got labels of shape {tuple(labels.shape)} for a model of {classes} classes, of which an image may have "
            "any number; expected (batch, classes), 1 at the classes of an image and 0 elsewhere"
        )
