"""Images with a mask of classes per pixel: from folders or Hub datasets to uint8 tensors and masks of one size.

A folder holds `<split>/images/<name>.jpg` and `<split>/labels/<name>.png`, such as CamVid's; a dataset of the Hub two
columns of images, such as ADE20K's. Images are resized bilinearly, masks take the nearest pixel's class. Batches are
`klas_hf.data.images.ImageBatches`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from klas_hf.anchors.classes import ImageClasses, WithClasses
from klas_hf.anchors.images import VOID

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CACHE_BYTES = 2**30


class SegmentationSet(Dataset, WithClasses):
    """Images of one size with their masks; `set[index]` is `(uint8 (3, height, width), int64 (height, width))`.

    Attributes:
        names: of the classes, in the order of their numbers in the masks handed out.
        size: (height, width) in pixels.

    Args:
        pairs: of image and mask, each a path or a PIL image.
        names: as above.
        size: as above.
        void: numbers in the files that are no class; their pixels carry no loss and are not measured.
        reduce_labels: 0 in the files is no class, and 1 the first (ADE20K).
        cache_bytes: images are kept once decoded if the whole set takes at most so many bytes.

    Raises:
        ValueError: no images, or, when it is read, a mask of another size than its image's or with a number that is
            no class; the image is named.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Any, Any]],
        names: Sequence[str],
        size: tuple[int, int],
        *,
        void: Sequence[int] = (),
        reduce_labels: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ):
        if not len(pairs):
            raise ValueError("got no images; expected at least one with its mask")
        self.pairs, self.names, self.size = pairs, tuple(names), size
        self.void, self.reduce_labels, self.cache_bytes = tuple(void), reduce_labels, cache_bytes
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._cache:
            read = self._read(index)
            if len(self) * 4 * read[1].numel() > self.cache_bytes:
                return read[0], read[1].long()
            self._cache[index] = read
        image, mask = self._cache[index]
        return image, mask.long()

    @property
    def classes(self) -> ImageClasses:
        return ImageClasses(self.names, tuple(range(len(self.names))), mapped=False)

    def select(self, indices: Sequence[int]) -> "SegmentationSet":
        """The images at these indices, in their order."""
        return SegmentationSet(
            _Chosen(self.pairs, indices), self.names, self.size, void=self.void, reduce_labels=self.reduce_labels,
            cache_bytes=self.cache_bytes,
        )  # fmt: skip

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        image, mask = (_opened(one) for one in self.pairs[index])
        name = getattr(image, "filename", "") or f"image {index}"
        if image.size != mask.size:
            raise ValueError(
                f"got {name} of {image.size[0]}×{image.size[1]} pixels with a mask of {mask.size[0]}×{mask.size[1]}; "
                "expected a mask of the image's size"
            )
        across = self.size[::-1]
        pixels = np.asarray(image.convert("RGB").resize(across, Image.Resampling.BILINEAR))
        numbers = np.asarray(mask.resize(across, Image.Resampling.NEAREST))
        if numbers.ndim != 2:
            raise ValueError(f"got a mask of {name} with {numbers.shape[2]} channels; expected one, of class numbers")
        return torch.from_numpy(pixels.copy()).movedim(-1, 0), self._classes(numbers, name)

    def _classes(self, numbers: Any, name: str) -> Tensor:
        mask = torch.from_numpy(numbers.astype(np.int16))
        void = torch.isin(mask, torch.tensor([*self.void, VOID], dtype=mask.dtype))
        if self.reduce_labels:
            void, mask = void | (mask == 0), mask - 1
        wrong = mask[~void & ((mask < 0) | (mask >= len(self.names)))]
        if len(wrong):
            raise ValueError(
                f"got class {int(wrong[0]) + self.reduce_labels} in the mask of {name}, which has {len(self.names)} "
                f"classes ({self.names[0]!r} … {self.names[-1]!r}); expected their numbers, {VOID}, or one of "
                f"void={list(self.void)}. Name the number in void if it is no class"
            )
        return torch.where(void, VOID, mask).to(torch.int16)


def load_segmentation(
    data: str | Path,
    split: str,
    names: Sequence[str],
    size: tuple[int, int],
    *,
    image_column: str = "image",
    label_column: str = "annotation",
    **options: Any,
) -> SegmentationSet:
    """One split of images with masks, from a folder or a Hub id.

    Args:
        data: folder with `<split>/images/<name>` and `<split>/labels/<name>.png`, or Hub id.
        names: of the classes, in the order of their numbers.
        size: (height, width) in pixels that all are resized to.
        image_column, label_column: of Hub datasets.
        options: `void`, `reduce_labels`, `cache_bytes` of `SegmentationSet`.

    Raises:
        ValueError: no such split, or images without a mask or masks without an image; they are named.
        OSError: neither a folder nor to be had from the Hub.
    """
    folder = Path(data).expanduser()
    if folder.is_dir():
        return SegmentationSet(_folder_pairs(folder, split), names, size, **options)
    import datasets

    rows = datasets.load_dataset(str(data), split=split)
    return SegmentationSet(_Rows(rows, image_column, label_column), names, size, **options)


class _Chosen(Sequence[tuple[Any, Any]]):
    """Some of the pairs, each opened when it is asked for."""

    def __init__(self, pairs: Sequence[tuple[Any, Any]], indices: Sequence[int]):
        self.pairs, self.indices = pairs, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.pairs[self.indices[index]]


class _Rows(Sequence[tuple[Any, Any]]):
    """Pairs of a Hub dataset, decoded when they are asked for."""

    def __init__(self, rows: Any, image_column: str, label_column: str):
        missing = {image_column, label_column} - set(rows.column_names)
        if missing:
            raise ValueError(f"got no columns {sorted(missing)}; expected some of {rows.column_names}")
        self.rows, self.columns = rows, (image_column, label_column)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row: Mapping[str, Any] = self.rows[index]
        return row[self.columns[0]], row[self.columns[1]]


def _folder_pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    images, masks = (folder / split / kind for kind in ("images", "labels"))
    if not images.is_dir() or not masks.is_dir():
        raise ValueError(f"got {folder / split} without images/ and labels/; expected both, with files of equal names")
    by_name = [
        {path.stem: path for path in sorted(one.iterdir()) if path.suffix.lower() in _SUFFIXES}
        for one in (images, masks)
    ]
    alone = sorted(by_name[0].keys() ^ by_name[1].keys())
    if alone:
        kinds = [f"{name} ({'image' if name in by_name[0] else 'mask'} alone)" for name in alone[:5]]
        raise ValueError(
            f"got {folder / split} with {len(alone)} images or masks that have no other half: {', '.join(kinds)}; "
            "expected a mask of the same name for each image"
        )
    return [(by_name[0][name], by_name[1][name]) for name in sorted(by_name[0])]


def _opened(one: Any) -> Any:
    from PIL import Image

    return Image.open(one) if isinstance(one, str | Path) else one
