"""Training of image classifiers: it learns, its losses are the textbook's, BatchNorm obeys, and it resumes exactly."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from image_examples import CLASSES, ToyImages, changed, interrupted_after, tiny_resnet, tiny_vit
from training_examples import anchors, examples

from klas_hf import Augmentation, TrainingConfig, train_stitches
from klas_hf.data.images import ImageSet, map_labels
from klas_hf.training.images import ImageObjective, collate_images

HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
QUICK = TrainingConfig(
    trainable="full",
    gradient_accumulation_steps=1,
    max_steps=6,
    per_device_batch_size=8,
    learning_rate=1e-2,
    weight_decay=0.0,
    warmup_ratio=0.0,
    save_steps=2,
    **HALF,
)


def first_loss(model: Any, data: ToyImages, teacher: Any = None, **changes: Any) -> float:
    """Loss of one step over all of the data."""
    config = replace(QUICK, max_steps=1, per_device_batch_size=len(data), **changes)
    return train_stitches(copy.deepcopy(model), data, config, teacher=teacher).losses[0]


def logits_of(model: Any, data: ToyImages) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=data.normalised()).logits


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_it_learns_to_tell_patterns_apart(make: Any, optimizer: str) -> None:
    model = make()
    rate = 3e-3 if optimizer == "adamw" else 3e-2
    config = replace(QUICK, optimizer=optimizer, learning_rate=rate, max_steps=60)
    result = train_stitches(model, ToyImages(), config)
    assert sum(result.losses[-5:]) / 5 < 0.3 * math.log(CLASSES)
    held_out = ToyImages(30, seed=1)
    right = logits_of(model, held_out).argmax(-1) == torch.tensor(held_out.labels)
    assert right.float().mean() > 0.9
    assert not model.training


def test_the_first_loss_is_that_of_transformers() -> None:
    model, data = tiny_vit(), ToyImages(6)
    expected = model(pixel_values=data.normalised(), labels=torch.tensor(data.labels)).loss.item()
    assert first_loss(model, data) == pytest.approx(expected, rel=1e-5)
    assert first_loss(model, ToyImages(6, floats=True)) == pytest.approx(expected, rel=1e-5)


def test_workers_load_the_same_images() -> None:
    data = ToyImages(6)
    assert first_loss(tiny_vit(), data, num_workers=1) == first_loss(tiny_vit(), data)


def test_label_smoothing_is_that_of_torch() -> None:
    model, data = tiny_vit(), ToyImages(6)
    expected = F.cross_entropy(logits_of(model, data), torch.tensor(data.labels), label_smoothing=0.2)
    assert first_loss(model, data, augmentation=Augmentation(label_smoothing=0.2)) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_augmentations_reach_the_model() -> None:
    data = ToyImages(6)
    data.images = data.images.roll(3, -1)
    flipped = first_loss(tiny_vit(), data, augmentation=Augmentation(horizontal_flip=True))
    mixed = first_loss(tiny_vit(), data, augmentation=Augmentation(mixup=1.0))
    assert len({flipped, mixed, first_loss(tiny_vit(), data)}) == 3


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_soft_distillation(weight: float) -> None:
    model, teacher, data = tiny_vit(), tiny_vit(seed=5, hidden_size=8), ToyImages(6)
    p, q = (torch.distributions.Categorical(logits=logits_of(m, data) / 2) for m in (teacher, model))
    distance = 4 * torch.distributions.kl_divergence(p, q).mean()
    hard = F.cross_entropy(logits_of(model, data), torch.tensor(data.labels))
    found = first_loss(model, data, teacher, distillation_weight=weight, distillation_temperature=2.0)
    assert found == pytest.approx(float((1 - weight) * hard + weight * distance), rel=1e-4)


def test_images_train_in_float64_where_the_model_is() -> None:
    """Whatever pixels, soft labels and teacher are in."""
    model, teacher, data = tiny_vit().double(), tiny_vit(seed=5), ToyImages(6, floats=True)
    other, targets = copy.deepcopy(model), torch.tensor(data.labels)
    log_q = other(pixel_values=data.images.double()).logits.log_softmax(-1)
    p = torch.distributions.Categorical(logits=teacher(pixel_values=data.images).logits.double().detach())
    distance = torch.distributions.kl_divergence(p, torch.distributions.Categorical(logits=log_q)).mean()
    (0.75 * F.cross_entropy(log_q, targets, label_smoothing=0.375) + 0.25 * distance).backward()
    smoothed = {"augmentation": Augmentation(label_smoothing=0.375), "distillation_weight": 0.25}
    plain = {"optimizer": "sgd", "learning_rate": 0.5, "warmup_ratio": 0.0, "max_grad_norm": 1e9}
    train_stitches(model, data, replace(QUICK, max_steps=1, **smoothed, **plain), teacher=teacher)
    for found, given in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, given - 0.5 * given.grad, atol=1e-12, rtol=1e-10)


def test_images_of_some_of_the_classes_are_told_apart_among_these() -> None:
    """Among all, a model that knows no more than which classes occur would do better than most."""
    toys, ids = ToyImages(12), [1, 4, 6]
    data = map_labels(ImageSet(toys.images, toys.labels, "abc"), dict(zip("cab", (6, 1, 4), strict=True)))
    assert data.labels == [ids[label] for label in toys.labels]
    model, teacher = tiny_vit(classes=7), tiny_vit(seed=5, classes=7)
    among = logits_of(model, toys)[:, ids]
    hard = F.cross_entropy(among, torch.tensor(toys.labels), label_smoothing=0.3)
    p, q = (torch.distributions.Categorical(logits=logits_of(m, toys)) for m in (teacher, model))
    expected = 0.75 * hard + 0.25 * torch.distributions.kl_divergence(p, q).mean()
    smoothed = {"augmentation": Augmentation(label_smoothing=0.3), "distillation_weight": 0.25}
    assert first_loss(model, data, teacher, **smoothed) == pytest.approx(float(expected), rel=1e-5)
    held = train_stitches(copy.deepcopy(model), data, replace(QUICK, max_steps=1), validation=data).validation[0][1]
    assert held == pytest.approx(float(F.cross_entropy(among, torch.tensor(toys.labels))), rel=1e-5)


def test_hard_distillation_is_half_cross_entropy_with_the_teachers_class() -> None:
    model, teacher, data = tiny_vit(), tiny_vit(seed=5, hidden_dropout_prob=0.5), ToyImages(6)
    before = copy.deepcopy(teacher)
    log_q = logits_of(model, data).log_softmax(-1)
    best = logits_of(teacher, data).argmax(-1).tolist()
    assert len(set(best)) > 1 or best != data.labels
    expected = -sum(
        0.5 * log_q[row, label] + 0.5 * log_q[row, best[row]] for row, label in enumerate(data.labels)
    ) / len(data)  # fmt: skip
    teacher.train()
    found = first_loss(model, data, teacher, distillation_weight=0.5, distillation="hard")
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert teacher.training
    assert not changed(teacher, before)


def test_accumulation_equals_a_larger_batch() -> None:
    # 19 images: the last batch of an epoch is short, and an accumulated one has a part without any image.
    data, one, other = ToyImages(19), tiny_vit(), tiny_vit()
    sgd = replace(QUICK, optimizer="sgd")
    whole = train_stitches(one, data, sgd)
    parts = train_stitches(other, data, replace(sgd, per_device_batch_size=2, gradient_accumulation_steps=4))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_every_image_is_seen_once_an_epoch_and_no_filler() -> None:
    data = ToyImages(19)
    config = replace(QUICK, per_device_batch_size=2)
    loader, order = ImageObjective(tiny_vit(), data, config, None).batches(multiple=4)
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [2] * 9 + [1, 0, 0]
    assert [len(batch["pixel_values"]) for batch in batches] == [2] * 9 + [1, 1, 1]
    seen = torch.cat([batch["pixel_values"] for batch in batches if len(batch["labels"])])
    assert {tuple(image.flatten().tolist()) for image in seen} == {tuple(i.flatten().tolist()) for i in data.images}
    order.step = 2
    assert all(
        torch.equal(a["labels"], b["labels"]) for a, b in zip(list(loader), batches[8:], strict=True)
    )  # fmt: skip


def test_collating_leaves_fillers_out() -> None:
    image, blank = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    batch = collate_images([(image, 4), (blank, None), (blank, None)])
    assert batch["labels"].tolist() == [4] and batch["pixel_values"].shape == (1, 1, 2, 2)
    empty = collate_images([(blank, None), (blank, None)])
    assert empty["labels"].shape == (0,) and not empty["pixel_values"].any()


def test_running_statistics_stay_or_follow() -> None:
    data = ToyImages(8)
    before, frozen, trained = tiny_resnet(), tiny_resnet(), tiny_resnet()
    one = replace(QUICK, max_steps=1, per_device_batch_size=8)
    frozen_loss = train_stitches(frozen, data, one).losses[0]
    expected = F.cross_entropy(logits_of(before, data), torch.tensor(data.labels))
    assert frozen_loss == pytest.approx(float(expected), rel=1e-4)
    assert not any("running" in name or "tracked" in name for name in changed(frozen, before))
    assert any("normalization.weight" in name for name in changed(frozen, before))
    train_stitches(trained, data, replace(one, batch_norm="train"))
    name = "resnet.embedder.embedder.normalization.running_mean"
    maps = before.resnet.embedder.embedder.convolution(data.normalised())
    torch.testing.assert_close(trained.state_dict()[name], 0.1 * maps.mean((0, 2, 3)), atol=1e-6, rtol=1e-4)


def test_statistics_do_not_see_fillers() -> None:
    # The second forward of the step has fillers alone.
    data, whole, parts = ToyImages(8), tiny_resnet(), tiny_resnet()
    config = replace(QUICK, max_steps=1, per_device_batch_size=8, batch_norm="train")
    expected = train_stitches(whole, data, config)
    found = train_stitches(parts, data, replace(config, gradient_accumulation_steps=2))
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_bf16_follows_fp32(optimizer: str) -> None:
    one, other = tiny_vit(), tiny_vit()
    config = replace(QUICK, optimizer=optimizer, learning_rate=1e-3)
    exact = train_stitches(one, ToyImages(), config)
    coarse = train_stitches(other, ToyImages(), replace(config, mixed_precision="bf16"))
    assert coarse.losses == pytest.approx(exact.losses, rel=0.05)
    assert coarse.losses != exact.losses


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (tiny_vit, {"augmentation": Augmentation(mixup=0.8, label_smoothing=0.1, horizontal_flip=True)}),
        (tiny_vit, {"trainable": "lora", "lora_dropout": 0.2}),
        (tiny_resnet, {"batch_norm": "train", "optimizer": "sgd", "augmentation": Augmentation(mixup=0.8)}),
        (tiny_resnet, {"optimizer": "sgd", "momentum": 0.0}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    def model() -> Any:
        return make(hidden_dropout_prob=0.2) if make is tiny_vit else make()

    config = replace(QUICK, max_steps=None, epochs=2, weight_decay=0.1, **changes)  # 6 steps an epoch
    whole, broken, resumed = model(), model(), model()
    expected = train_stitches(whole, ToyImages(), config)
    with interrupted_after(9):
        train_stitches(broken, ToyImages(), config, output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    result = train_stitches(resumed, ToyImages(), config, output_dir=tmp_path)
    assert result.losses == expected.losses
    assert len(set(expected.losses)) == 12
    assert not changed(resumed, whole)


@pytest.mark.parametrize(
    ("changes", "difference"), [({"hidden_size": 8}, "parameters"), ({"path": "0[:2] 1[1:]"}, "path")]
)
def test_a_checkpoint_of_another_model_is_refused(changes: dict[str, int], difference: str, tmp_path: Path) -> None:
    train_stitches(tiny_vit(path="0[:1] 1[1:]"), ToyImages(), QUICK, output_dir=tmp_path)
    with pytest.raises(ValueError, match=rf"another run.*differs in .*{difference}"):
        train_stitches(tiny_vit(**{"path": "0[:1] 1[1:]"} | changes), ToyImages(), QUICK, output_dir=tmp_path)


class Odd(ToyImages):
    """Images with something replaced."""

    def __init__(self, **changes: Any):
        super().__init__(6)
        self.__dict__.update(changes)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Odd(labels=[]), ValueError, "no images"),
        (Odd(labels=[0, 1, 2, 3, 0, 1]), ValueError, r"labels \[3\] for a model of 3 classes; expected 0 to 2"),
        (Odd(labels=[0, 1, 2, -100, 0, 1]), ValueError, r"labels \[-100\]"),
        (Odd(images=torch.zeros(6, 1, 8, 8)), ValueError, r"shape \(1, 8, 8\).*mean of 3 channels"),
        (Odd(images=torch.zeros(6, 8, 8)), ValueError, r"shape \(8, 8\)"),
        (Odd(images=torch.zeros(6, 3, 8, 8, dtype=torch.int64)), TypeError, "pixels of torch.int64; expected.*uint8"),
        (Odd(images=[[0]] * 6), TypeError, "pixels of list"),
    ],
)
def test_bad_images_are_refused(data: ToyImages, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train_stitches(tiny_vit(), data, QUICK)


def test_images_without_all_their_labels_are_refused() -> None:
    class Short(ToyImages):
        def __len__(self) -> int:
            return 7

    with pytest.raises(ValueError, match="7 images and 6 labels"):
        train_stitches(tiny_vit(), Short(6), QUICK)


def test_what_the_model_cannot_do_is_refused() -> None:
    data = ToyImages()
    with pytest.raises(ValueError, match=r"drop_path=0.1 for ViT.*drop_path=None"):
        train_stitches(tiny_vit(), data, replace(QUICK, drop_path=0.1))
    with pytest.raises(ValueError, match=r"sampling='bucket' for ViT.*supernet"):
        train_stitches(tiny_vit(), data, replace(QUICK, sampling="bucket"))
    with pytest.raises(ValueError, match="trainable='stitch' for ViT.*no stitching layer"):
        train_stitches(tiny_vit(), data, replace(QUICK, trainable="stitch"))
    with pytest.raises(ValueError, match="low_rank_stitches=2 for ViT.*no stitching layer"):
        train_stitches(tiny_vit(), data, replace(QUICK, low_rank_stitches=2))
    with pytest.raises(ValueError, match="no teacher"):
        train_stitches(tiny_vit(), data, replace(QUICK, distillation_weight=0.5))
    distilled = replace(QUICK, distillation_weight=0.5)
    with pytest.raises(ValueError, match="teacher of 4 classes for a model of 3"):
        train_stitches(tiny_vit(), data, distilled, teacher=tiny_vit(classes=4))
    model = tiny_vit()
    with pytest.raises(ValueError, match="shares parameters.*deepcopy"):
        train_stitches(model, data, distilled, teacher=model)


@pytest.mark.parametrize(("images", "batch_size"), [(9, 8), (9, 1)])
def test_a_batch_of_one_image_has_no_statistics(images: int, batch_size: int) -> None:
    config = replace(QUICK, per_device_batch_size=batch_size, batch_norm="train", max_steps=2)
    with pytest.raises(ValueError, match=r"9 images in batches of .*single image.*batch_norm='frozen'"):
        train_stitches(tiny_resnet(), ToyImages(images), config)
    assert train_stitches(tiny_resnet(), ToyImages(images), replace(config, batch_norm="frozen")).steps == 2
    assert train_stitches(tiny_vit(), ToyImages(images), config).steps == 2  # it has no BatchNorm


def test_text_has_no_augmentation() -> None:
    with pytest.raises(ValueError, match="augmentation for Llama.*text.*None"):
        train_stitches(anchors()[0], examples(), TrainingConfig(augmentation=Augmentation()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": "all"}, r"trainable='all'.*stitch.*lora.*full"),
        ({"optimizer": "adam"}, r"optimizer='adam'.*adamw.*sgd"),
        ({"distillation": "none"}, r"distillation='none'.*soft.*hard"),
        ({"sampling": "macs"}, r"sampling='macs'.*uniform.*bucket"),
        ({"batch_norm": "eval"}, r"batch_norm='eval'.*frozen.*train"),
        ({"sampling_buckets": 0}, "sampling_buckets=0"),
        ({"low_rank_stitches": -1}, "low_rank_stitches=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"mean": [0.5]}, r"mean=\[0.5\]"),
        ({"std": [0.0, 1.0, 1.0]}, r"std=\[0.0"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)
