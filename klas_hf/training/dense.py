"""The loss of dense models: transformers' own, over images with a mask of classes per pixel."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from klas_hf.anchors.classes import check_classes
from klas_hf.anchors.dense import dense_head
from klas_hf.anchors.images import VOID
from klas_hf.training.augmentation import Augmentation, as_floats, augment_masks
from klas_hf.training.config import TrainingConfig
from klas_hf.training.data import EpochOrder
from klas_hf.training.images import image_loader
from klas_hf.training.objectives import Objective


class DenseObjective(Objective):
    """The model's own loss, a mean over the pixels or masks of a batch, weighed by its images.

    Distillation compares the semantic segmentations pixel by pixel. Augmentation is flips and crops, of image and mask
    alike.

    Args:
        data: map-style dataset of `(pixels (channels, height, width), mask (height, width))`; 255 in a mask is void.

    Raises:
        ValueError: the data do not fit the model, or augmentation that masks cannot have; as `Objective`.
    """

    kind = "images with masks"
    may_skip_parameters = True

    def __init__(self, model: PreTrainedModel, data: Any, config: TrainingConfig, teacher: PreTrainedModel | None):
        check_classes(data, model.config)
        if not len(data):
            raise ValueError("got no images to train on; expected at least one with its mask")
        super().__init__(model, config, teacher)
        self.data, self.head = data, dense_head(model.config)
        self.augmentation = config.augmentation or Augmentation()

    def batches(self, multiple: int) -> tuple[DataLoader, EpochOrder]:
        return image_loader(self.data, self.config, multiple)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["labels"]), device=batch["labels"].device)

    def inputs(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
        pixels, masks = as_floats(batch["pixel_values"], self.config), batch["labels"]
        if not len(masks):
            return {"pixel_values": pixels}, masks
        check_masks(masks, self.model.config.num_labels)
        pixels, masks = augment_masks(pixels, masks, self.augmentation)
        return {"pixel_values": pixels, **self._labels(masks)}, masks

    def labelled(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        scores = self.head.scores(output, None)
        return scores.movedim(1, -1).flatten(0, 2) if len(batch["labels"]) else scores.flatten()[:0].view(0, 1)

    def own_losses(self, output: Any, logits: Tensor, targets: Tensor) -> Tensor:
        if not len(targets):
            return self.head.scores(output, None).sum()[None] * 0.0  # of fillers alone
        return output.loss.sum()[None] * len(targets)

    def by_example(self, losses: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return losses[: len(batch["labels"])]  # a batch is one example, but of fillers alone none

    def chance(self) -> float:
        return math.inf  # the model's own loss is of more than classes

    def classes(self, model: PreTrainedModel) -> int:
        return model.config.num_labels

    def _labels(self, masks: Tensor) -> dict[str, Any]:
        """What the model's forward takes for labels: masks of classes, or a mask for each class of an image."""
        if not self.head.by_mask:
            ignored = self.model.config.loss_ignore_index
            return {"labels": masks.masked_fill(masks == VOID, ignored)}
        present = [mask.unique() for mask in masks]
        present = [classes[classes != VOID] for classes in present]
        each = [(mask == classes[:, None, None]).float() for mask, classes in zip(masks, present, strict=True)]
        return {"mask_labels": each, "class_labels": present}


def check_masks(masks: Tensor, classes: int) -> None:
    """Raise ValueError for class numbers that a model does not have; 255 is none."""
    wrong = masks[(masks != VOID) & ((masks < 0) | (masks >= classes))]
    if len(wrong):
        raise ValueError(
            f"got class {int(wrong[0])} in a mask for a model of {classes} classes; expected 0 to {classes - 1}, or "
            f"{VOID} where there is none"
        )
