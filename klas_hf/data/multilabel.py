"""Images with any number of labels each: Pascal VOC's folders, parquet files or datasets of the Hub.

VOC's development kit is a folder with `JPEGImages/<name>.jpg` and `ImageSets/Main/<class>_<split>.txt`, where 1 says
that an image has the class, and 0 that it is difficult, which counts as not. A dataset has a column of lists, whose
entries are numbers or names of classes, such as `objects.category` of COCO's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from klas_hf.anchors.classes import ImageClasses, WithClasses
from klas_hf.data.image_processing import Processing
from klas_hf.data.image_sources import StoredImages, open_rows
from klas_hf.data.images import Images


class MultiLabelSet(Dataset, WithClasses):
    """Images of one size with any number of labels; `set[index]` is `(uint8 (channels, height, width), (classes,))`.

    The second is 1 at the classes that an image has and 0 elsewhere, int64.

    Args:
        images: by row, as uint8 tensors: a tensor of them all, or `StoredImages`.
        labels: of each image, the numbers of its classes, in any order, repeated or none.
        names: of the classes.

    Raises:
        ValueError: no images, not as many lists of labels, or a label that no name has.
    """

    def __init__(self, images: Images, labels: Sequence[Sequence[int]], names: Sequence[str]):
        self.images, self.labels, self.names = images, [sorted(set(one)) for one in labels], tuple(names)
        if not len(images) or len(images) != len(self.labels):
            raise ValueError(f"got {len(images)} images and {len(self.labels)} lists of labels; expected one for each")
        wrong = sorted({label for one in self.labels for label in one if not 0 <= label < len(self.names)})
        if wrong:
            raise ValueError(
                f"got the labels {wrong[:5]} for {len(self.names)} classes; expected 0 to {len(names) - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        present = torch.zeros(len(self.names), dtype=torch.int64)
        present[self.labels[index]] = 1
        return self.images[index], present

    @property
    def classes(self) -> ImageClasses:
        return ImageClasses(self.names, tuple(range(len(self.names))), mapped=False)


def load_multilabel_images(
    data: str | Path,
    split: str,
    processing: Processing,
    *,
    names: Sequence[str] | None = None,
    image_column: str = "image",
    label_column: str = "labels",
) -> MultiLabelSet:
    """One split of images with any number of labels each.

    Args:
        data: a folder of VOC's kit, a parquet file or a folder of them, or a Hub id.
        split: its name, of VOC such as "trainval".
        processing: of the backbone, from `common_processing`.
        names: of the classes, as another split has them; None: as the data name them, and where they do not, those
            that occur.
        image_column, label_column: of parquet files and the Hub; a dot leads into a column of mappings.

    Raises:
        FileNotFoundError: `data` does not exist.
        ValueError: the split or a column is missing, entries that are no lists of classes, or other classes than
            `names`.
    """
    folder = Path(data).expanduser()
    if (folder / "ImageSets" / "Main").is_dir():
        rows, found, own = _voc(folder, split)
        image_column = "image"
    else:
        source = f"the split {split!r} of {data}"
        rows = open_rows(data, split, image_column, label_column.split(".")[0])
        found, own = _lists(rows, label_column, source)
    known = tuple(own if names is None else names)
    place = {name: number for number, name in enumerate(known)}
    unknown = sorted({name for one in found for name in one} - place.keys())
    if unknown:
        raise ValueError(f"got {data} with the classes {unknown[:5]}; expected some of {list(known[:5])} …")
    images = StoredImages(rows, image_column, processing)
    return MultiLabelSet(images, [[place[name] for name in one] for one in found], known)


def _voc(folder: Path, split: str) -> tuple[Any, list[list[str]], list[str]]:
    """Rows, the classes of each, and all classes."""
    import datasets

    suffix = f"_{split}.txt"
    files = sorted((folder / "ImageSets" / "Main").glob(f"*{suffix}"))
    if not files:
        raise ValueError(f"got {folder} without ImageSets/Main/<class>{suffix}; expected a file for each class")
    present: dict[str, list[str]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, has = line.strip().partition(" ")
            present.setdefault(name, []).extend([file.name.removesuffix(suffix)] * (has.strip() == "1"))
    paths = [str(folder / "JPEGImages" / f"{name}.jpg") for name in present]
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise ValueError(f"got {folder} without {len(missing)} of its images, such as {missing[0]}; expected all")
    rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))
    return rows, list(present.values()), [file.name.removesuffix(suffix) for file in files]


def _lists(rows: Any, column: str, source: str) -> tuple[list[list[str]], list[str]]:
    """The classes of each row, by name, and all of them."""
    first, *inner = column.split(".")
    values, feature = list(rows[first]), rows.features[first]
    for name in inner:
        if not (isinstance(values[0], dict) and name in values[0]):
            raise ValueError(f"got {source} without {column!r}; expected a column of mappings with {name!r}")
        values, feature = [value[name] for value in values], feature[name]
    if not all(isinstance(one, list) and all(isinstance(entry, int | str) for entry in one) for one in values):
        raise ValueError(f"got {source} with the column {column!r} of {feature}; expected lists of classes")
    names = getattr(getattr(feature, "feature", None), "names", None)
    if names is None:
        entries = {entry for one in values for entry in one}
        numbers = all(isinstance(entry, int) for entry in entries)
        names = [str(n) for n in range(max(entries, default=-1) + 1)] if numbers else sorted(map(str, entries))
    return [[names[entry] if isinstance(entry, int) else entry for entry in one] for one in values], list(names)
