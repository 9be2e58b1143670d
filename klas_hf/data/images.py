"""Images with labels as a task: from folders, parquet files or the Hub to uint8 tensors and normalised batches.

The anchors' image processor resizes and crops; pixels stay uint8 until a batch is made. A corrupt image is never
replaced by another, which would shift the statistics unseen: it is left out and counted, or an error names it.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedConfig

from klas_hf.anchors.classes import ImageClasses, WithClasses, label_ids
from klas_hf.data.image_processing import (
    CroppedProcessing,
    Processing,
    common_processing,
    normalisation,
    timm_processing,
)
from klas_hf.data.image_sources import CorruptImage, StoredImages, open_split
from klas_hf.processes import progress
from klas_hf.training.augmentation import normalise

__all__ = [
    "CorruptImage",
    "CroppedProcessing",
    "ImageBatches",
    "ImageSet",
    "Processing",
    "common_processing",
    "image_batches",
    "label_ids",
    "load_images",
    "map_labels",
    "normalisation",
    "subset",
    "timm_processing",
]

VERIFIED_BY_DEFAULT = 50_000  # images; decoding more takes too long to be done unasked
CACHE_BYTES = 2**30
_VERIFIED_AT_ONCE = 256


class Images(Protocol):
    """What an `ImageSet` reads from: `(channels, height, width)` uint8 tensors by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Tensor: ...


