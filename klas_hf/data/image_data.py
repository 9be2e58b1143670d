"""The data of an image recipe, as options: where the images are, how many are used, and which label each class has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from klas_hf.anchors.language import anchor_config
from klas_hf.data.images import (
    ImageSet,
    Processing,
    common_processing,
    label_ids,
    load_images,
    map_labels,
    subset,
)
from klas_hf.files import understood


@dataclass(frozen=True)
class ImageTask:
    """Data of a comparison.

    Attributes:
        train: probes and supernets learn from it.
        validation: probes stop by it, and stitches are scored on it.
        test: everything is measured on it.
        mean, std: normalisation of pixels from 0 to 1.
        classes: labels to measure among, where the data have fewer classes than the anchors; None: all.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[int, ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        pixels = self.train[0][0]
        return pixels.shape[-2], pixels.shape[-1]


@dataclass
class ImageDataArguments:
    """Where the images are, and which are used."""

    data: str = field(metadata={"help": "imagefolder (<split>/<class>/<image>), parquet file or folder, or Hub id"})
    anchors: list[str] = field(metadata={"help": "Hub ids or folders of image classifiers, cheapest first"})
    train_split: str = field(default="train", metadata={"help": "split to learn from"})
    test_split: str = field(default="validation", metadata={"help": "split that everything is measured on"})
    validation_share: float = field(
        default=0.1, metadata={"help": "share of the training images that is kept for scoring and early stopping"}
    )
    image_column: str = field(default="image", metadata={"help": "of parquet files and Hub datasets"})
    label_column: str = field(default="label", metadata={"help": "of parquet files and Hub datasets"})
    labels: str | None = field(
        default=None,
        metadata={"help": "YAML file: class name in the data → the anchors' label, by number or name; None: the order"},
    )
    image_size: int | None = field(default=None, metadata={"help": "pixels of a side; None: the anchors' own"})
    train_images: int | None = field(default=None, metadata={"help": "use at most so many training images"})
    test_images: int | None = field(default=None, metadata={"help": "use at most so many test images"})
    data_seed: int = field(default=0, metadata={"help": "of the choice of images"})

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"got validation_share={self.validation_share}; expected a number between 0 and 1")
        if len(self.anchors) < 2:
            raise ValueError(f"got {len(self.anchors)} anchor; expected at least two, cheapest first")


def load_task(args: ImageDataArguments, *, own_labels: bool = False) -> ImageTask:
    """Training, validation and test images, processed as the anchors share it.

    Args:
        own_labels: number the classes as the data do, for anchors that get a new head; False: as the anchors do.

    Raises:
        OSError: the data or an anchor's image processor cannot be had.
        ValueError: anchors that process images differently, classes without a label, no such split.
    """
    processing = common_processing(args.anchors, args.image_size)
    train, test = (_split(args, split, processing) for split in (args.train_split, args.test_split))
    if train.names != test.names:
        raise ValueError(
            f"got splits of different classes, {train.names[:5]} … and {test.names[:5]} …; expected the same classes"
        )
    classes = None
    if not own_labels:
        id2label = anchor_config(args.anchors[-1]).id2label
        labels = class_labels(train.names, id2label, args.labels)
        train, test = map_labels(train, labels), map_labels(test, labels)
        classes = None if len(labels) == len(id2label) else tuple(sorted(labels.values()))
    train = _at_most(train, args.train_images, args.data_seed)
    held = max(1, round(args.validation_share * len(train)))
    shuffled = subset(train, count=len(train), seed=args.data_seed)
    return ImageTask(
        train=shuffled.select(range(held, len(shuffled))),
        validation=shuffled.select(range(held)),
        test=_at_most(test, args.test_images, args.data_seed),
        mean=processing.mean,
        std=processing.std,
        classes=classes,
    )


def class_labels(names: tuple[str, ...], id2label: Mapping[int, str], labels: str | Path | None) -> dict[str, int]:
    """The anchors' label of each class of the data.

    Args:
        names: of the data's classes, in order.
        id2label: the anchors' classes.
        labels: YAML file of class name → label number or name. None: classes are in the anchors' order, after the
            background class where the anchors have one; names that are numbers (ImageNet-V2's folders) count as such.

    Raises:
        ValueError: a class without a label, or as many classes as the anchors do not have and no file.
    """
    if labels is not None:
        with understood(labels, "a YAML file of class name: label number or name"):
            given = dict(yaml.safe_load(Path(labels).read_text(encoding="utf-8")))
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"got {labels} without the classes {missing}; expected a label for each of {list(names)}")
        with understood(labels, "a label of the anchors, its number or its name, for each class"):
            by_name = label_ids([given[n] for n in names if not isinstance(given[n], int)], id2label)
            return {name: given[name] if isinstance(given[name], int) else by_name[given[name]] for name in names}
    background = int(str(id2label[0]).lower() == "background")
    if len(names) + background != len(id2label):
        raise ValueError(
            f"got data of {len(names)} classes for anchors of {len(id2label)}; expected as many, in one order. Say "
            "which label each class has with labels=FILE.yaml (class name: label number or name)"
        )
    in_order = sorted(names, key=int) if all(name.isdecimal() for name in names) else names
    return {name: number + background for number, name in enumerate(in_order)}


def _split(args: ImageDataArguments, split: str, processing: Processing) -> ImageSet:
    return load_images(args.data, split, processing, image_column=args.image_column, label_column=args.label_column)


def _at_most(images: ImageSet, count: int | None, seed: int) -> ImageSet:
    return images if count is None or count >= len(images) else subset(images, count=count, seed=seed)
