"""Where images come from: imagefolders, parquet files and Hub datasets, all read through Hugging Face's datasets.

Opening a split reads labels and file names only; an image is decoded when it is asked for.
"""

from glob import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from klas_hf.data.image_processing import CroppedProcessing, Processing

_VALIDATION = ("validation", "valid", "val")  # names of one split
_DEEPER_MODES = ("I", "F")  # Pillow's modes of more than 8 bits, whose conversion to RGB clips


class CorruptImage(ValueError):
    """An image that cannot be decoded; the message names it."""


class StoredImages:
    """Images of an open split, decoded, resized and cropped when asked for.

    Args:
        dataset: rows of datasets, as `open_split` gives them.
        column: its images, as bytes or paths.
        processing: resizes and crops.
    """

    def __init__(self, dataset: Any, column: str, processing: Processing | CroppedProcessing):
        self.dataset, self.column, self.processing = dataset.select_columns([column]), column, processing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Tensor:
        """`(3, height, width)`, uint8; grey, palette and CMYK images become RGB, transparency is dropped.

        Raises:
            CorruptImage: the image cannot be decoded.
            FileNotFoundError: its file is gone.
            ValueError: it has more than 8 bits per channel.
        """
        stored = self.dataset[row][self.column]
        name = stored["path"] or f"the image of row {row}"
        content = Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]
        return self.processing.pixels(_rgb(content, name))


def _rgb(content: bytes, name: str) -> Any:
    from PIL import Image, ImageOps

    try:
        image = Image.open(BytesIO(content))
        image.load()
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to, SyntaxError among it
        raise CorruptImage(
            f"got {name}, which cannot be decoded ({error}); expected an image: mend or remove it, or load with "
            "verify=True, which leaves corrupt images out and counts them"
        ) from error
    if image.mode.startswith(_DEEPER_MODES):
        raise ValueError(
            f"got {name} in Pillow's mode {image.mode!r}; expected at most 8 bits per channel: convert it, choosing "
            "the range that is kept"
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def open_split(
    data: str | Path, split: str, image_column: str, label_column: str
) -> tuple[Any, list[int], tuple[str, ...]]:
    """Open one split: its rows, with undecoded images, their labels, and the names of the classes.

    Args and errors are those of `load_images`.
    """
    folder = Path(data).expanduser()
    source = f"the split {split!r} of {data}"
    is_image_folder = folder.is_dir() and not any(folder.glob("*.parquet")) and not any(folder.glob("*/*.parquet"))
    rows = _image_folder(folder, split) if is_image_folder else _table(data, folder, split)
    rows = _undecoded(rows, source, image_column, label_column)
    labels, names = _labels(rows, source, label_column)
    if not is_image_folder:
        return rows, labels, names
    ordered = _class_names(folder, str(_same_split(split, _folders(folder))))
    place = [ordered.index(name) for name in names]
    return rows, [place[label] for label in labels], ordered


def open_rows(data: str | Path, split: str, image_column: str, label_column: str) -> Any:
    """Rows of one split of a parquet file, a folder of them, or a Hub dataset, with undecoded images.

    Raises:
        FileNotFoundError, ValueError: as `load_images`.
    """
    rows = _table(data, Path(data).expanduser(), split)
    return _undecoded(rows, f"the split {split!r} of {data}", image_column, label_column)


def _image_folder(folder: Path, split: str) -> Any:
    import datasets

    splits = _folders(folder)
    if _same_split(split, splits) is None:
        raise ValueError(f"got split {split!r} of {folder}; expected one of its folders {splits}")
    split = str(_same_split(split, splits))
    if not _folders(folder / split):
        raise ValueError(f"got {folder / split}, which has no class folders; expected <split>/<class>/<image>")
    # Our own pattern: left to itself, datasets reads split names out of any part of a path, a class "train" too.
    pattern = f"{escape(str(folder / split))}/*/*"
    try:
        return datasets.load_dataset(
            "imagefolder", data_files={"train": pattern}, split="train", drop_labels=False, drop_metadata=True
        )
    except (FileNotFoundError, datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(f"got {folder / split} without a readable image; expected <split>/<class>/<image>") from error


def _class_names(folder: Path, split: str) -> tuple[str, ...]:
    """Class folders of the split and of its siblings, so that a class that one of them lacks shifts no label."""
    own = set(_folders(folder / split))
    siblings = (set(_folders(folder / other)) for other in _folders(folder))
    return tuple(sorted(own.union(*(classes for classes in siblings if classes & own))))


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _table(data: str | Path, path: Path, split: str) -> Any:
    import datasets

    if not path.exists():
        if isinstance(data, Path) or str(data).startswith((".", "~", "/")) or str(data).count("/") > 1:
            raise FileNotFoundError(f"got {data}, which does not exist; expected a folder, a parquet file or a Hub id")
        return datasets.load_dataset(str(data), split=split)
    where = {"data_dir": str(path)} if path.is_dir() else {"data_files": str(path)}
    splits = datasets.load_dataset("parquet", **where)
    name = _same_split(split, sorted(splits))
    if name is None:
        raise ValueError(
            f"got split {split!r} of {data}; expected one of {sorted(splits)} (datasets names splits after the files "
            "of a folder; a single file is the split 'train')"
        )
    return splits[name]


def _same_split(split: str, splits: list[str]) -> str | None:
    """The split's name among those there are; the validation split has several."""
    if split in splits or split not in _VALIDATION:
        return split if split in splits else None
    return next((name for name in splits if name in _VALIDATION), None)


def _undecoded(rows: Any, source: str, image_column: str, label_column: str) -> Any:
    from datasets import Image

    missing = [column for column in (image_column, label_column) if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"got {source} without the column(s) {missing}; it has {sorted(rows.column_names)}: name them by "
            "image_column=… and label_column=…"
        )
    try:
        return rows.cast_column(image_column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"got {source} with the column {image_column!r} of type {rows.features[image_column]}; expected images, "
            "their bytes or their paths"
        ) from error


def _labels(rows: Any, source: str, column: str) -> tuple[list[int], tuple[str, ...]]:
    from datasets import ClassLabel

    labels = list(rows[column])
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        wrong = next(label for label in labels if not isinstance(label, int) or label < 0)
        raise ValueError(
            f"got {source} with the label {wrong!r} in column {column!r}; expected integers from 0: choose a split "
            "that has labels, and encode names with datasets' class_encode_column"
        )
    if isinstance(rows.features[column], ClassLabel):
        return labels, tuple(rows.features[column].names)
    return labels, tuple(str(label) for label in range(max(labels, default=-1) + 1))
