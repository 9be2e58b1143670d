"""The image recipes' settings files, and the recipes as launched on small anchors and images."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from experiments.image_comparison import ComparisonSettings
from launching import RECIPES, launch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from klas_hf import TrainingConfig
from klas_hf.data.image_data import ImageDataArguments, class_labels, load_task
from klas_hf.options import input_read, parse_options

CLASSES = ("circle", "square", "stripe")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("ima*_*.yaml")), ids=lambda path: path.stem)
def test_settings_files_have_known_options_only(path: Path) -> None:
    if path.stem == "imagenette_labels":
        assert len(yaml.safe_load(path.read_text())) == 10
        return
    sys.path.insert(0, str(RECIPES))
    from imagenet import ImageNetArguments

    argv = ["--config", str(path), "--data", "folder", "--anchors", "a", "b"]
    data, _, settings, training = parse_options(
        ImageDataArguments, ImageNetArguments, ComparisonSettings, TrainingConfig, argv=argv
    )
    given = yaml.safe_load(path.read_text())
    assert training.learning_rate == given["learning_rate"]
    assert settings.rules == given["rules"]
    assert data.test_split == given["test_split"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("cifar100_*.yaml")), ids=lambda path: path.stem)
def test_cifar_settings_files_have_known_options_only(path: Path) -> None:
    sys.path.insert(0, str(RECIPES))
    from cifar100 import CifarArguments

    kinds = ImageDataArguments, CifarArguments, ComparisonSettings, TrainingConfig
    data, args, *_ = parse_options(*kinds, argv=["--config", str(path)])
    assert data.label_column == "fine_label"
    assert args.anchor_epochs == 10


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that a small network can tell apart: 30 training and 15 test images each, two of them corrupt."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 15)):
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (40, 40, 3), dtype=np.uint8)
                pixels[..., number] += 120
                Image.fromarray(pixels).save(folder / split / name / f"{index}.jpeg")
            (folder / split / name / "broken.jpeg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def anchors(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [save_anchor(tmp_path_factory.mktemp(name), width) for name, width in (("small", 8), ("large", 16))]


def save_anchor(folder: Path, width: int, names: tuple[str, ...] = CLASSES) -> str:
    torch.manual_seed(width)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[width, 2 * width], depths=[2, 2], layer_type="basic",
        id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)},
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_imagenet_recipe_runs_and_resumes(images: Path, anchors: list[str], tmp_path: Path, capsys) -> None:
    options = [
        "--data", str(images), "--anchors", *anchors, "--test_split", "val", "--output_dir", str(tmp_path / "out"),
        "--rules", "klas", "random", "every", "--max_steps", "3", "--probe_epochs", "2", "--validation_share", "0.3",
        "--buckets", "3", "--calibration_images", "20",
    ]  # fmt: skip
    launch("imagenet.py", *options)
    first = capsys.readouterr().out
    assert "6 corrupt ones left out" in first
    assert "has the largest area" in first
    for name in ("report.md", "stitches.md", "rows.jsonl", "curve.png", "probes.png", "heatmap-0-1.png", "anchors.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    rows = (tmp_path / "out" / "rows.jsonl").read_text()
    launch("imagenet.py", *options)
    second = capsys.readouterr().out
    assert (tmp_path / "out" / "rows.jsonl").read_text() == rows  # nothing was measured again
    assert second[second.index("## Anchors") :] == first[first.index("## Anchors") :]


@pytest.mark.slow
def test_cifar_recipe_gives_anchors_of_other_classes_a_new_head(images: Path, tmp_path: Path, capsys) -> None:
    others = tuple(f"other{n}" for n in range(5))
    anchors = [save_anchor(tmp_path / name, width, others) for name, width in (("small", 8), ("large", 16))]
    launch(
        "cifar100.py", "--data", str(images), "--anchors", *anchors, "--test_split", "val", "--smoke",
        "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--validation_share", "0.3",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "small: a new head" in printed and "large: a new head" in printed
    saved = ResNetForImageClassification.from_pretrained(tmp_path / "cache" / "small")
    assert list(saved.config.id2label.values()) == list(CLASSES)
    assert saved.classifier[1].out_features == 3


def test_labels_by_order_after_the_background_and_by_file(tmp_path: Path) -> None:
    id2label = {0: "background", 1: "tench, Tinca tinca", 2: "goldfish"}
    assert class_labels(("n01", "n02"), id2label, None) == {"n01": 1, "n02": 2}
    file = tmp_path / "labels.yaml"
    file.write_text("n01: goldfish\nn02: 1\n")
    assert class_labels(("n01", "n02"), id2label, file) == {"n01": 2, "n02": 1}
    with pytest.raises(ValueError, match="labels=FILE"):
        class_labels(("n01",), id2label, None)
    with pytest.raises(ValueError, match="without the classes"):
        class_labels(("n01", "n09"), id2label, file)


def test_a_task_measures_among_the_datas_classes_only(images: Path, tmp_path: Path) -> None:
    names = ("stripe", "nothing", "circle", "square")
    anchors = [save_anchor(tmp_path / name, width, names) for name, width in (("small", 8), ("large", 16))]
    file = tmp_path / "labels.yaml"
    file.write_text("".join(f"{name}: {name}\n" for name in CLASSES))
    with pytest.warns(UserWarning, match="corrupt"):
        task = load_task(ImageDataArguments(str(images), anchors, test_split="val", labels=str(file), train_images=50))
    assert task.classes == (0, 2, 3)
    assert len(task.train) + len(task.validation) == 50
    assert set(task.test.labels) == {0, 2, 3}
    assert task.size == (32, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"anchors": ["one"]}, "at least two"), ({"validation_share": 0.0}, "between 0 and 1")],
)
def test_bad_options_are_refused_before_anything_is_read(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataArguments(**{"data": "nowhere", "anchors": ["a", "b"]} | changes)


@pytest.mark.parametrize("recipe", ["imagenet.py", "cifar100.py", "score_study.py"])
def test_a_typo_in_a_path_ends_in_one_line(
    recipe: str, images: Path, anchors: list[str], tmp_path: Path, capsys
) -> None:
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            launch(recipe, *options)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{recipe}: error: "))
        return line

    given = ["--output_dir", str(tmp_path / "out")]
    given += ["--families", "mobilenet", "--image_size", "16"] if recipe == "score_study.py" else []
    good = ["--data", str(images), "--anchors", *anchors]
    assert "no-such-data" in refused("--data", "./no-such-data", *good[2:], *given)
    assert "no-such-anchor" in refused(*good[:3], "./no-such-anchor", anchors[1], *given)
    labels = ["--test_split", "val", "--labels", str(tmp_path / "no.yaml")]
    if recipe == "imagenet.py":
        assert "no.yaml" in refused(*good, *given, *labels)


def test_options_are_named_as_on_the_command_line(images: Path, anchors: list[str], tmp_path: Path, capsys) -> None:
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((Path(anchors[0]) / "config.json").read_text())
    with pytest.raises(SystemExit, match="2"), input_read(ImageDataArguments("", ["", ""])):
        load_task(ImageDataArguments(str(images), [str(tmp_path), anchors[1]]))
    assert "give --image_size …, one that all take" in capsys.readouterr().err


def test_the_study_of_every_size_takes_classifiers_and_their_images(images: Path, anchors: list[str]) -> None:
    sys.path.insert(0, str(RECIPES))
    from families import FamilyArguments, family_of

    found = family_of(
        FamilyArguments(family="images", anchors=anchors, data=[str(images)], image_size=24, test_split="val")
    )
    assert (len(found.train), len(found.validation)) == (72, 18) and found.metric == "accuracy"
    assert sum(len(batch["labels"]) for batch in found.test) == 45 and found.image_size == 24
    assert [anchor.config.hidden_sizes[0] for anchor in found.anchors] == [8, 16]
