"""Image data: folders, parquet and Hub datasets give the same sets; corrupt images are counted, never replaced."""

import io
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor

from klas_hf.data import images as module
from klas_hf.data.images import (
    CorruptImage,
    ImageBatches,
    ImageSet,
    Processing,
    common_processing,
    image_batches,
    label_ids,
    load_images,
    map_labels,
    subset,
)

CLASSES = ("n01440764", "n02102040", "n03000684")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anchor")
    settings = {
        "image_processor_type": "MobileNetV1ImageProcessor",
        "size": {"shortest_edge": 18},
        "crop_size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def processing(anchor: Path) -> Processing:
    return common_processing([anchor])


def _picture(seed: int, height: int = 24, width: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _content(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _folder(root: Path, split: str = "train", classes: tuple[str, ...] = CLASSES, each: int = 3) -> Path:
    """Pictures of unequal sizes; picture n of class c has the seed 100 c + n."""
    for number, name in enumerate(classes):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        for n in range(each):
            picture = _picture(100 * number + n, 20 + 3 * n, 34 - 5 * n)
            (root / split / name / f"{n}.png").write_bytes(_content(picture))
    return root


def _rows(each: int = 3) -> dict[str, list]:
    seeds = [(number, n) for number in range(len(CLASSES)) for n in range(each)]
    pictures = [_picture(100 * number + n, 20 + 3 * n, 34 - 5 * n) for number, n in seeds]
    return {"image": pictures, "label": [number for number, _ in seeds]}


def _same(first: ImageSet, second: ImageSet) -> bool:
    pairs = zip(range(len(first)), range(len(second)), strict=True)
    return all(first[a][0].equal(second[b][0]) and first[a][1] == second[b][1] for a, b in pairs)


def _memory_set(labels: list[int], names: int | None = None) -> ImageSet:
    """Image n is filled with n."""
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    return ImageSet(pixels, labels, [f"class {n}" for n in range(names or max(labels) + 1)])


class _Counting:
    """Images that count how often each is read."""

    def __init__(self, number: int):
        self.reads: Counter[int] = Counter()
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, row: int) -> torch.Tensor:
        self.reads[row] += 1
        return torch.full((3, 2, 2), row, dtype=torch.uint8)


# Sources


def test_folder_gives_the_processors_pixels(tmp_path: Path, anchor: Path, processing: Processing) -> None:
    images = load_images(_folder(tmp_path / "data"), "train", processing)
    assert images.names == CLASSES and images.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2] and images.skipped == 0
    processor = AutoImageProcessor.from_pretrained(anchor)
    for index, picture in enumerate(_rows()["image"]):
        pixels, label = images[index]
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16) and label == index // 3
        expected = processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        assert pixels.equal(expected)


@pytest.mark.parametrize("split", ["val", "my-split", "test"])
def test_split_folders_may_have_any_name(split: str, tmp_path: Path, processing: Processing) -> None:
    root = _folder(_folder(tmp_path / "data [1]"), split, each=1)
    assert len(load_images(root, split, processing)) == 3
    assert len(load_images(str(root), "train", processing)) == 9


def test_classes_named_like_splits(tmp_path: Path, processing: Processing) -> None:
    root = _folder(tmp_path / "data", "val", ("test", "train", "valid"))
    images = load_images(root, "val", processing)
    assert images.names == ("test", "train", "valid") and images.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_class_missing_in_one_split_shifts_no_label(tmp_path: Path, processing: Processing) -> None:
    root = _folder(_folder(tmp_path / "data"), "val", (CLASSES[0], CLASSES[2]))
    _folder(root, "notes", ("a", "b"))
    images = load_images(root, "val", processing)
    assert images.names == CLASSES and images.labels == [0, 0, 0, 2, 2, 2]
    assert load_images(root, "notes", processing).names == ("a", "b")


