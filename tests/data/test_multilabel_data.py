"""Images with any number of labels, from VOC's folders and from columns of lists."""

import io
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil
from voc_folder import NAMES, SIDE, write_voc

from klas_hf.data.image_processing import common_processing
from klas_hf.data.images import image_batches
from klas_hf.data.multilabel import MultiLabelSet, load_multilabel_images

PROCESSING = common_processing([ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})])


def test_voc_s_folders(tmp_path: Path) -> None:
    written = write_voc(tmp_path, {"trainval": 9, "test": 5})
    (tmp_path / "ImageSets" / "Main" / "trainval.txt").write_text("trainval000\n")  # the kit's own list of names
    for split, labels in written.items():
        images = load_multilabel_images(tmp_path, split, PROCESSING)
        assert list(images.names) == NAMES and len(images) == len(labels)
        for index, present in enumerate(labels.values()):
            pixels, found = images[index]
            assert [NAMES[n] for n in found.nonzero().flatten()] == present
            assert pixels.shape == (3, SIDE, SIDE) and pixels.dtype == torch.uint8
            for place, name in enumerate(NAMES):  # the picture is that of the labels
                assert (pixels[2 - place, :, 11 * place + 5].float().mean() > 150) == (name in present)


def test_a_difficult_object_counts_as_none(tmp_path: Path) -> None:
    write_voc(tmp_path, {"test": 3})
    file = tmp_path / "ImageSets" / "Main" / "red_test.txt"
    file.write_text("test000  0\ntest001  1\ntest002 -1\n")
    assert [2 in one for one in load_multilabel_images(tmp_path, "test", PROCESSING).labels] == [False, True, False]


def table(folder: Path, column: str, values: list[Any], feature: Any) -> Path:
    """A parquet file of grey images with a column."""
    data = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "grey").save(data, "PNG")
    images = [{"bytes": data.getvalue(), "path": None}] * len(values)
    features = datasets.Features({"image": datasets.Image(), column: feature})
    rows = datasets.Dataset.from_dict({"image": images, column: values}, features=features)
    rows.to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


NAMED = datasets.ClassLabel(names=["cat", "dog", "emu"])


@pytest.mark.parametrize(
    ("column", "values", "feature", "labels", "names"),
    [
        ("labels", [[2, 0, 2], []], datasets.List(NAMED), [[0, 2], []], ("cat", "dog", "emu")),
        ("labels", [["b"], ["a", "b"]], datasets.List(datasets.Value("string")), [[1], [0, 1]], ("a", "b")),
        ("labels", [[3], [1]], datasets.List(datasets.Value("int64")), [[3], [1]], ("0", "1", "2", "3")),
        ("objects.category", [{"category": [1, 1]}, {"category": [0]}], {"category": datasets.List(NAMED)},
         [[1], [0]], ("cat", "dog", "emu")),
    ],
    ids=["named", "words", "numbers", "within objects"],
)  # fmt: skip
def test_columns_of_lists(
    column: str, values: list, feature: Any, labels: list, names: tuple[str, ...], tmp_path: Path
) -> None:
    file = table(tmp_path, column.split(".")[0], values, feature)
    images = load_multilabel_images(file, "train", PROCESSING, label_column=column)
    assert (images.labels, images.names) == (labels, names)
    (batch,) = image_batches(images, 2, PROCESSING.mean, PROCESSING.std)
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert [row.nonzero().flatten().tolist() for row in batch["labels"]] == labels


def test_classes_of_another_split(tmp_path: Path) -> None:
    file = table(tmp_path, "labels", [["b"], ["a", "b"]], datasets.List(datasets.Value("string")))
    images = load_multilabel_images(file, "train", PROCESSING, names=["b", "x", "a"])
    assert images.labels == [[0], [0, 2]]
    with pytest.raises(ValueError, match=r"with the classes \['b'\]; expected some of \['a', 'x'\]"):
        load_multilabel_images(file, "train", PROCESSING, names=["a", "x"])


def test_what_is_no_such_data_is_refused(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {"test": 3})
    with pytest.raises(ValueError, match="without ImageSets/Main/<class>_train.txt"):
        load_multilabel_images(tmp_path / "voc", "train", PROCESSING)
    (tmp_path / "voc" / "JPEGImages" / "test001.jpg").unlink()
    with pytest.raises(ValueError, match=r"without 1 of its images, such as .*test001.jpg; expected all"):
        load_multilabel_images(tmp_path / "voc", "test", PROCESSING)
    file = table(tmp_path, "labels", [1, 2], datasets.Value("int64"))
    with pytest.raises(ValueError, match="the column 'labels' of .*; expected lists of classes"):
        load_multilabel_images(file, "train", PROCESSING)
    with pytest.raises(ValueError, match=r"without the column\(s\) \['objects'\]"):
        load_multilabel_images(file, "train", PROCESSING, label_column="objects.category")
    with pytest.raises(ValueError, match="without 'labels.category'; expected a column of mappings"):
        load_multilabel_images(file, "train", PROCESSING, label_column="labels.category")
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        load_multilabel_images(tmp_path / "nothing", "test", PROCESSING)


def test_labels_that_do_not_fit_are_refused() -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"got the labels \[3\] for 2 classes; expected 0 to 1"):
        MultiLabelSet(pixels, [[0], [3]], ["a", "b"])
    with pytest.raises(ValueError, match="got 2 images and 1 lists of labels"):
        MultiLabelSet(pixels, [[0]], ["a", "b"])
