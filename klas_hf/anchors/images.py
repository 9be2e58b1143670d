"""Batches of images, with their labels where they are known."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOID = 255  # in masks: a pixel of no class


@dataclass(frozen=True)
class ImageBatch:
    """Normalised images; a unit is an image.

    Attributes:
        pixel_values: `(batch, channels, height, width)`.
        labels: `(batch,)` class numbers, or masks of them `(batch, height, width)`; None where they are not known.
    """

    pixel_values: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixel_values)

    @property
    def unit_items(self) -> Tensor:
        """`(units,)` the image that each unit is."""
        return torch.arange(len(self))

    @property
    def unit_labels(self) -> Tensor | None:
        """`(units,)` true classes, or None where they are not known."""
        return self.labels

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


def image_batches(data: Iterable[Any]) -> Iterator[ImageBatch]:
    """Read batches: mappings with `pixel_values` and perhaps `labels`, or plain tensors of pixels.

    Raises:
        TypeError, ValueError: a batch is of neither form, or its shapes do not fit.
    """
    for batch in data:
        if isinstance(batch, ImageBatch):
            yield batch
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
        yield ImageBatch(pixels, None if labels is None else labels.long())