def test_parquet_and_hub_give_the_same_as_the_folder(
    tmp_path: Path, processing: Processing, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    table = datasets.Dataset.from_dict(_rows(), features=features)
    (tmp_path / "tables" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "one.parquet")
    table.select([0, 3]).to_parquet(tmp_path / "tables" / "data" / "train-00000-of-00001.parquet")
    table.to_parquet(tmp_path / "tables" / "data" / "test-00000-of-00001.parquet")
    expected = load_images(_folder(tmp_path / "data"), "train", processing)
    for data, split in ((tmp_path / "one.parquet", "train"), (str(tmp_path / "tables"), "test")):
        found = load_images(data, split, processing)
        assert found.names == CLASSES and _same(found, expected)
    assert len(load_images(tmp_path / "tables", "train", processing)) == 2

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    assert _same(load_images("owner/pictures", "validation", processing), expected)
    assert asked == [("owner/pictures", "validation")]


def test_plain_parquet_with_other_columns(tmp_path: Path, processing: Processing) -> None:
    rows = {"img": [_content(picture) for picture in _rows()["image"]], "fine": [5] * 4 + [7] * 5}
    pd.DataFrame(rows).to_parquet(tmp_path / "plain.parquet")
    images = load_images(tmp_path / "plain.parquet", "train", processing, image_column="img", label_column="fine")
    assert images.labels == [5] * 4 + [7] * 5 and images.names == tuple("01234567")
    assert _same(subset(images, count=9), subset(images, count=9))
    with pytest.raises(ValueError, match=r"without the column\(s\) \['image', 'label'\]; it has \['fine', 'img'\]"):
        load_images(tmp_path / "plain.parquet", "train", processing)
    with pytest.raises(ValueError, match="'fine' of type.*expected images"):
        load_images(tmp_path / "plain.parquet", "train", processing, image_column="fine", label_column="fine")


@pytest.mark.parametrize("labels", [[0, -1], ["cat", "dog"], [0, None]])
def test_labels_must_be_integers_from_0(labels: list, tmp_path: Path, processing: Processing) -> None:
    rows = {"image": [_content(_picture(n)) for n in range(2)], "label": labels}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="expected integers from 0"):
        load_images(tmp_path / "x.parquet", "train", processing)


def test_missing_data_and_splits_are_named(tmp_path: Path, processing: Processing) -> None:
    root = _folder(_folder(tmp_path / "data"), "val")
    with pytest.raises(ValueError, match=r"'test'.*\['train', 'val'\]"):
        load_images(root, "test", processing)
    datasets.Dataset.from_dict({"image": [_content(_picture(0))], "label": [0]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"'test'.*\['train'\]"):
        load_images(tmp_path / "x.parquet", "test", processing)
    for data in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_images(data, "train", processing)


def test_too_few_classes_or_images(tmp_path: Path, processing: Processing) -> None:
    with pytest.raises(ValueError, match="3 images of 1 class.*at least two classes"):
        load_images(_folder(tmp_path / "one", classes=CLASSES[:1]), "train", processing)
    with pytest.raises(ValueError, match="without a readable image"):
        load_images(_folder(tmp_path / "none", each=0), "train", processing)
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "train" / "a.png").write_bytes(_content(_picture(0)))
    with pytest.raises(ValueError, match="no class folders"):
        load_images(tmp_path / "flat", "train", processing)


# Corrupt and unusual images


