"""Classifiers on image sets: timm's preprocessing against its formulas, metrics against loops, the recipe's rows."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    CLIPImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import benchmark_images as recipe

from klas_hf.data.image_data import class_labels
from klas_hf.data.images import CroppedProcessing, timm_processing
from klas_hf.evaluation import classification_metrics
from klas_hf.rows import read_rows

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = {
    "architecture": "swin_tiny_patch4_window7_224",
    "pretrained_cfg": {
        "input_size": [3, 24, 24], "crop_pct": 0.9, "interpolation": "bicubic", "mean": MEAN, "std": STD,
        "crop_mode": "center",
    },
}  # fmt: skip
CLASSES = 11


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [(40, 31), (31, 40), (33, 33), (57, 24)])
def test_resizing_and_crop_are_those_of_torchvision(width: int, height: int) -> None:
    """By its formulas: ⌊24 / .9⌋ = 26 for the short side, ⌊26 · ratio⌋ for the long one, half a pixel to even."""
    image = picture(width, height)
    wide, high = (26, int(26 * height / width)) if width <= height else (int(26 * width / height), 26)
    resized = np.array(image.resize((wide, high), Image.BICUBIC))
    top, left = int(round((high - 24) / 2.0)), int(round((wide - 24) / 2.0))
    expected = resized[top : top + 24, left : left + 24].transpose(2, 0, 1)
    got = timm_processing(CONFIG).pixels(image)
    assert got.dtype == torch.uint8 and np.array_equal(got.numpy(), expected)


def test_equals_transformers_where_the_crop_is_even() -> None:
    image = picture(64, 26 * 2)  # becomes 32×26: 8 and 2 pixels are left over
    processor = CLIPImageProcessorPil(size={"shortest_edge": 26}, crop_size={"height": 24, "width": 24}, resample=3)
    expected = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(timm_processing(CONFIG).pixels(image), expected.to(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_mode": "squash"}, "expected 'center'"),
        ({"interpolation": "magic"}, "one of nearest, bilinear"),
        ({"crop_pct": 1.2}, "at most 1"),
        ({"input_size": [3, 24, 32]}, "a square"),
    ],
)
def test_other_preprocessing_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_processing(CONFIG["pretrained_cfg"] | changes)
    with pytest.raises(ValueError, match="without \\['crop_pct'"):
        timm_processing({"input_size": [3, 24, 24], "interpolation": "bicubic", "mean": MEAN, "std": STD})


def test_metrics_equal_loops() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(300, CLASSES)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.where(generator.random(300) < 0.5, probabilities.argmax(1), generator.integers(0, CLASSES, 300))
    order = np.argsort(-probabilities, axis=1)
    confidence, right = probabilities.max(1), order[:, 0] == labels
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    found = classification_metrics(probabilities, labels)
    assert found["top1"] == pytest.approx(right.mean())
    assert found["top5"] == pytest.approx(np.mean([label in row[:5] for label, row in zip(labels, order, strict=True)]))
    assert found["calibration_error"] == pytest.approx(error, abs=1e-6)
    assert found["loss"] == pytest.approx(-np.log(probabilities[range(300), labels]).mean())
    assert "top5" not in classification_metrics(probabilities[:, :5] / probabilities[:, :5].sum(1)[:, None], labels % 5)


def test_folders_named_by_numbers_count_as_such() -> None:
    names = tuple(sorted(str(number) for number in range(CLASSES)))  # "0", "1", "10", "2", …, as folders are sorted
    labels = {number: f"label {number}" for number in range(CLASSES)}
    assert class_labels(names, labels, None) == {name: int(name) for name in names}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ResNets of 11 classes, ImageNet-V2-like folders, and one corruption at one severity."""
    folder = tmp_path_factory.mktemp("place")
    for number in range(CLASSES):
        for part in ("v2", "c/blur/3"):
            (folder / part / str(number)).mkdir(parents=True)
            for index in range(2):
                picture(40, 31, 10 * number + index).save(folder / part / str(number) / f"{index}.png")
    for name, width in (("small", 8), ("large", 16)):
        torch.manual_seed(width)
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[width, 2 * width], depths=[1, 1], layer_type="basic", num_labels=CLASSES
        )
        ResNetForImageClassification(config).save_pretrained(folder / name)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def launch(place: Path, output: Path, *more: str) -> None:
    sets = [f"v2={place / 'v2'}", f"blur-3={place / 'c/blur/3'}"]
    words = ["--models", str(place / "small"), str(place / "large"), "--sets", *sets, "--preprocessing"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", *words, str(place / "config.json"), "--output_dir", str(output), *more])
        recipe.main()


def test_the_recipe_measures_every_model_on_every_set_once(place: Path, tmp_path: Path) -> None:
    launch(place, tmp_path)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {(row.rule, row.setting["task"]) for row in rows} == {
        (model, name) for model in ("small", "large") for name in ("v2", "blur-3")
    }
    model = AutoModelForImageClassification.from_pretrained(place / "large").eval()
    processing, right = CroppedProcessing((24, 24), 0.9, "bicubic", MEAN, STD), []
    for number in range(CLASSES):
        for index in range(2):
            pixels = processing.pixels(picture(40, 31, 10 * number + index)) / 255
            normal = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
            with torch.no_grad():
                right.append(int(model(pixel_values=normal[None]).logits.argmax()) == number)
    row = next(one for one in rows if (one.rule, one.setting["task"]) == ("large", "v2"))
    assert row.metrics["top1"] == pytest.approx(np.mean(right)) and sum(row.details["right"]) == sum(right)
    before = (tmp_path / "rows.jsonl").read_text()
    launch(place, tmp_path)
    assert (tmp_path / "rows.jsonl").read_text() == before
    text = (tmp_path / "report.md").read_text()
    assert "| v2: top1 | v2: calibration_error | v2: top5 |" in text and "## Against small" in text
    with pytest.raises(SystemExit):
        launch(place, tmp_path, "--limit", "x")


def test_parquet_and_splits_are_the_same_images_as_folders(place: Path, tmp_path: Path) -> None:
    names = [str(number) for number in range(CLASSES)]
    rows = {"image": [picture(40, 31, 10 * n + k) for n in range(CLASSES) for k in range(2)]}
    rows["label"] = [number for number in range(CLASSES) for _ in range(2)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images.parquet")
    args = recipe.BenchmarkImagesArguments(models=["a"], sets=["v2=x"])
    processing = timm_processing(CONFIG)
    folder, split, table = (
        recipe.image_set(args, one, processing)
        for one in (str(place / "v2"), f"{place}:v2", str(tmp_path / "images.parquet"))
    )
    for image_set in (folder, split, table):
        found: dict[str, list[int]] = {name: [] for name in names}
        for pixels, label in (image_set[place] for place in range(len(image_set))):
            found[image_set.names[label]].append(pixels.sum().item())
        assert {name: sorted(sums) for name, sums in found.items()} == {
            str(number): sorted(processing.pixels(picture(40, 31, 10 * number + k)).sum().item() for k in range(2))
            for number in range(CLASSES)
        }


def test_sets_need_names() -> None:
    with pytest.raises(ValueError, match="expected NAME=PLACE"):
        recipe.BenchmarkImagesArguments(models=["a"], sets=["/data/imagenet"])
