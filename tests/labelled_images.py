"""Labelled images that tiny classifiers can tell apart, and what their blocks make of them, found with hooks."""

from typing import Any

import torch
from tiny_vision import CLASSES, SIDE, as_rows, outputs
from torch import Tensor
from transformers import PreTrainedModel

Batch = dict[str, Any]


def labelled(kind: str, count: int, size: int = 16, *, seed: int = 0, noise: float = 1.0) -> list[Batch]:
    """Batches of images: one pattern per class, plus noise."""
    generator, shape = torch.Generator().manual_seed(seed), (3, SIDE[kind], SIDE[kind])
    patterns = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(99))
    batches = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        batches.append(
            {
                "pixel_values": patterns[labels] + noise * torch.randn(size, *shape, generator=generator),
                "labels": labels,
            }
        )
    return batches


def joined(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """All pixels and labels as one batch."""
    return torch.cat([batch["pixel_values"] for batch in batches]), torch.cat([batch["labels"] for batch in batches])


def split(batches: list[Batch], size: int) -> list[Batch]:
    """The same images in batches of another size."""
    pixels, labels = joined(batches)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels.split(size), labels.split(size), strict=True)]


def pooled(model: PreTrainedModel, pixels: Tensor) -> list[Tensor]:
    """Mean over the grid of what each block gives, class tokens left out: `(images, width)`, in the model's dtype."""
    return [as_rows(model, hidden, bare=True).mean(1) for hidden in outputs(model, pixels.to(model.dtype))[0][1:]]