def _truncated(path: Path) -> None:
    content = _content(_picture(0, 64, 64), "JPEG")
    path.write_bytes(content[: len(content) // 3])


def _text(path: Path) -> None:
    path.write_text("not an image")


def _broken_png(path: Path) -> None:
    content = bytearray(_content(_picture(0)))
    content[40:60] = bytes(20)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("corrupt", [_truncated, _text, _broken_png])
def test_corrupt_images_are_left_out_and_counted(
    corrupt: Callable[[Path], None], tmp_path: Path, processing: Processing
) -> None:
    root = _folder(tmp_path / "data")
    sound = load_images(root, "train", processing)
    for name in CLASSES[:2]:
        corrupt(root / "train" / name / "1x.jpg")
    with pytest.warns(UserWarning, match=r"left out 2 corrupt of 11 images.*n01440764.1x\.jpg"):
        images = load_images(root, "train", processing)
    assert images.skipped == 2 and subset(images, count=3).skipped == 2
    assert _same(images, sound)

    lazy = load_images(root, "train", processing, verify=False)
    assert len(lazy) == 11 and lazy.skipped == 0
    with pytest.raises(CorruptImage, match=r"1x\.jpg.*verify=True"):
        lazy[2]
    assert lazy[3][0].equal(sound[2][0])


def test_verification_is_the_default_of_small_sets_only(
    tmp_path: Path, processing: Processing, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _folder(tmp_path / "data")
    _text(root / "train" / CLASSES[0] / "x.jpg")
    monkeypatch.setattr(module, "VERIFIED_BY_DEFAULT", 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_images(root, "train", processing)) == 10
    with pytest.warns(UserWarning, match="left out 1 corrupt"):
        assert len(load_images(root, "train", processing, verify=True)) == 9
    monkeypatch.setattr(module, "VERIFIED_BY_DEFAULT", 10)
    with pytest.warns(UserWarning, match="left out 1 corrupt"):
        load_images(root, "train", processing)


def test_nothing_readable_is_an_error(tmp_path: Path, processing: Processing) -> None:
    root = tmp_path / "data"
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
        _text(root / "train" / name / "x.jpg")
    with pytest.raises(ValueError, match=r"no image can be decoded.*x\.jpg"):
        load_images(root, "train", processing)
    (root / "train" / CLASSES[0] / "y.png").write_bytes(_content(_picture(0)))
    with pytest.warns(UserWarning, match="left out 3"), pytest.raises(ValueError, match="1 images of 1 class"):
        load_images(root, "train", processing)


def test_file_that_is_gone_is_not_corrupt(tmp_path: Path, processing: Processing) -> None:
    root = _folder(tmp_path / "data")
    images = load_images(root, "train", processing, verify=False)
    (root / "train" / CLASSES[0] / "0.png").unlink()
    with pytest.raises(FileNotFoundError):
        images[0]


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG")]
)
def test_all_modes_become_rgb(mode: str, kind: str, tmp_path: Path, processing: Processing) -> None:
    root = _folder(tmp_path / "data")
    path = root / "train" / CLASSES[0] / "0.png"
    path.write_bytes(_content(_picture(0).convert(mode), kind))
    pixels, _ = load_images(root, "train", processing)[0]
    assert pixels.shape == (3, 16, 16)
    assert pixels.equal(processing.pixels(Image.open(path).convert("RGB")))
    if mode in ("L", "LA", "1"):
        assert pixels[0].equal(pixels[1]) and pixels[0].equal(pixels[2])


def test_orientation_is_applied(tmp_path: Path, processing: Processing) -> None:
    root = _folder(tmp_path / "data")
    picture = _picture(0, 40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise
    picture.save(root / "train" / CLASSES[0] / "0.png", exif=exif)
    expected = processing.pixels(picture.transpose(Image.Transpose.ROTATE_270))
    assert load_images(root, "train", processing)[0][0].equal(expected)


def test_more_than_8_bits_are_refused(tmp_path: Path, processing: Processing) -> None:
    root = _folder(tmp_path / "data")
    deep = Image.fromarray(np.full((20, 20), 40_000, dtype=np.uint16))
    (root / "train" / CLASSES[0] / "0.png").write_bytes(_content(deep))
    with pytest.raises(ValueError, match=r"0\.png.*at most 8 bits"):
        load_images(root, "train", processing)


# Sets


def test_set_is_a_map_style_dataset() -> None:
    images = _memory_set([0, 1, 1, 0, 2])
    pixels, labels = next(iter(DataLoader(images, batch_size=5)))
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] and labels.tolist() == images.labels == [0, 1, 1, 0, 2]
    with pytest.raises(IndexError):
        images[5]


def test_loaded_set_crosses_to_workers(tmp_path: Path, processing: Processing) -> None:
    images = load_images(_folder(tmp_path / "data"), "train", processing, cache_bytes=0)
    loader = DataLoader(images, batch_size=9, num_workers=1, multiprocessing_context="fork")
    pixels, labels = next(iter(loader))
    assert pixels.equal(torch.stack([images[n][0] for n in range(9)])) and labels.tolist() == images.labels


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(2, 4, 2, 2, dtype=torch.uint8), "1 or 3 channels"),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), "1 or 3 channels"),
        (torch.zeros(2, 3, 2, 2), "uint8"),
    ],
)
def test_wrong_tensors(pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSet(pixels, [0, 1], ["a", "b"])[0]


def test_set_checks_its_labels() -> None:
    pixels = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="got no images"):
        ImageSet(pixels[:0], [], ["a", "b"])
    with pytest.raises(ValueError, match="2 images with 1 labels"):
        ImageSet(pixels, [0], ["a", "b"])
    with pytest.raises(ValueError, match="2 names with 1 ids"):
        ImageSet(pixels, [0, 1], ["a", "b"], ids=[0])
    with pytest.raises(ValueError, match=r"labels \[2\]"):
        ImageSet(pixels, [0, 2], ["a", "b"])


