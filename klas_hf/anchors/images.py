"""Batches of images, with their labels where they are known."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ANSWER_STRIDE = 4
VOID = 255  # in masks: a pixel of no class


@dataclass(frozen=True)
class ImageBatch:
    """Normalised images; a unit is an image, or a pixel of the answers to it.

    Attributes:
        pixel_values: `(batch, channels, height, width)`.
        labels: `(batch,)` class numbers, or masks of them `(batch, height, width)`; None where they are not known.
        per_pixel: whether a unit is a pixel of the answers.
    """

    pixel_values: Tensor
    labels: Tensor | None = None
    per_pixel: bool = False

    def __len__(self) -> int:
        return len(self.pixel_values)

    @property
    def unit_items(self) -> Tensor:
        """`(units,)` the image that each unit is, or is of."""
        images = torch.arange(len(self))
        return images.repeat_interleave(prod(self.answer_size)) if self.per_pixel else images

    @property
    def answer_size(self) -> tuple[int, int]:
        """(height, width) of the answers per pixel: dense heads answer at a quarter of the image's."""
        height, width = self.pixel_values.shape[-2:]
        return -(-height // ANSWER_STRIDE), -(-width // ANSWER_STRIDE)

    @property
    def fewest_rows(self) -> int:
        """How many rows of any state there are at least, for least squares."""
        return len(self)

    @property
    def unit_labels(self) -> Tensor | None:
        """`(units,)` true classes, -1 where there is none; None where they are not known."""
        if self.labels is None or (self.labels.ndim > 1 and not self.per_pixel):
            return None
        if not self.per_pixel:
            return self.labels
        small = F.interpolate(self.labels[:, None].float(), self.answer_size, mode="nearest").flatten().long()
        return small.masked_fill(small == VOID, -1)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What an image classifier's forward takes."""
        return {"pixel_values": self.pixel_values}

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Pixels and labels.

        Raises:
            ValueError: there are no labels.
        """
        if self.labels is None:
            raise ValueError("got a batch of images without 'labels'; expected class numbers of shape (batch,)")
        return self.pixel_values, self.labels


def image_batches(data: Iterable[Any], per_pixel: bool = False) -> Iterator[ImageBatch]:
    """Read batches: mappings with `pixel_values` and perhaps `labels`, or plain tensors of pixels.

    Args:
        per_pixel: units are pixels of the answers.

    Raises:
        TypeError, ValueError: a batch is of neither form, or its shapes do not fit.
    """
    for batch in data:
        if isinstance(batch, ImageBatch):
            yield replace(batch, per_pixel=per_pixel)
            continue
        if not isinstance(batch, Tensor | Mapping):
            raise TypeError(
                f"got a batch of type {type(batch).__name__}; expected a mapping with 'pixel_values' of shape "
                "(batch, channels, height, width), as an image processor returns with return_tensors='pt', or a tensor"
            )
        fields = {"pixel_values": batch} if isinstance(batch, Tensor) else batch
        if "pixel_values" not in fields:
            raise ValueError(f"got a batch with the fields {sorted(fields)}; expected 'pixel_values' among them")
        pixels = torch.as_tensor(fields["pixel_values"])
        labels = fields.get("labels")
        labels = None if labels is None else torch.as_tensor(labels)
        known = (pixels.shape[:1], (*pixels.shape[:1], *pixels.shape[2:]))
        if pixels.ndim != 4 or (labels is not None and labels.shape not in known):
            raise ValueError(
                f"got pixel_values of shape {tuple(pixels.shape)} and labels of shape "
                f"{None if labels is None else tuple(labels.shape)}; expected (batch, channels, height, width) and "
                "(batch,), or masks (batch, height, width)"
            )
        if labels is not None and labels.is_floating_point():
            raise TypeError(
                f"got labels of {labels.dtype}; expected whole numbers, of classes: labels.long() if they are such"
            )
        yield ImageBatch(pixels, None if labels is None else labels.long(), per_pixel)
