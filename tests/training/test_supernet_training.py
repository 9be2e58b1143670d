"""Training of supernets: a path per forward, drawn as asked, repeatable; stitching layers whole or at a low rank."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from image_examples import ToyImages, changed, interrupted_after, toy_supernet

from klas_hf import Augmentation, Stitch, TrainingConfig, train_stitches
from klas_hf.training.paths import PathSampler

QUICK = TrainingConfig(
    trainable="full", gradient_accumulation_steps=1, max_steps=6, per_device_batch_size=8,
    learning_rate=3e-3, weight_decay=0.0, warmup_ratio=0.0, save_steps=2,
    mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25],
)  # fmt: skip


def test_every_path_learns() -> None:
    model = toy_supernet()
    result = train_stitches(model, ToyImages(), replace(QUICK, max_steps=120))
    assert sum(result.losses[-10:]) / 10 < 0.3 * math.log(3)
    assert {path for path, _, _ in model.seen} == set(model.paths)
    data = ToyImages(30, seed=1)
    for path in model.paths:
        with torch.no_grad():
            logits = model(data.normalised(), path=path).logits
        assert F.cross_entropy(logits, torch.tensor(data.labels)) < 0.5 * math.log(3)


def test_each_forward_draws_a_path_of_its_own() -> None:
    model = toy_supernet()
    train_stitches(model, ToyImages(), replace(QUICK, per_device_batch_size=4, gradient_accumulation_steps=2))
    drawn = [path for path, _, _ in model.seen]
    assert len(drawn) == 12
    assert any(a != b for a, b in zip(drawn[::2], drawn[1::2], strict=True))
    other = toy_supernet()
    train_stitches(other, ToyImages(), replace(QUICK, per_device_batch_size=4, gradient_accumulation_steps=2, seed=1))
    assert drawn != [path for path, _, _ in other.seen]


def test_each_epoch_has_an_order_of_its_own() -> None:
    model, data = toy_supernet(), ToyImages(20)
    train_stitches(model, data, replace(QUICK, max_steps=None, epochs=2))
    shown = torch.cat([pixels for _, pixels, _ in model.seen]).flatten(1)
    numbers = torch.cdist(shown.double(), data.normalised().flatten(1).double()).argmin(1).tolist()
    assert sorted(numbers[:20]) == sorted(numbers[20:]) == list(range(20))
    assert numbers[:20] != numbers[20:]


@pytest.mark.parametrize(("rate", "passed"), [(None, 0.0), (0.3, 0.3)])
def test_stochastic_depth_is_handed_on(rate: float | None, passed: float) -> None:
    model = toy_supernet()
    train_stitches(model, ToyImages(), replace(QUICK, max_steps=1, drop_path=rate))
    assert [drop_path for _, _, drop_path in model.seen] == [passed]


def test_the_teacher_sees_the_same_pixels() -> None:
    model, teacher = toy_supernet(), toy_supernet(seed=3)
    config = replace(QUICK, augmentation=Augmentation(mixup=1.0, horizontal_flip=True), distillation_weight=0.5)
    train_stitches(model, ToyImages(), config, teacher=teacher)
    assert len(model.seen) == len(teacher.seen) == 6
    for (_, pixels, _), (path, same, _) in zip(model.seen, teacher.seen, strict=True):
        assert torch.equal(pixels, same) and str(path) == "1[:]"


@pytest.mark.parametrize(
    "changes",
    [
        {"augmentation": Augmentation(mixup=0.8)},
        {"sampling": "bucket", "drop_path": 0.3, "optimizer": "sgd"},
        {"low_rank_stitches": 2, "gradient_accumulation_steps": 2, "per_device_batch_size": 4},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(changes: dict[str, Any], tmp_path: Path) -> None:
    config = replace(QUICK, max_steps=None, epochs=2, weight_decay=0.1, **changes)  # 6 steps an epoch
    whole, broken, resumed = (toy_supernet(dropout=0.3) for _ in range(3))
    expected = train_stitches(whole, ToyImages(), config)
    # At the second step some parameters have had no gradient yet, and the optimiser has no state for them.
    for stop in (2, 7):
        with interrupted_after(stop):
            train_stitches(broken, ToyImages(), config, output_dir=tmp_path)
        broken = toy_supernet(dropout=0.3)
    result = train_stitches(resumed, ToyImages(), config, output_dir=tmp_path)
    assert result.losses == expected.losses
    assert not changed(resumed, whole)


def test_a_checkpoint_of_other_paths_is_refused(tmp_path: Path) -> None:
    model = toy_supernet()
    train_stitches(model, ToyImages(), QUICK, output_dir=tmp_path)
    model.paths = model.paths[:-1]
    with pytest.raises(ValueError, match=r"another run.*differs in paths"):
        train_stitches(model, ToyImages(), QUICK, output_dir=tmp_path)


def test_only_the_stitching_layers_learn() -> None:
    model, before = toy_supernet(), toy_supernet()
    train_stitches(model, ToyImages(), replace(QUICK, max_steps=20, trainable="stitch"))
    assert changed(model, before) == {f"joints.{name}.{kind}" for name in "ab" for kind in ("weight", "bias")}
    assert {path.stitch for path, _, _ in model.seen} == {Stitch(1, 1), Stitch(2, 1)}  # anchors have nothing to learn


def test_lora_learns_the_anchors_at_a_low_rank_and_the_stitching_layers_whole() -> None:
    model, before = toy_supernet(), toy_supernet()
    train_stitches(model, ToyImages(), replace(QUICK, max_steps=20, trainable="lora", lora_rank=2))
    assert model.state_dict().keys() == before.state_dict().keys()
    assert rank_of_change(model, before, "anchors.1.blocks.0.weight") == 2
    assert rank_of_change(model, before, "joints.a.weight") > 2
    assert not any("norms" in name for name in changed(model, before))


@pytest.mark.parametrize(("trainable", "anchor_rank"), [("stitch", 0), ("full", 8), ("lora", 3)])
def test_stitching_layers_at_a_low_rank(trainable: str, anchor_rank: int) -> None:
    model, before = toy_supernet(), toy_supernet()
    config = replace(QUICK, max_steps=20, trainable=trainable, low_rank_stitches=2, lora_rank=3, learning_rate=1e-2)
    train_stitches(model, ToyImages(), config)
    assert model.state_dict().keys() == before.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name in "ab":
        assert rank_of_change(model, before, f"joints.{name}.weight") == 2
    assert not any(name.startswith("joints") and name.endswith("bias") for name in changed(model, before))
    assert rank_of_change(model, before, "anchors.0.blocks.0.weight") == anchor_rank


def rank_of_change(model: Any, before: Any, name: str) -> int:
    update = model.state_dict()[name].double() - before.state_dict()[name]
    return int(torch.linalg.matrix_rank(update, rtol=1e-4)) if update.any() else 0


@given(
    macs=st.lists(st.integers(1, 10**9), min_size=1, max_size=30),
    buckets=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_buckets_part_the_paths_by_cost(macs: list[int], buckets: int, seed: int) -> None:
    sampler = PathSampler(macs, "bucket", buckets)
    assert sorted(place for group in sampler.groups for place in group) == list(range(len(macs)))
    width = (max(macs) - min(macs)) / buckets
    previous = -1.0
    for group in sampler.groups:
        costs = [macs[place] for place in group]
        assert max(costs) - min(costs) <= width * (1 + 1e-9)
        assert min(costs) > previous
        previous = max(costs)
    drawn = sampler.draw((seed, 1, 2))
    assert 0 <= drawn < len(macs)
    assert drawn == PathSampler(macs, "bucket", buckets).draw((seed, 1, 2))


def test_how_often_paths_are_drawn() -> None:
    macs = [0, 1, 2, 3, 55, 99, 100]  # of 10 buckets three hold a path: of 4, 1 and 2 paths
    for sampling, expected in (
        ("uniform", [1 / 7] * 7),
        ("bucket", [1 / 12] * 4 + [1 / 3] + [1 / 6] * 2),
    ):
        sampler = PathSampler(macs, sampling, 10)
        drawn = [sampler.draw((5, number // 10, number % 10)) for number in range(6000)]
        share = np.bincount(drawn, minlength=7) / 6000
        # Five standard errors.
        np.testing.assert_allclose(share, expected, atol=5 * math.sqrt(0.25 / 6000))


def test_some_paths_can_be_left_out() -> None:
    sampler = PathSampler([0, 1, 2, 100, 101], "bucket", 4, [1, 2, 4])
    assert [group.tolist() for group in sampler.groups] == [[1, 2], [4]]


def test_sampling_by_buckets_reaches_the_run() -> None:
    # Costs 100, 190, 195 and 300 in three buckets: the stitches share one, so they get a third instead of a half.
    model = toy_supernet()
    train_stitches(model, ToyImages(), replace(QUICK, max_steps=300, sampling="bucket", sampling_buckets=3))
    share = sum(path.joints for path, _, _ in model.seen) / 300
    assert share == pytest.approx(1 / 3, abs=0.09)  # over three standard errors; the draws are always the same