def test_cache_keeps_small_sets_and_only_those() -> None:
    size = 4 * 3 * 2 * 2
    for budget, reads in ((size, 1), (size - 1, 2), (0, 2)):
        source = _Counting(4)
        images = ImageSet(source, [0, 1, 0, 1], ["a", "b"], cache_bytes=budget)
        batches = ImageBatches(images, 2, [0.5] * 3, [0.5] * 3)
        source.reads.clear()
        images._cache.clear()
        for _ in range(2):
            list(batches)
        assert set(source.reads.values()) == {reads}
    part = subset(ImageSet(source, [0, 1, 0, 1], ["a", "b"], cache_bytes=size - 1), count=3)
    source.reads.clear()
    for _ in range(2):
        [part[n] for n in range(3)]
    assert sum(source.reads.values()) == 3


def test_subset_of_decoded_images_reads_nothing() -> None:
    source = _Counting(4)
    images = ImageSet(source, [0, 1, 0, 1], ["a", "b"], cache_bytes=2**20)
    [images[n] for n in range(4)]
    source.reads.clear()
    for part in (subset(images, per_class=1), map_labels(images, {"a": 3, "b": 1})):
        [part[n] for n in range(len(part))]
    assert not source.reads


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=40), data=st.data())
def test_subset_draws_without_repetition(labels: list[int], data: st.DataObject) -> None:
    images = _memory_set(labels)
    count, seed = data.draw(st.integers(1, len(labels))), data.draw(st.integers(0, 5))
    part = subset(images, count=count, seed=seed)
    drawn = [int(part[n][0][0, 0, 0]) for n in range(count)]
    assert len(part) == len(set(drawn)) == count
    assert [labels[n] for n in drawn] == part.labels
    assert part.rows == subset(images, count=len(labels), seed=seed).rows[:count]

    per_class = data.draw(st.integers(1, min(Counter(labels).values())))
    balanced = subset(images, per_class=per_class, seed=seed)
    assert Counter(balanced.labels) == dict.fromkeys(set(labels), per_class)
    assert len(set(balanced.rows)) == len(balanced)
    assert [labels[row] for row in balanced.rows] == balanced.labels


def test_subset_depends_on_the_seed() -> None:
    images = _memory_set([0, 1] * 20)
    assert subset(images, count=10).rows == subset(images, count=10, seed=0).rows
    assert subset(images, count=10).rows != subset(images, count=10, seed=1).rows
    assert subset(images, per_class=5).rows != subset(images, per_class=5, seed=1).rows


def test_subset_refuses_what_it_cannot_draw() -> None:
    images = _memory_set([0, 0, 0, 1])
    for wrong in ({}, {"per_class": 1, "count": 1}):
        with pytest.raises(ValueError, match="exactly one"):
            subset(images, **wrong)
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"count={count}; expected 1 to 4"):
            subset(images, count=count)
    with pytest.raises(ValueError, match=r"per_class=2; expected 1 to 1.*'class 1': 1"):
        subset(images, per_class=2)
    with pytest.raises(ValueError, match="per_class=0"):
        subset(images, per_class=0)


# Labels

ID2LABEL = {
    0: "background",
    1: "tench, Tinca tinca",
    2: "goldfish, Carassius auratus",
    3: "crane",
    4: "crane",
    5: "Car",
}


def test_label_ids_match_by_name_wordnet_id_and_synonym() -> None:
    assert label_ids(["tench, Tinca tinca"], ID2LABEL) == {"tench, Tinca tinca": 1}
    assert label_ids(["Goldfish", "TENCH", "car"], ID2LABEL) == {"Goldfish": 2, "TENCH": 1, "car": 5}
    assert label_ids(["tench"], {str(key): label for key, label in ID2LABEL.items()}) == {"tench": 1}
    wordnet = {0: "n01440764", 1: "n02102040 English springer", 2: "n03000684: chain saw, chainsaw"}
    folders = ["n03000684", "n01440764_tench", "n02102040"]
    assert label_ids(folders, wordnet) == {"n03000684": 2, "n01440764_tench": 0, "n02102040": 1}
    assert label_ids(["car"], {0: "Car", 1: "car"}) == {"car": 1}  # as it is comes first


def test_label_ids_list_all_that_fit_none_or_several() -> None:
    with pytest.raises(ValueError) as caught:
        label_ids(["tench", "crane", "n03000684", "Tinca tinca"], ID2LABEL)
    message = str(caught.value)
    for part in ("'crane' (labels [3, 4])", "'n03000684' (none)", "'Tinca tinca' (none)", "--labels"):
        assert part in message
    assert "'tench'" not in message


