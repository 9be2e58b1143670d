"""Training of image classifiers and supernets (SN-Net): augmented batches, soft targets, distillation, random paths."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset
from transformers import PreTrainedModel

from klas_hf.anchors.language import evaluating
from klas_hf.processes import process_state
from klas_hf.training.augmentation import augment, normalise
from klas_hf.training.batch_norm import batch_norms
from klas_hf.training.config import ImageTrainingConfig
from klas_hf.training.data import FILLER, EpochOrder
from klas_hf.training.losses import hard_distillation_sum, soft_cross_entropy_sum, soft_distillation_sum
from klas_hf.training.objectives import Objective, stitched_from
from klas_hf.training.paths import path_sampler, takes


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

    Args:
        model: the model that is trained, not wrapped.
        data: the images.
        config: settings.
        teacher: for distillation; unused without a `distillation_weight`.

    Raises:
        ValueError: data, teacher or settings do not fit the model.
    """

    may_skip_parameters = True  # a supernet's other paths; DINOv2's mask token

    def __init__(
        self, model: PreTrainedModel, data: ImageData, config: ImageTrainingConfig, teacher: PreTrainedModel | None
    ):
        self.model, self.data, self.config = model, data, config
        self.augmentation = config.augmentation()
        self.teacher = teacher if config.distillation_weight else None
        _check_data(data, model.config.num_labels, config)
        _check_model(model, config, len(data))
        if self.teacher is not None:
            _check_teacher(self.teacher, model)
        self.paths = path_sampler(model, config)
        self.size = sum(parameter.numel() for parameter in model.parameters())

    def batches(self, multiple: int) -> tuple[DataLoader, EpochOrder]:
        batch_size = self.config.per_device_batch_size
        order = EpochOrder(len(self.data), batch_size * multiple, self.config.seed)
        sampler = BatchSampler(order, batch_size, drop_last=False)
        workers = self.config.num_workers
        loader = DataLoader(
            _Filled(self.data), batch_sampler=sampler, collate_fn=collate_images, num_workers=workers
        )  # fmt: skip
        return loader, order

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["labels"]), device=batch["labels"].device)

    def loss_sum(self, model: nn.Module, batch: dict[str, Tensor], seed: tuple[int, ...]) -> Tensor:
        pixels, options = self._normalised(batch["pixel_values"]), self._options(seed)
        if not len(batch["labels"]):
            # Only fillers. The other processes wait for this one's part in their forward and backward all the same.
            with evaluating(model), self._autocast(pixels):
                return 0 * model(pixel_values=pixels, **options).logits.float().sum()
        config, classes = self.config, self.model.config.num_labels
        pixels, targets = augment(pixels, batch["labels"], self.augmentation, config.mean, config.std, classes)
        with self._autocast(pixels):
            logits = model(pixel_values=pixels, **options).logits.float()
        loss = soft_cross_entropy_sum(logits, targets)
        if self.teacher is None:
            return loss
        with torch.no_grad(), evaluating(self.teacher):
            teacher_logits = self.teacher(pixel_values=pixels.to(self.teacher.dtype)).logits.float()
        if config.distillation == "hard":
            distance = hard_distillation_sum(logits, teacher_logits)
        else:
            distance = soft_distillation_sum(logits, teacher_logits, config.distillation_temperature)
        return (1 - config.distillation_weight) * loss + config.distillation_weight * distance

    @contextmanager
    def while_training(self, device: torch.device) -> Iterator[None]:
        if self.teacher is not None:
            self.teacher.to(device)
        if self.config.batch_norm == "frozen":
            for layer in batch_norms(self.model):
                layer.eval()
        yield
        if self.config.batch_norm == "train" and process_state().num_processes > 1:
            # Each process took statistics of its own batches; the main one's are what checkpoints hold.
            for layer in batch_norms(self.model):
                for buffer in layer.buffers():
                    buffer.copy_(broadcast(buffer))

    def description(self) -> dict[str, Any]:
        config = self.model.config
        paths = None if self.paths is None else [str(path) for path in self.model.paths]
        sizes = {"model": config.model_type, "classes": config.num_labels, "parameters": self.size}
        return stitched_from(config) | sizes | {"paths": paths}

    def _options(self, seed: tuple[int, ...]) -> dict[str, Any]:
        options = {} if self.config.drop_path is None else {"drop_path": self.config.drop_path}
        return options if self.paths is None else options | {"path": self.model.paths[self.paths.draw(seed)]}

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Float pixels as the model wants them: `(batch, channels, height, width)`."""
        if pixels.is_floating_point():
            return pixels.float()
        return normalise(pixels, self.config.mean, self.config.std)

    def _autocast(self, pixels: Tensor) -> AbstractContextManager:
        return torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.config.mixed_precision == "bf16")


def collate_images(examples: Sequence[tuple[Tensor, int | None]]) -> dict[str, Tensor]:
    """Stack images: `pixel_values` `(batch, channels, height, width)` and `labels` `(batch,)`.

    Fillers are left out, so that BatchNorm does not see them; of a batch of fillers one blank image remains, with
    `labels` `(0,)`.
    """
    kept = [example for example in examples if example[1] is not None]
    pixels = torch.stack([pixels for pixels, _ in kept or examples[:1]])
    return {"pixel_values": pixels, "labels": torch.tensor([label for _, label in kept], dtype=torch.long)}


class _Filled(Dataset):
    def __init__(self, data: ImageData):
        self.data = data
        self.blank = torch.zeros_like(data[0][0])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        return (self.blank, None) if index == FILLER else self.data[index]


def _check_data(data: ImageData, classes: int, config: ImageTrainingConfig) -> None:
    if not len(data):
        raise ValueError("got no images to train on; expected at least one")
    labels = list(data.labels)
    if len(labels) != len(data):
        raise ValueError(f"got {len(data)} images and {len(labels)} labels; expected one label per image")
    wrong = sorted({label for label in labels if not 0 <= label < classes})
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


def _check_model(model: PreTrainedModel, config: ImageTrainingConfig, images: int) -> None:
    name = type(model).__name__
    if config.drop_path is not None and not takes(model, "drop_path"):
        raise ValueError(
            f"got drop_path={config.drop_path} for {name}, whose forward has no drop_path; expected drop_path=None, "
            "and the rate in the model's config"
        )
    # A BatchNorm over one vector has no variance; torch would say so in the middle of an epoch.
    is_alone = 1 in (config.per_device_batch_size, images % config.per_device_batch_size)
    if config.batch_norm == "train" and batch_norms(model) and is_alone:
        raise ValueError(
            f"got {images} images in batches of {config.per_device_batch_size}, so that a batch holds a single image, "
            "for batch_norm='train'; choose another per_device_batch_size, or batch_norm='frozen'"
        )


def _check_teacher(teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    if teacher.config.num_labels != model.config.num_labels:
        raise ValueError(
            f"got a teacher of {teacher.config.num_labels} classes for a model of {model.config.num_labels}; expected "
            "as many, in the same order"
        )
    trained = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError("got a teacher that shares parameters with the model; expected a copy: copy.deepcopy(teacher)")
