"""Classifiers with KAN heads as models of transformers: saved, loaded, trained; damaged files; many heads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from failing_disk import full_disk
from image_examples import ToyImages, changed
from kan_examples import naive_head, tiny_kan
from safetensors.torch import load_file, save_file
from tiny_vision import tiny_pair
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from klas_hf import (
    KANConfig,
    KANForImageClassification,
    KANForManyTasks,
    StitchedModel,
    TrainingConfig,
    compress_kan,
    head_bytes,
    train_stitches,
)

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: KANForImageClassification, pixels: Tensor = PIXELS) -> Tensor:
    return model(pixels).logits


@torch.no_grad()
@pytest.mark.parametrize("stitched", [False, True], ids=["ResNet backbone", "stitched backbone"])
def test_the_head_reads_means_of_the_last_feature_map(stitched: bool) -> None:
    model = tiny_kan(stitched=stitched)
    features = model.backbone(PIXELS).feature_maps[-1].numpy().mean((2, 3))
    assert features.shape == (2, 24 if stitched else 16)
    layers = [(one.coefficients.numpy(), None) for one in model.head.layers]
    np.testing.assert_allclose(logits(model).numpy(), naive_head(features, layers, model.config.grid), atol=1e-4)


@torch.no_grad()
def test_a_stitched_classifier_gives_its_backbone_and_keeps_its_weights() -> None:
    classifier = StitchedModel.from_anchors(*tiny_pair("resnet"), stitch=(1, 2)).float()
    model = KANForImageClassification.from_backbone(classifier, num_labels=4)
    expected = classifier(PIXELS, output_hidden_states=True).hidden_states[-1].mean((2, 3))
    torch.testing.assert_close(model.pooled(PIXELS), expected)
    model.backbone.slices[0].get_parameter("resnet.embedder.embedder.convolution.weight").zero_()
    assert classifier.slices[0].get_parameter("resnet.embedder.embedder.convolution.weight").any()


def test_the_old_classifier_survives_a_full_disk(tmp_path: Path) -> None:
    tiny_kan().save_pretrained(tmp_path)
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with full_disk(len(kept["model.safetensors"]) // 2), pytest.raises(Exception, match="(?i)too large|os error 27"):
        tiny_kan(grid_intervals=6).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("stitched", [False, True], ids=["ResNet backbone", "stitched backbone"])
@pytest.mark.parametrize("codebook", [None, 16, 100])
def test_what_is_saved_loads_through_the_auto_classes(codebook: int | None, stitched: bool, tmp_path: Path) -> None:
    model = tiny_kan(stitched=stitched, base="silu", grid_intervals=6, spline_order=2)
    model = model if codebook is None else compress_kan(model, codebook)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is KANForImageClassification
    for name in ("grid", "base", "hidden_widths", "compression", "id2label"):
        assert getattr(again.config, name) == getattr(model.config, name)
    assert torch.equal(logits(again), logits(model))
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    file = load_file(tmp_path / "model.safetensors")
    in_file = sum(one.numel() * one.element_size() for name, one in file.items() if not name.startswith("backbone."))
    assert in_file == head_bytes(model)
    if codebook is not None:
        half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.head.layers[0].indices.dtype == torch.uint8
        torch.testing.assert_close(half(PIXELS.bfloat16()).logits.float(), logits(model), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("trainable", ["head", "full"])
def test_heads_train_in_our_loop(trainable: str) -> None:
    model, data = tiny_kan(num_labels=3), ToyImages()
    before = KANForImageClassification(model.config)
    before.load_state_dict(model.state_dict())
    config = TrainingConfig(
        trainable=trainable, max_steps=15, per_device_batch_size=14, gradient_accumulation_steps=1, learning_rate=1e-2
    )
    result = train_stitches(model, data, config)
    assert result.losses[-1] < 0.7 * result.losses[0]
    names = changed(model, before)
    assert (
        all(name.startswith("head.") for name in names) == (trainable == "head")
        and "head.layers.0.coefficients" in names
    )
    assert model.config.training["settings"]["trainable"] == trainable
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_heads_alone_are_trained_where_there_is_one() -> None:
    config = TrainingConfig(trainable="head", max_steps=1)
    with pytest.raises(ValueError, match="got trainable='head' and low_rank_stitches=0 for ViTFor.* expected a KANFor"):
        train_stitches(tiny_pair("vit")[0], ToyImages(), config)
    small = compress_kan(tiny_kan(num_labels=3), 16)
    with pytest.raises(ValueError, match="for KANForImageClassification; expected .* with a dense head"):
        train_stitches(small, ToyImages(), config)


def test_heads_train_in_the_trainer(tmp_path: Path) -> None:
    model, images = tiny_kan(num_labels=3), ToyImages(floats=True)
    data = [{"pixel_values": pixels, "labels": label} for pixels, label in (images[n] for n in range(len(images)))]
    settings = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=15, logging_steps=1, learning_rate=1e-2,
        per_device_train_batch_size=14, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    run = Trainer(model, settings, train_dataset=data, data_collator=default_data_collator)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    run.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))


def test_an_other_thing_than_a_backbone_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got a backbone of ViTFor.*StitchedModel.from_path\(\[classifier\]"):
        KANForImageClassification.from_backbone(tiny_pair("vit")[0], num_labels=2)


# ---- damaged files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kan")
    compress_kan(tiny_kan(), 100).save_pretrained(folder)
    return folder


def copy(saved: Path, folder: Path) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((saved / "config.json").read_text()), load_file(saved / "model.safetensors")


def write(folder: Path, config: dict, state: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("head.layers.1.indices", 255, "got layer 1 with shape 127 of a codebook of 100. Expected the tensors that"),
        ("head.layers.0.gains.scale", float("nan"), "got a scale, gain or shape that is not finite"),
        ("codebook.scale", float("inf"), "got a scale, gain or shape that is not finite"),
    ],
)
def test_a_damaged_value_is_refused(name: str, value: float, message: str, saved: Path, tmp_path: Path) -> None:
    config, state = copy(saved, tmp_path)
    state[name][-1] = value
    write(tmp_path, config, state)
    with pytest.raises(OSError, match=message):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_missing_tensor_or_half_a_file_is_refused(saved: Path, tmp_path: Path) -> None:
    config, state = copy(saved, tmp_path)
    del state["head.layers.0.gains.values"]
    write(tmp_path, config, state)
    with pytest.raises(OSError, match="1 tensors are missing from it .head.layers.0.gains.values"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    whole = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="model.safetensors is damaged"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_tensors_of_another_codebook_are_refused(saved: Path, tmp_path: Path) -> None:
    config, state = copy(saved, tmp_path)
    config["compression"]["codebook"] = 30
    write(tmp_path, config, state)
    with pytest.raises(OSError, match=r"could not load .*have other shapes than config.json says .*codebook"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "got a KAN head of format 2; expected format 1. .* pip install -U klas_hf"),
        ({"spline_order": 6}, "got a grid of 5 intervals for splines of order 6"),
        ({"compression": {"codebook": 100, "bits": 5, "bias": "edge"}}, "got bits=5"),
    ],
)
def test_a_head_of_another_version_or_form_is_refused(changes: dict, message: str, saved: Path, tmp_path: Path) -> None:
    config, state = copy(saved, tmp_path)
    write(tmp_path, config | changes, state)
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(tmp_path)


# ---- many heads


def tasks(count: int, **settings: object) -> dict[str, KANForImageClassification]:
    """Models with heads of their own on one backbone."""
    first = tiny_kan(**settings)
    made = {}
    for number in range(count):
        torch.manual_seed(number)
        made[f"task {number}"] = KANForImageClassification.from_backbone(
            first.backbone, hidden_widths=[12], num_labels=2 + number % 3
        )
    return made


@torch.no_grad()
def test_many_heads_share_backbone_and_codebook_and_are_switched_per_call(tmp_path: Path) -> None:
    models = tasks(3)
    both = KANForManyTasks.from_models(models, codebook=200, bits=32)
    both.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is KANForManyTasks and again.config.tasks["task 1"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    for task, model in models.items():
        found = again(PIXELS, task=task).logits
        assert torch.equal(found, both(PIXELS, task=task).logits) and found.shape == (2, model.config.num_labels)
        alone = again.heads[task].dense(again.codebook)(model.pooled(PIXELS))
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
    spread = [float((again(PIXELS, task=task).logits - logits(model)).std()) for task, model in models.items()]
    assert max(spread) < 0.5 * float(torch.cat([logits(model).flatten() for model in models.values()]).std())
    file = load_file(tmp_path / "model.safetensors")
    assert sum("codebook" in name for name in file) == 1
    with pytest.raises(ValueError, match=r"got task='task 9'; expected one of \['task 0', 'task 1', 'task 2'\]"):
        again(PIXELS, task="task 9")


def test_fifty_heads_take_fifty_heads_and_one_codebook(tmp_path: Path) -> None:
    models = tasks(50)
    both = KANForManyTasks.from_models(models, codebook=64)
    alone = [head_bytes(compress_kan(model, 64)) for model in models.values()]
    codebook = 64 * 8 + 4
    assert head_bytes(both) == sum(alone) - 49 * codebook
    dense = sum(head_bytes(model) for model in models.values())
    both.save_pretrained(tmp_path)
    backbone = sum(one.numel() * one.element_size() for one in both.backbone.state_dict().values())
    overhead = (tmp_path / "model.safetensors").stat().st_size - backbone - head_bytes(both)
    assert 0 < overhead < 60_000  # names and places of 450 tensors
    assert dense / head_bytes(both) > 2 * dense / sum(alone) - 3 and head_bytes(both) < dense / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda models: models["task 1"].backbone.get_parameter(
            "embedder.embedder.convolution.weight").data.add_(1), "'task 0' and 'task 1' with different backbones"),
        (lambda models: setattr(models["task 1"].config, "base", "silu"), "got heads that differ in one of"),
        (lambda models: models.update({"a.b": models.pop("task 1")}), "names without dots"),
        (lambda models: models.clear(), "expected at least one"),
        (lambda models: models.update({"x": compress_kan(models["task 0"], 4)}), "got a compressed model to compress"),
    ],
)  # fmt: skip
def test_heads_that_cannot_share_are_refused(change, message: str) -> None:
    models = tasks(2)
    change(models)
    with pytest.raises(ValueError, match=message):
        KANForManyTasks.from_models(models, codebook=8)


def test_a_configuration_without_tasks_makes_no_heads() -> None:
    with pytest.raises(ValueError, match="got a configuration without tasks or compression"):
        KANForManyTasks(KANConfig())
