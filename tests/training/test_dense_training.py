"""Training of dense models: what learns, the loss, flips of masks, transformers' Trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_dense import CLASSES, dense_images, head_config, outputs, tiny_dense, tiny_dense_pair
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from klas_hf import Augmentation, StitchedModel, TrainingConfig, evaluate, train_stitches
from klas_hf.models import StitchedBackbone
from klas_hf.training.augmentation import augment_masks
from klas_hf.training.dense import DenseObjective

BACKBONE = {"mask2former": "model.pixel_level_module.encoder.", "upernet": "backbone."}


class Examples(Dataset):
    """Pixels and masks, one by one."""

    def __init__(self, count: int = 6):
        self.batch = dense_images(1, count, seed=3)[0]

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batch["pixel_values"][index], self.batch["labels"][index]


def config(**changes: Any) -> TrainingConfig:
    given = {"trainable": "backbone", "max_steps": 2, "per_device_batch_size": 3, "gradient_accumulation_steps": 1}
    return TrainingConfig(**given | {"learning_rate": 1e-3, "mixed_precision": "no"} | changes)


def stitched(head: str) -> PreTrainedModel:
    return StitchedModel.from_path(tiny_dense_pair(head, "resnet", "swin"), "0[:2] 1[3:]", calibration=dense_images(2))


def moved(model: PreTrainedModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("head", "batch_norm"),
    [("mask2former", "train"), pytest.param("upernet", "train", marks=pytest.mark.slow), ("upernet", "frozen")],
)
def test_a_frozen_head_stays_as_it_is(head: str, batch_norm: str) -> None:
    model = stitched(head)
    before = copy.deepcopy(model.state_dict())
    result = train_stitches(model, Examples(), config(batch_norm=batch_norm))
    changed = moved(model, before)
    assert result.steps == 2
    assert changed
    assert all(name.startswith(BACKBONE[head]) for name in changed)
    for part in ("lateral_joints.stage1.weight", "joints.0.projection.weight", "slices.0.resnet", "slices.1.swin"):
        assert any(part in name for name in changed), part
    assert any("running_mean" in name for name in changed) == (batch_norm == "train")
    assert model.config.training["settings"]["trainable"] == "backbone"


@pytest.mark.slow
@pytest.mark.parametrize(("trainable", "parts"), [("stitch", {"joints", "lateral_joints"}), ("full", {"decode_head"})])
def test_what_else_can_learn(trainable: str, parts: set[str]) -> None:
    model = stitched("upernet")
    before = copy.deepcopy(model.state_dict())
    train_stitches(model, Examples(), config(trainable=trainable))
    changed = moved(model, before)
    assert all(any(part in name.split(".") for name in changed) for part in parts)
    if trainable == "stitch":
        assert all(not parts.isdisjoint(name.split(".")) for name in changed)


@pytest.mark.slow
def test_lora_adapts_the_backbone_alone() -> None:
    model = stitched("mask2former")
    before = copy.deepcopy(model.state_dict())
    train_stitches(model, Examples(), config(trainable="lora"))
    changed = moved(model, before)
    assert any("swin.encoder" in name for name in changed)
    assert all(name.startswith(BACKBONE["mask2former"]) for name in changed)


def test_the_loss_is_the_models_own_per_image() -> None:
    model, (batch,) = tiny_dense("upernet"), dense_images(1)
    objective = DenseObjective(model, Examples(), config(), None)
    with torch.no_grad():
        found = objective.loss_sum(model, batch, (0,))
        expected = model(**batch).loss  # 255 is what UperNet leaves out by default
    torch.testing.assert_close(found, 4 * expected)
    other = tiny_dense("upernet", loss_ignore_index=9)
    with torch.no_grad():
        torch.testing.assert_close(
            DenseObjective(other, Examples(), config(), None).loss_sum(other, batch, (0,)), found
        )


def test_held_out_losses_are_of_batches_and_fillers_alone_have_none() -> None:
    model, (batch,) = tiny_dense("upernet"), dense_images(1)
    objective = DenseObjective(model, Examples(), config(), None)
    with torch.no_grad():
        torch.testing.assert_close(
            objective.example_losses(model, batch, (0,)), objective.loss_sum(model, batch, (0,))[None]
        )
        fillers = batch | {"labels": batch["labels"][:0]}
        assert objective.example_losses(model, fillers, (0,)).shape == (0,)


def test_masks_become_one_mask_per_class_for_mask2former() -> None:
    model = tiny_dense("mask2former")
    masks = torch.tensor([[[0, 0], [3, 255]], [[2, 2], [2, 2]]])
    given, _ = DenseObjective(model, Examples(), config(), None).inputs(
        {"pixel_values": torch.zeros(2, 3, 2, 2), "labels": masks}
    )
    assert [classes.tolist() for classes in given["class_labels"]] == [[0, 3], [2]]
    assert [one.tolist() for one in given["mask_labels"]] == [[[[1, 1], [0, 0]], [[0, 0], [1, 0]]], [[[1, 1], [1, 1]]]]


@pytest.mark.slow
def test_distillation_draws_the_answers_to_the_teachers() -> None:
    teacher, model, data = tiny_dense("upernet", large=True, seed=2), stitched("upernet"), Examples(4)
    batch = data.batch

    def distance() -> float:
        p, q = (outputs(one.eval(), batch["pixel_values"])[0].log_softmax(1) for one in (teacher, model))
        return float((p.exp() * (p - q)).sum(1).mean())

    before = distance()
    objective = DenseObjective(model, Examples(), config(distillation_weight=1.0), teacher)
    with torch.no_grad():
        torch.testing.assert_close(float(objective.loss_sum(model, batch, (0,))), 4 * before, rtol=1e-4, atol=1e-6)
    train_stitches(model, data, config(distillation_weight=1.0, max_steps=6), teacher=teacher)
    assert distance() < before


@pytest.mark.slow
def test_training_makes_held_out_loss_smaller_and_keeps_the_best() -> None:
    data = Examples()
    model = StitchedModel.from_path([tiny_dense("upernet", "resnet")], "0[:]")
    before = evaluate(model, [data.batch]).metrics["loss"]
    settings = config(trainable="full", max_steps=8, learning_rate=1e-2, eval_steps=4)
    result = train_stitches(model, data, settings, validation=data)
    assert [step for step, _ in result.validation] == [0, 4, 8]
    assert result.validation[-1][1] < result.validation[0][1]
    assert evaluate(model, [data.batch]).metrics["loss"] < before


def test_the_stock_trainer(tmp_path: Path) -> None:
    model = stitched("upernet")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("backbone."))
    data = Examples(4)
    rows = [{"pixel_values": pixels, "labels": mask} for pixels, mask in data]
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    expected = model.train()(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss.item()
    model.load_state_dict(before)
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-4)
    assert "backbone.lateral_joints.stage1.weight" in moved(model, before)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert isinstance(loaded.backbone, StitchedBackbone)


# ---- augmentation


@pytest.mark.parametrize(
    "settings", [Augmentation(horizontal_flip=True), Augmentation(crop_scale=(0.3, 0.9)), Augmentation(crop_padding=4)]
)
def test_images_and_masks_move_alike(settings: Augmentation) -> None:
    masks = torch.arange(4).repeat_interleave(4).repeat(16, 1)[None].repeat(6, 1, 1)  # stripes of 4 pixels
    pixels = (masks + 1.0)[:, None].repeat(1, 3, 1, 1)
    torch.manual_seed(0)
    moved_pixels, moved_masks = augment_masks(pixels, masks, settings)
    assert set(moved_masks.unique().tolist()) <= {0, 1, 2, 3, 255}
    assert not torch.equal(moved_masks, masks)
    off = (moved_pixels[:, 0] - (moved_masks + 1.0).masked_fill(moved_masks == 255, 0.0)).abs()
    assert (off < 0.51).float().mean() > 0.95  # bilinear and nearest differ at the stripes' edges alone
    if settings.crop_scale is None:
        assert off.max() == 0


def test_what_masks_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['mixup', 'label_smoothing'\] for images with masks"):
        augment_masks(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4), Augmentation(mixup=0.2, label_smoothing=0.1))


# ---- bad input


def test_classes_that_the_model_does_not_have_are_refused() -> None:
    data = Examples()
    data.batch["labels"][:, 0, 0] = 7
    with pytest.raises(ValueError, match=f"class 7 in a mask for a model of {CLASSES} classes"):
        train_stitches(tiny_dense("upernet"), data, config())
    with pytest.raises(ValueError, match="class 7 in a mask"):
        evaluate(tiny_dense("upernet"), [data.batch])


def test_only_dense_models_have_a_head_to_freeze() -> None:
    from tiny_vision import tiny_pair, tiny_stitched

    model = tiny_stitched(*tiny_pair("resnet"), (1, 1))
    images = [(torch.zeros(3, 32, 32), 0)] * 2

    class Labelled(list):  # type: ignore[type-arg]
        labels = (0, 0)

    with pytest.raises(ValueError, match="trainable='backbone' for StitchedForImageClassification"):
        train_stitches(model, Labelled(images), config())
    with pytest.raises(ValueError, match="got no images to train on"):
        train_stitches(StitchedModel.from_path([tiny_dense("upernet")], "0[:]"), [], config())
    assert head_config("upernet").num_labels == CLASSES
