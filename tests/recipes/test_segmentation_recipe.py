"""The segmentation recipe: its settings files, and a run on small images that goes on where it stopped."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from experiments.segmentation_comparison import SegmentationSettings
from PIL import Image
from tiny_dense import NAMES, tiny_backbone, tiny_dense
from transformers import ResNetConfig, ResNetForImageClassification

from klas_hf import TrainingConfig, measure_costs
from klas_hf.options import parse_options

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["ade20k_mask2former", "camvid_mobilenet"])
def test_settings_files_have_known_options_only(name: str) -> None:
    sys.path.insert(0, str(RECIPES))
    from segmentation import SegmentationArguments

    path = RECIPES / f"{name}.yaml"
    argv = ["--config", str(path), "--data", "folder", "--anchors", "a", "b"]
    args, settings, training = parse_options(SegmentationArguments, SegmentationSettings, TrainingConfig, argv=argv)
    given = yaml.safe_load(path.read_text())
    assert training.max_steps == given["max_steps"]
    assert training.trainable == "backbone"
    assert settings.buckets == 3
    assert args.image_size == given["image_size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--anchors", "a"], "expected two"),
        (["--anchors", "a", "b", "--rules", "best"], "'best'"),
        (["--anchors", "a", "b", "--image_size", "4"], "expected height and width"),
        (["--anchors", "a", "b", "--scored_images", "0"], "got scored_images=0; expected at least 1"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(RECIPES))
    from segmentation import SegmentationArguments

    with pytest.raises(SystemExit):
        parse_options(SegmentationArguments, SegmentationSettings, TrainingConfig, argv=["--data", "folder", *options])
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Halves of colours that stand for classes."""
    folder, generator = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    colours = generator.integers(0, 256, (len(NAMES), 3))
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            mask = np.repeat(np.repeat(generator.integers(0, len(NAMES), (2, 2)), 32, 0), 32, 1)
            pixels = colours[mask] + generator.integers(-20, 20, (64, 64, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(mask.astype(np.uint8)).save(folder / split / "labels" / f"{number}.png")
    return folder


def run(*options: str, launcher: Sequence[str] = ()) -> str:
    command = [sys.executable, *launcher, str(RECIPES / "segmentation.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the form of ADE20K: two splits, images of several sizes, masks of 1 to 150 and of 0, which is none."""
    folder, generator = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("training", 12), ("validation", 6)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            coarse = generator.integers(0, 151, (4 + number % 3, 6 - number % 2))
            mask = np.kron(coarse, np.ones((16, 16))).astype(np.uint8)
            pixels = generator.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / "images" / f"ADE_{number:08d}.jpg")
            Image.fromarray(mask).save(folder / split / "labels" / f"ADE_{number:08d}.png")
    return folder


PUBLISHED = (False, {"image_size": 224}), (True, {"image_size": 384, "window_size": 4})  # each of its own size


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_papers_setting_runs_on_noise(processes: int, scenes: Path, tmp_path: Path) -> None:
    names = {f"class {number}": number for number in range(150)}
    labels = {"id2label": {number: name for name, number in names.items()}, "label2id": names}
    anchors = [
        tiny_dense("mask2former", seed=large, backbone_config=tiny_backbone("swin", large=large, **fields), **labels)
        for large, fields in PUBLISHED
    ]
    for name, model in zip(("small", "large"), anchors, strict=True):
        model.save_pretrained(tmp_path / name)
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    run(
        "--config", str(RECIPES / "ade20k_mask2former.yaml"), "--data", str(scenes), "--anchors",
        str(tmp_path / "small"), str(tmp_path / "large"), "--image_size", "64", "64", "--max_steps", "2",
        "--probe_epochs", "1", "--calibration_images", "8", "--search_forwards", "2000", "--num_workers", "1",
        "--scored_images", "4", "--batch_size", "2", "--output_dir", str(tmp_path / "out"), launcher=launcher,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()[1:]]
    given = {row["path"]: row["macs"] for row in rows if row["rule"] == "as given"}
    assert given == {f"{n}[:]": measure_costs(anchor, image_size=64).macs for n, anchor in enumerate(anchors)}
    assert {row["rule"] for row in rows} == {"as given", "anchor", "klas", "snnet", "functional", "search", "random"}
    found = [json.loads(line) for line in (tmp_path / "out" / "search.jsonl").read_text().splitlines()[1:]]
    assert {row["details"]["items"] for row in found if row["setting"]["batches"] is None} == {4}  # of six
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| class {number} |" in report for number in range(150))


@pytest.mark.slow
def test_dense_anchors_are_compared_and_nothing_is_done_twice(images: Path, tmp_path: Path) -> None:
    anchors = [tmp_path / "small", tmp_path / "large"]
    for folder, model in zip(anchors, (tiny_dense("upernet"), tiny_dense("upernet", large=True)), strict=True):
        model.save_pretrained(folder)
    options = [
        "--data", str(images), "--anchors", *map(str, anchors), "--image_size", "64", "64", "--max_steps", "2",
        "--trainable", "backbone", "--probe_epochs", "2", "--calibration_images", "8", "--per_device_batch_size", "4",
        "--search_forwards", "300", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    first = run(*options)
    for name in ("report.md", "rows.jsonl", "curve.png", "predictions.png", "scores.safetensors", "search.jsonl"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    rows = (tmp_path / "out" / "rows.jsonl").read_text()
    second = run(*options)
    assert (tmp_path / "out" / "rows.jsonl").read_text() == rows
    assert second[second.index("## Anchors") :] == first[first.index("## Anchors") :]
    assert all(f"| {rule} |" in first for rule in ("klas", "snnet", "functional", "search", "random"))


@pytest.mark.slow
def test_classifiers_get_a_head_first(images: Path, tmp_path: Path) -> None:
    anchors = []
    for name, width in (("small", 8), ("large", 16)):
        torch.manual_seed(width)
        widths = [width, width + 4, width + 8, width + 12]
        config = ResNetConfig(embedding_size=8, hidden_sizes=widths, depths=[2, 2, 1, 1], layer_type="basic")
        ResNetForImageClassification(config).save_pretrained(tmp_path / name)
        anchors.append(str(tmp_path / name))
    printed = run(
        "--data", str(images), "--anchors", *anchors, "--class_names", *NAMES, "--image_size", "64", "64",
        "--head_width", "8", "--smoke", "--output_dir", str(tmp_path / "out"), "--gradient_accumulation_steps", "1",
    )  # fmt: skip
    assert (tmp_path / "out" / "anchors" / "1" / "model.safetensors").exists()
    assert "bucket 3" in printed
