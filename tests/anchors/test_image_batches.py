"""Batches of images: what is read as one, and what is refused."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from klas_hf.anchors.images import ImageBatch, image_batches

PIXELS = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("batch", "labels"),
    [
        (PIXELS, None),
        ({"pixel_values": PIXELS}, None),
        ({"pixel_values": PIXELS, "labels": None}, None),
        ({"pixel_values": PIXELS, "labels": torch.tensor([3, 1])}, [3, 1]),
        ({"pixel_values": PIXELS.numpy(), "labels": np.array([3, 1])}, [3, 1]),
        ({"pixel_values": PIXELS.tolist(), "labels": [3, 1]}, [3, 1]),
        (BatchFeature({"pixel_values": PIXELS, "labels": torch.tensor([0, 2])}), [0, 2]),
        (ImageBatch(PIXELS), None),
        (ImageBatch(PIXELS, torch.tensor([4, 4])), [4, 4]),
    ],
)
def test_batches_are_tensors_or_mappings(batch: Any, labels: list[int] | None) -> None:
    (found,) = image_batches([batch])
    assert torch.equal(found.pixel_values, PIXELS)
    assert len(found) == 2
    if labels is None:
        assert found.labels is None
        with pytest.raises(ValueError, match=r"images without 'labels'; expected class numbers of shape \(batch,\)"):
            found.labelled()
    else:
        pixels, known = found.labelled()
        assert known.tolist() == labels
        assert torch.equal(pixels, PIXELS)


def test_batches_are_read_one_at_a_time() -> None:
    read: list[int] = []

    def batches() -> Iterator[torch.Tensor]:
        for number in range(3):
            read.append(number)
            yield PIXELS

    found = image_batches(batches())
    assert read == []
    next(found)
    assert read == [0]
    assert len(list(found)) == 2


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ("image.png", TypeError, "batch of type str; expected a mapping with 'pixel_values'.*image processor"),
        ([PIXELS], TypeError, "batch of type list"),
        ({"images": PIXELS, "labels": None}, ValueError, r"fields \['images', 'labels'\]; expected 'pixel_values'"),
        (PIXELS[0], ValueError, r"pixel_values of shape \(3, 4, 5\).*\(batch, channels, height, width\)"),
        (
            {"pixel_values": PIXELS, "labels": torch.tensor([1])},
            ValueError,
            r"pixel_values of shape \(2, 3, 4, 5\) and labels of shape \(1,\)",
        ),
        ({"pixel_values": PIXELS, "labels": torch.ones(2, 1)}, ValueError, r"labels of shape \(2, 1\)"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(image_batches([PIXELS, batch]))
