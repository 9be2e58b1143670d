"""The loss of labelled images, augmented on the device they are on (SN-Net's way)."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset
from transformers import PreTrainedModel

from klas_hf.anchors.classes import check_classes, mapped_classes
from klas_hf.training.augmentation import Augmentation, as_floats, augment
from klas_hf.training.batch_norm import batch_norms
from klas_hf.training.config import TrainingConfig
from klas_hf.training.data import FILLER, EpochOrder
from klas_hf.training.losses import cross_entropies
from klas_hf.training.objectives import Objective


class ImageData(Protocol):
    """Labelled images, all of one size.

    Attributes:
        labels: class numbers of all images, so that they can be looked at without decoding an image.
    """

    @property
    def labels(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Pixels `(channels, height, width)`, uint8, or float and normalised; and the class number."""
        ...


class ImageObjective(Objective):
    """The loss of labelled images.

    Of images that are mapped to some of the model's classes the labels' loss is among these: among all, it would be
    least for a model that knows which classes occur and nothing else. Distillation is from all classes.

    Raises:
        TypeError: pixels that are no numbers of an image.
        ValueError: the data do not fit the model; as `Objective`.
    """

    kind = "images"
    may_skip_parameters = True  # a supernet's other paths; DINOv2's mask token

    def __init__(
        self, model: PreTrainedModel, data: ImageData, config: TrainingConfig, teacher: PreTrainedModel | None
    ):
        check_classes(data, model.config)
        _check_data(data, model.config.num_labels, config)
        _check_batches(model, config, len(data))
        super().__init__(model, config, teacher)
        self.data = data
        self.augmentation = config.augmentation or Augmentation()
        self.among = torch.tensor(mapped_classes(data, model.config.num_labels) or range(model.config.num_labels))

    def batches(self, multiple: int) -> tuple[DataLoader, EpochOrder]:
        return image_loader(self.data, self.config, multiple)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["labels"]), device=batch["labels"].device)

    def inputs(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
        config, pixels, labels = self.config, as_floats(batch["pixel_values"], self.config), batch["labels"]
        if not len(labels):
            return {"pixel_values": pixels}, labels
        places = torch.searchsorted(self.among.to(labels.device), labels)
        pixels, targets = augment(pixels, places, self.augmentation, config.mean, config.std, len(self.among))
        return {"pixel_values": pixels}, targets

    def labelled(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        return output.logits[: len(batch["labels"])]  # none of a blank image

    def own_losses(self, output: Any, logits: Tensor, targets: Tensor) -> Tensor:
        few = len(self.among) < logits.shape[-1]
        return cross_entropies(logits[:, self.among.to(logits.device)] if few else logits, targets)

    def classes(self, model: PreTrainedModel) -> int:
        return model.config.num_labels


def image_loader(data: Any, config: TrainingConfig, multiple: int) -> tuple[DataLoader, EpochOrder]:
    """A loader of shuffled batches of images, whose number is a multiple of `multiple`, and the order it follows."""
    batch_size = config.per_device_batch_size
    order = EpochOrder(len(data), batch_size * multiple, config.seed)
    sampler = BatchSampler(order, batch_size, drop_last=False)
    loader = DataLoader(
        _Filled(data), batch_sampler=sampler, collate_fn=collate_images, num_workers=config.num_workers
    )  # fmt: skip
    return loader, order


def collate_images(examples: Sequence[tuple[Tensor, Any]]) -> dict[str, Tensor]:
    """Stack images: `pixel_values` `(batch, channels, height, width)` and `labels`, `(batch,)` or, of masks, with two
    dimensions more.

    Fillers are left out, so that BatchNorm does not see them; of a batch of fillers one blank image remains, with
    no labels.
    """
    kept = [example for example in examples if example[1] is not None]
    pixels = torch.stack([pixels for pixels, _ in kept or examples[:1]])
    labels = [torch.as_tensor(label, dtype=torch.long) for _, label in kept]
    return {"pixel_values": pixels, "labels": torch.stack(labels) if labels else torch.empty(0, dtype=torch.long)}


class _Filled(Dataset):
    def __init__(self, data: Any):
        self.data = data
        self.blank = torch.zeros_like(data[0][0])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return (self.blank, None) if index == FILLER else self.data[index]


def _check_data(data: ImageData, classes: int, config: TrainingConfig) -> None:
    if not len(data):
        raise ValueError("got no images to train on; expected at least one")
    labels = list(data.labels)
    if len(labels) != len(data):
        raise ValueError(f"got {len(data)} images and {len(labels)} labels; expected one label per image")
    for label in labels:
        if not isinstance(label, Integral) and (not isinstance(label, Tensor) or label.is_floating_point()):
            kind = label.dtype if isinstance(label, Tensor) else type(label).__name__
            raise TypeError(f"got a label of {kind}, {label}; expected whole numbers, of classes: int(label) if it is")
    wrong = sorted({int(label) for label in labels if not 0 <= label < classes})
    if wrong:
        raise ValueError(
            f"got the labels {wrong[:5]} for a model of {classes} classes; expected 0 to {classes - 1}. Map the data's "
            "labels to the model's, or give the model a head for them"
        )
    pixels = data[0][0]
    if not isinstance(pixels, Tensor) or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
        found = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(f"got pixels of {found}; expected a tensor, uint8, or float and normalised")
    if pixels.ndim != 3 or len(pixels) != len(config.mean):
        raise ValueError(
            f"got images of shape {tuple(pixels.shape)} and a mean of {len(config.mean)} channels; expected (channels, "
            "height, width). Set mean and std to the processing's, one number per channel"
        )


def _check_batches(model: PreTrainedModel, config: TrainingConfig, images: int) -> None:
    # A BatchNorm over one vector has no variance; torch would say so in the middle of an epoch.
    is_alone = 1 in (config.per_device_batch_size, images % config.per_device_batch_size)
    if config.batch_norm == "train" and batch_norms(model) and is_alone:
        raise ValueError(
            f"got {images} images in batches of {config.per_device_batch_size}, so that a batch holds a single image, "
            "for batch_norm='train'; choose another per_device_batch_size, or batch_norm='frozen'"
        )
