"""Saving and loading stitched classifiers: as any model of transformers."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vision import (
    CLASSES,
    KINDS,
    LABELS,
    images,
    logits,
    middle,
    reference_logits,
    tensors_in,
    tiny_pair,
    tiny_path,
    tiny_stitched,
)
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from klas_hf import StitchedForImageClassification, StitchedModel
from klas_hf.models import StitchedVisionConfig


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_gives_the_same_model(kind: str, tmp_path: Path) -> None:
    model = tiny_stitched(*middle(kind))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = logits(model, images(kind))
    for loader in (AutoModelForImageClassification, StitchedModel, StitchedForImageClassification):
        loaded = copy.deepcopy(loader.from_pretrained(tmp_path))  # a copy is aligned in memory as the first model is
        assert type(loaded) is StitchedForImageClassification
        assert loaded.dtype == torch.float64
        assert torch.equal(logits(loaded, images(kind)), expected)
        assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}


@pytest.mark.parametrize("kind", ["vit", "swinv2", "levit", "bottleneck", "convnext"])
def test_a_model_saved_again_is_the_same(kind: str, tmp_path: Path) -> None:
    tiny_stitched(*middle(kind)).save_pretrained(tmp_path / "once")
    StitchedModel.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    once, twice = tensors_in(tmp_path / "once"), tensors_in(tmp_path / "twice")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "twice")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", ["vit", "swin", "levit", "resnet"])
def test_a_model_in_bfloat16_is_saved_and_loaded_in_it(kind: str, tmp_path: Path) -> None:
    source, target, stitch = middle(kind)
    model = tiny_stitched(source, target, stitch, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    pixels = images(kind, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = StitchedModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, pixels), logits(model, pixels))
    weight, bias = (
        tensor.detach().double() for tensor in (model.stitching_layers()[0].weight, model.stitching_layers()[0].bias)
    )
    expected = reference_logits(source, target, stitch, weight, bias, images(kind))
    torch.testing.assert_close(logits(model, pixels).double(), expected, rtol=0.1, atol=0.1 * float(expected.std()))


@pytest.mark.parametrize("kind", ["resnet", "swin"])
def test_a_model_made_from_a_configuration_is_of_one_dtype(kind: str) -> None:
    """Though the anchors' configurations name others."""
    source, target, stitch = middle(kind)
    source.config.dtype, target.config.dtype = torch.float64, torch.bfloat16
    config = tiny_stitched(source, target, stitch).config
    for dtype in (None, "float64"):
        config.dtype = dtype
        model = AutoModelForImageClassification.from_config(config)
        expected = torch.float64 if dtype else torch.float32
        floating = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        assert {tensor.dtype for tensor in floating} == {expected}
        assert logits(model, images(kind, dtype=expected)).isfinite().all()
    assert {tensor.dtype for tensor in StitchedForImageClassification(config).parameters()} == {torch.float32}


def test_labels_are_the_targets_and_are_kept(tmp_path: Path) -> None:
    for kind in ("vit", "levit_teacher"):
        model = tiny_stitched(*middle(kind))
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["id2label"] == {str(number): name for number, name in LABELS.items()}
        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config) is StitchedVisionConfig
        assert config.id2label == LABELS
        assert config.label2id == {name: number for number, name in LABELS.items()}
        assert config.num_labels == CLASSES


@pytest.mark.parametrize("kind", ["vit", "deit_teacher", "levit", "resnet", "swin"])
def test_another_number_of_labels_makes_a_new_head(kind: str, tmp_path: Path) -> None:
    model = tiny_stitched(*middle(kind))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert logits(loaded, images(kind)).shape == (2, 7)
    assert loaded.config.num_labels == 7
    old, new = model.state_dict(), loaded.state_dict()
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name].shape != new[name].shape}
    assert {new[name].shape[0] for name in changed} == {7}
    assert changed
    assert all("classifier" in name for name in changed)
    assert all(torch.equal(old[name], new[name]) for name in old.keys() - changed)
    loaded.save_pretrained(tmp_path / "again")
    again = StitchedModel.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, images(kind)), logits(loaded, images(kind)))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_pipeline_takes_a_saved_folder(kind: str, tmp_path: Path) -> None:
    model = tiny_stitched(*middle(kind))
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    classify = pipeline("image-classification", model=str(tmp_path), image_processor=processor, device="cpu")
    answers = classify(image, top_k=CLASSES)
    inputs = processor(image, return_tensors="pt")["pixel_values"].double()
    expected = logits(model, inputs)[0].softmax(-1)
    assert {answer["label"]: answer["score"] for answer in answers} == {
        LABELS[number]: pytest.approx(float(share), abs=1e-5) for number, share in enumerate(expected)
    }
    by_name = pipeline("image-classification", model=str(tmp_path), device="cpu")  # the processor is in the folder
    assert by_name(image, top_k=1)[0] == answers[0]


@pytest.mark.parametrize("path", ["0[:1] 1[1:]", "1[:1] 0[1:]"])
def test_the_image_processor_of_the_anchor_that_embeds_is_saved(path: str, tmp_path: Path) -> None:
    anchors = []
    for number, anchor in enumerate(tiny_pair("vit")):
        anchors.append(tmp_path / str(number))
        anchor.save_pretrained(anchors[-1])
        ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1 * number] * 3).save_pretrained(
            anchors[-1]
        )
    model = tiny_path(anchors, path)
    model.save_pretrained(tmp_path / "stitched")
    found = json.loads((tmp_path / "stitched" / "preprocessor_config.json").read_text())
    assert found["image_mean"] == [0.1 * int(path[0])] * 3
    classify = pipeline("image-classification", model=str(tmp_path / "stitched"), device="cpu")
    image = Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8))
    assert len(classify(image, top_k=2)) == 2


def test_anchors_without_an_image_processor_or_in_memory_save_none(tmp_path: Path) -> None:
    pair = tiny_pair("vit")
    for number, anchor in enumerate(pair):
        anchor.save_pretrained(tmp_path / str(number))
    for name, anchors in (("folders", [tmp_path / "0", tmp_path / "1"]), ("memory", list(pair))):
        tiny_path(anchors, "0[:1] 1[1:]").save_pretrained(tmp_path / name)
        assert not (tmp_path / name / "preprocessor_config.json").exists()


def test_the_commit_of_anchors_in_memory_is_kept() -> None:
    pair = tiny_pair("vit")
    pair[0].config._commit_hash = "0" * 40
    assert tiny_path(list(pair), "0[:1] 1[1:]").config.anchor_revisions == ["0" * 40, None]


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    for kind in ("swin", "levit"):
        model = tiny_stitched(*middle(kind))
        expected = logits(model, images(kind))
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(logits(copied, images(kind)), expected)