class ImageSet(Dataset, WithClasses):
    """Images of one size with their labels; `set[index]` is `(uint8 tensor (channels, height, width), label)`.

    Attributes:
        labels: of each image, an integer.
        names: of the classes.
        ids: the label of each name; 0, 1, … until `map_labels` changes them.
        mapped: whether the ids were given: without, models must have the same classes in the same order.
        skipped: corrupt images that were found and left out.

    Args:
        images: by row, as uint8 tensors with 1 or 3 channels: a tensor of them all, or `StoredImages`.
        labels: one of `ids` per image of the set.
        names, ids, skipped: as above; `ids=None` counts from 0.
        rows: of this set's images in `images`; None: all, in order.
        cache_bytes: images are kept once decoded if the whole set takes at most so many bytes.

    Raises:
        ValueError: no images, or labels that do not fit the images or the names.
    """

    def __init__(
        self,
        images: Images,
        labels: Sequence[int],
        names: Sequence[str],
        *,
        ids: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        skipped: int = 0,
        cache_bytes: int = 0,
    ):
        self.images, self.labels, self.names, self.skipped = images, list(labels), tuple(names), skipped
        self.ids, self.mapped = tuple(range(len(self.names)) if ids is None else ids), ids is not None
        self.rows = list(range(len(images)) if rows is None else rows)
        self.cache_bytes = cache_bytes
        self._cache: dict[int, Tensor] = {}
        if not self.rows:
            raise ValueError("got no images; expected at least one")
        if len(self.labels) != len(self.rows) or len(self.ids) != len(self.names):
            raise ValueError(
                f"got {len(self.rows)} images with {len(self.labels)} labels and {len(self.names)} names with "
                f"{len(self.ids)} ids; expected as many labels as images, and an id for each name"
            )
        if not set(self.labels) <= set(self.ids):
            unknown = sorted(set(self.labels) - set(self.ids))
            raise ValueError(f"got the labels {unknown}, which no name has; expected some of {sorted(self.ids)}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        image = self._cache.get(row)
        if image is None:
            image = self.images[row]
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
                raise ValueError(
                    f"got an image of shape {tuple(image.shape)} and {image.dtype}; expected "
                    "(channels, height, width) with 1 or 3 channels, uint8"
                )
            if len(self) * image.numel() <= self.cache_bytes:
                self._cache[row] = image
        return image, self.labels[index]

    @property
    def classes(self) -> ImageClasses:
        return ImageClasses(self.names, self.ids, self.mapped)

    def select(self, indices: Sequence[int], *, skipped: int | None = None) -> "ImageSet":
        """The images at these indices, in their order; decoded ones are not decoded again."""
        chosen = ImageSet(
            self.images,
            [self.labels[index] for index in indices],
            self.names,
            ids=self.ids if self.mapped else None,
            rows=[self.rows[index] for index in indices],
            skipped=self.skipped if skipped is None else skipped,
            cache_bytes=self.cache_bytes,
        )
        chosen._cache = {row: self._cache[row] for row in chosen.rows if row in self._cache}
        return chosen


def load_images(
    data: str | Path,
    split: str,
    processing: Processing | CroppedProcessing,
    *,
    image_column: str = "image",
    label_column: str = "label",
    verify: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> ImageSet:
    """Load one split of labelled images, resized and cropped as the anchors take them, `(3, height, width)`.

    Args:
        data: a folder with `<split>/<class>/<image>`, a parquet file or a folder of them, or a Hub id.
        split: its name. A single parquet file is the split "train".
        processing: of the anchors, from `common_processing`, or from `timm_processing`.
        image_column, label_column: of parquet files and Hub datasets; labels are integers.
        verify: decode every image now and leave out the corrupt ones, with a warning. False: a corrupt image
            raises when it is reached. None: verify up to `VERIFIED_BY_DEFAULT` images.
        cache_bytes: decoded images are kept in memory if the whole set takes at most so many bytes.

    Raises:
        FileNotFoundError: `data` does not exist.
        ValueError: the split, a column or images are missing, labels are no integers from 0, or there are fewer
            than two classes.
    """
    source = f"the split {split!r} of {data}"
    rows, labels, names = open_split(data, split, image_column, label_column)
    _check_classes(labels, source)
    images = ImageSet(StoredImages(rows, image_column, processing), labels, names, cache_bytes=cache_bytes)
    if len(images) <= VERIFIED_BY_DEFAULT if verify is None else verify:
        images = _readable(images, source)
        _check_classes(images.labels, source)
    return images


def subset(images: ImageSet, per_class: int | None = None, count: int | None = None, seed: int = 0) -> ImageSet:
    """Images drawn at random: `per_class` of each class that has any, or `count` in all.

    A smaller draw of the same seed is contained in a larger one; the order is random.

    Raises:
        ValueError: both or none of the numbers, a number below 1, or more than there are.
    """
    if (per_class is None) == (count is None):
        raise ValueError(f"got per_class={per_class} and count={count}; expected exactly one of them")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    if count is not None:
        if not 1 <= count <= len(images):
            raise ValueError(f"got count={count}; expected 1 to {len(images)}, the number of images")
        return images.select(order[:count])
    assert per_class is not None
    name_of = dict(zip(images.ids, images.names, strict=True))
    sizes = Counter(images.labels)
    short = {name_of[label]: size for label, size in sizes.items() if size < per_class}
    if short or per_class < 1:
        raise ValueError(
            f"got per_class={per_class}; expected 1 to {min(sizes.values())}, the size of the smallest class"
            + (f" (too small: {short})" if short else "")
        )
    taken: Counter[int] = Counter()
    chosen = []
    for index in order:
        label = images.labels[index]
        if taken[label] < per_class:
            taken[label] += 1
            chosen.append(index)
    return images.select(chosen)


def map_labels(images: ImageSet, mapping: Mapping[str, int] | PreTrainedConfig) -> ImageSet:
    """The same images, each class with the label that `mapping` gives its name.

    Args:
        images: keep their order, names and decoded images.
        mapping: from class name, such as a folder name or WordNet id, to label; more names than needed may be in it.
            Or the configuration of a model, whose labels are found by name (`label_ids`).

    Raises:
        TypeError: a label is no integer.
        ValueError: a name is missing, a label is negative, or two names have one label.
    """
    if isinstance(mapping, PreTrainedConfig):
        mapping = label_ids(images.names, mapping.id2label)
    missing = [name for name in images.names if name not in mapping]
    if missing:
        raise ValueError(f"got a mapping without the classes {missing}; expected a label for each of {images.names}")
    ids = tuple(mapping[name] for name in images.names)
    if not all(type(label) is int for label in ids):
        raise TypeError(f"got the labels {ids}; expected integers")
    if min(ids) < 0 or len(set(ids)) < len(ids):
        raise ValueError(f"got the labels {ids} for {images.names}; expected a label of its own, from 0, for each name")
    new = dict(zip(images.ids, ids, strict=True))
    mapped = images.select(range(len(images)))
    mapped.labels, mapped.ids, mapped.mapped = [new[label] for label in images.labels], ids, True
    return mapped


class ImageBatches(WithClasses):
    """Normalised batches of an `ImageSet` or a `SegmentationSet`; iterates as often as one likes, one batch in memory.

    Args:
        images: the set, of either kind.
        batch_size: images per batch; the last batch may be smaller.
        mean, std: per channel, of pixels from 0 to 1.
        count: so many images, drawn at random; None: all.
        seed: of that choice; without a count, of a random order of all images, for probes that learn from the batches
            in their order. None: seed 0 for a choice, the set's own order for all.

    Raises:
        ValueError: no batch size, or another number of channels than of means and deviations.
    """

    def __init__(
        self,
        images: Any,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        count: int | None = None,
        seed: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"got batch_size={batch_size}; expected at least 1")
        if count is not None or seed is not None:
            images = subset(images, count=len(images) if count is None else count, seed=seed or 0)
        self.images = images
        self.batch_size, self.mean, self.std = batch_size, tuple(mean), tuple(std)
        normalise(self.images[0][0][None], self.mean, self.std)  # an error of channels comes before long work

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    @property
    def classes(self) -> ImageClasses:
        return self.images.classes

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Mappings with `pixel_values`, `(batch, channels, height, width)` float32, and int64 `labels`.

        The labels are `(batch,)`, of masks `(batch, height, width)`.
        """
        for start in range(0, len(self.images), self.batch_size):
            indices = range(start, min(start + self.batch_size, len(self.images)))
            pixels, labels = zip(*(self.images[index] for index in indices), strict=True)
            yield {
                "pixel_values": normalise(torch.stack(pixels), self.mean, self.std),
                "labels": torch.stack([torch.as_tensor(label, dtype=torch.int64) for label in labels]),
            }


# The verb, for probes, calibration, scoring and evaluation.
image_batches = ImageBatches


def _check_classes(labels: Sequence[int], source: str) -> None:
    if len(set(labels)) < 2:
        raise ValueError(
            f"got {source} with {len(labels)} images of {len(set(labels))} class(es); expected at least two classes "
            "with images"
        )


def _readable(images: ImageSet, source: str) -> ImageSet:
    def fault(index: int) -> str | None:
        try:
            images[index]
        except CorruptImage as error:
            return str(error)
        return None

    faults: list[str | None] = []
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        for start in progress(range(0, len(images), _VERIFIED_AT_ONCE), "decoding images"):
            faults += pool.map(fault, range(start, min(start + _VERIFIED_AT_ONCE, len(images))))
    messages = [message for message in faults if message is not None]
    if not messages:
        return images
    kept = [index for index, message in enumerate(faults) if message is None]
    if not kept:
        raise ValueError(f"got {source}, of which no image can be decoded; the first: {messages[0]}")
    warnings.warn(
        f"left out {len(messages)} corrupt of {len(images)} images of {source}; the first: {messages[0]}", stacklevel=3
    )
    return images.select(kept, skipped=len(messages))
