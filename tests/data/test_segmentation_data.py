"""Images with masks: folders, sizes, void classes, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from klas_hf.data.images import ImageBatches
from klas_hf.data.segmentation import SegmentationSet, load_segmentation

NAMES = ["road", "sky", "tree"]


def write(folder: Path, name: str, mask: np.ndarray, size: tuple[int, int] | None = None) -> None:
    for kind in ("images", "labels"):
        (folder / "train" / kind).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 256, (*(size or mask.shape), 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "train" / "images" / f"{name}.png")
    Image.fromarray(mask.astype(np.uint8)).save(folder / "train" / "labels" / f"{name}.png")


def test_a_folder_gives_images_and_masks_of_one_size(tmp_path: Path) -> None:
    mask = np.repeat(np.repeat(np.array([[0, 1], [2, 9]]), 4, 0), 6, 1)  # 8×12, quarters
    write(tmp_path, "a", mask)
    write(tmp_path, "b", np.zeros((8, 12)))
    found = load_segmentation(tmp_path, "train", NAMES, (4, 6), void=[9])
    pixels, classes = found[0]
    assert len(found) == 2
    assert (pixels.shape, pixels.dtype) == ((3, 4, 6), torch.uint8)
    assert classes.tolist() == [[0] * 3 + [1] * 3] * 2 + [[2] * 3 + [255] * 3] * 2  # the nearest pixel's, none between
    assert torch.equal(found.select([1])[0][0], found[1][0])
    (batch,) = ImageBatches(found, 2, [0.5] * 3, [0.25] * 3)
    assert batch["labels"].shape == (2, 4, 6)
    torch.testing.assert_close(batch["pixel_values"][0], (pixels / 255 - 0.5) / 0.25)


def test_reduced_labels_begin_at_one() -> None:
    mask = Image.fromarray(np.array([[0, 1], [3, 255]], dtype=np.uint8))
    found = SegmentationSet([(Image.new("RGB", (2, 2)), mask)], NAMES, (2, 2), reduce_labels=True)
    assert found[0][1].tolist() == [[255, 0], [2, 255]]


def test_chosen_images_are_opened_when_they_are_read() -> None:
    class Counted(list):
        opened = 0

        def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:  # type: ignore[override]
            self.opened += 1
            return super().__getitem__(index)

    pairs = Counted((Image.new("RGB", (2, 2), (n, 0, 0)), Image.new("L", (2, 2), n % 3)) for n in range(9))
    found = SegmentationSet(pairs, NAMES, (2, 2)).select([7, 2, 5]).select([2, 0])
    assert len(found) == 2 and pairs.opened == 0
    assert [int(found[n][0][0, 0, 0]) for n in (0, 1)] == [5, 7]
    assert pairs.opened == 2


def test_halves_without_the_other_are_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path, name, np.zeros((4, 4)))
    (tmp_path / "train" / "labels" / "b.png").unlink()
    (tmp_path / "train" / "images" / "c.png").unlink()
    with pytest.raises(ValueError, match=r"b \(image alone\), c \(mask alone\)"):
        load_segmentation(tmp_path, "train", NAMES, (4, 4))
    with pytest.raises(ValueError, match=r"test without images/ and labels/"):
        load_segmentation(tmp_path, "test", NAMES, (4, 4))


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    write(tmp_path, "odd", np.zeros((4, 4)), size=(4, 6))
    with pytest.raises(ValueError, match=r"odd.png of 6×4 pixels with a mask of 4×4"):
        load_segmentation(tmp_path, "train", NAMES, (4, 4))[0]


@pytest.mark.parametrize(("reduce_labels", "number"), [(False, 3), (True, 4)])
def test_a_class_outside_the_names_is_named(tmp_path: Path, reduce_labels: bool, number: int) -> None:
    write(tmp_path, "wild", np.full((4, 4), number))
    found = load_segmentation(tmp_path, "train", NAMES, (4, 4), reduce_labels=reduce_labels)
    with pytest.raises(ValueError, match=f"class {number} in the mask of .*wild.png, which has 3 classes"):
        found[0]


def test_a_mask_of_colours_is_refused() -> None:
    found = SegmentationSet([(Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4)))], NAMES, (4, 4))
    with pytest.raises(ValueError, match="with 3 channels; expected one"):
        found[0]
    with pytest.raises(ValueError, match="got no images"):
        SegmentationSet([], NAMES, (4, 4))