def test_mapped_labels_are_those_of_the_names() -> None:
    images = _memory_set([0, 1, 2, 1])
    mapped = map_labels(images, {"class 0": 7, "class 1": 0, "class 2": 999, "class 3": 1})
    assert mapped.labels == [7, 0, 999, 0] and mapped.ids == (7, 0, 999) and mapped.names == images.names
    assert [mapped[n][1] for n in range(4)] == mapped.labels and images.labels == [0, 1, 2, 1]
    assert [int(mapped[n][0][0, 0, 0]) for n in range(4)] == [0, 1, 2, 3]
    assert map_labels(mapped, {"class 0": 0, "class 1": 1, "class 2": 2}).labels == images.labels
    assert Counter(subset(mapped, per_class=1).labels) == {7: 1, 0: 1, 999: 1}


def test_mappings_that_do_not_fit() -> None:
    images = _memory_set([0, 1])
    with pytest.raises(ValueError, match=r"without the classes \['class 1'\]"):
        map_labels(images, {"class 0": 1})
    for label in ("3", 3.0, True):
        with pytest.raises(TypeError, match="expected integers"):
            map_labels(images, {"class 0": label, "class 1": 4})
    for label in (-1, 4):
        with pytest.raises(ValueError, match="a label of its own, from 0"):
            map_labels(images, {"class 0": label, "class 1": 4})


# Batches


@pytest.mark.parametrize("batch_size", [1, 4, 9, 20])
def test_batches_are_what_the_processor_makes(
    batch_size: int, tmp_path: Path, anchor: Path, processing: Processing
) -> None:
    images = load_images(_folder(tmp_path / "data"), "train", processing)
    batches = image_batches(images, batch_size, processing.mean, processing.std)
    first, again = list(batches), list(batches)
    assert len(first) == len(batches) and [len(batch["labels"]) for batch in first[:-1]] == [batch_size] * (
        len(first) - 1
    )
    expected = AutoImageProcessor.from_pretrained(anchor)(_rows()["image"], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in first]), expected)
    assert torch.cat([batch["labels"] for batch in first]).tolist() == images.labels
    assert all(batch["labels"].dtype == torch.int64 for batch in first)
    assert all(a[key].equal(b[key]) for a, b in zip(first, again, strict=True) for key in a)


def test_batches_of_some_images_are_drawn_at_random() -> None:
    images = _memory_set([0] * 20 + [1] * 20)
    batches = image_batches(images, 4, [0.0] * 3, [1.0] * 3, count=10)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert {label for batch in batches for label in batch["labels"].tolist()} == {0, 1}  # the first ten are all 0
    assert [batch["labels"].tolist() for batch in batches] == [batch["labels"].tolist() for batch in batches]


def test_batches_that_cannot_be_made() -> None:
    images = _memory_set([0, 1])
    with pytest.raises(ValueError, match="batch_size=0"):
        ImageBatches(images, 0, [0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match=r"3 channel\(s\), 1 mean"):
        ImageBatches(images, 1, [0.5], [0.5])


def test_a_seed_gives_batches_a_random_order_that_stays() -> None:
    pixels = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 2, 2)
    images = ImageSet(pixels, [n // 20 for n in range(40)], ("a", "b"))
    plain, mixed, other = (ImageBatches(images, 8, (0.0,), (1.0,), seed=seed) for seed in (None, 3, 4))
    order = [
        torch.cat([batch["pixel_values"][:, 0, 0, 0] * 255 for batch in one]).round().int()
        for one in (plain, mixed, other)
    ]
    assert order[0].tolist() == list(range(40))
    assert sorted(order[1].tolist()) == list(range(40)) and order[1].tolist() != order[0].tolist()
    assert order[1].tolist() != order[2].tolist()
    assert [batch["labels"].tolist() for batch in mixed] == [batch["labels"].tolist() for batch in mixed]
    assert all(0 < batch["labels"].sum() < 8 for batch in mixed)


@pytest.mark.parametrize(("asked", "there"), [("validation", "val"), ("val", "validation"), ("valid", "val")])
def test_the_validation_split_has_several_names(asked: str, there: str) -> None:
    from klas_hf.data.image_sources import _same_split

    assert _same_split(asked, ["test", "train", there]) == there
    assert _same_split(asked, ["test", "train"]) is None and _same_split("test", [there]) is None
