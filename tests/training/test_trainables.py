"""Which parameters learn, at which rate, with which decay."""

import pytest
import torch
from image_examples import tiny_resnet, tiny_vit, toy_supernet
from torch import nn
from transformers import LevitConfig, LevitForImageClassification, SwinConfig, SwinForImageClassification

from klas_hf import TrainingConfig
from klas_hf.training.trainables import (
    is_stitching,
    lora_config,
    made_trainable,
    optimizer_of,
    parameter_groups,
    stitching_layers,
)


def settings_of(model: nn.Module, config: TrainingConfig) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter that an optimiser gets."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, config)
        for parameter in group["params"]
    }


def test_swins_rates() -> None:
    config = TrainingConfig(learning_rate=1e-4, stitch_learning_rate=1e-3, weight_decay=0.05)
    found = settings_of(toy_supernet(), config)
    assert found["joints.a.weight"] == (1e-3, 0.05)
    assert found["joints.a.bias"] == (1e-3, 0.0)
    assert found["anchors.0.blocks.0.weight"] == (1e-4, 0.05)
    assert found["anchors.1.norms.0.weight"] == (1e-4, 0.0)
    assert len(found) == len(list(toy_supernet().parameters()))


def test_positions_tokens_and_offsets_do_not_decay() -> None:
    config = TrainingConfig(weight_decay=0.05)
    vit = settings_of(tiny_vit(), config)
    assert {name.split(".")[-1] for name, (_, decay) in vit.items() if decay} == {"weight"}
    assert vit["vit.embeddings.position_embeddings"][1] == vit["vit.embeddings.cls_token"][1] == 0
    assert vit["vit.embeddings.patch_embeddings.projection.weight"][1] == 0.05
    swin = SwinForImageClassification(
        SwinConfig(image_size=8, patch_size=2, embed_dim=4, depths=[1, 1], num_heads=[1, 1], window_size=2)
    )
    tables = [decay for name, (_, decay) in settings_of(swin, config).items() if name.endswith("bias_table")]
    assert tables == [0.0, 0.0]
    sizes = {"hidden_sizes": [8, 8, 8], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1], "key_dim": [4, 4, 4]}
    levit = settings_of(LevitForImageClassification(LevitConfig(image_size=64, **sizes)), config)
    offsets = [decay for name, (_, decay) in levit.items() if name.endswith("attention_biases")]
    assert offsets and not any(offsets)


def test_the_optimiser_is_the_one_that_was_asked_for() -> None:
    model = tiny_vit()
    sgd = optimizer_of(model, TrainingConfig(optimizer="sgd", momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.8 and not sgd.defaults["nesterov"]
    assert isinstance(optimizer_of(model, TrainingConfig()), torch.optim.AdamW)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("joints.projection.weight", True),
        ("base_model.model.model.joints.1.weight", True),
        ("joints.0.weight", True),
        ("model.joints.3.projection.bias", True),
        ("target.stitching.weight", False),
        ("unstitched.weight", False),
    ],
)
def test_what_counts_as_stitching(name: str, expected: bool) -> None:
    assert is_stitching(name) is expected


def test_a_stitching_layer_with_its_linear_layer_inside() -> None:
    model = tiny_vit()
    model.joints = nn.Module()
    model.joints.projection = nn.Conv2d(4, 6, 1)
    model.joints.shape = nn.Identity()
    assert list(stitching_layers(model)) == ["joints.projection"]
    with made_trainable(model, TrainingConfig(trainable="stitch")) as trainable:
        learning = [name for name, parameter in trainable.named_parameters() if parameter.requires_grad]
    assert learning == ["joints.projection.weight", "joints.projection.bias"]
    with made_trainable(model, TrainingConfig(trainable="stitch", low_rank_stitches=2)) as trainable:
        learning = {name: p.shape for name, p in trainable.named_parameters() if p.requires_grad}
    assert [tuple(shape) for shape in learning.values()] == [(2, 4, 1, 1), (6, 2, 1, 1)]
    assert all("joints.projection.lora" in name for name in learning)
    assert isinstance(model.joints.projection, nn.Conv2d)


def test_a_low_rank_update_is_the_product_of_its_factors() -> None:
    model, before = toy_supernet(), toy_supernet()
    with made_trainable(model, TrainingConfig(trainable="full", low_rank_stitches=3, lora_alpha=50)) as trainable:
        factors = {n: p for n, p in trainable.named_parameters() if ".a.lora_" in n}
        for parameter in factors.values():
            torch.nn.init.normal_(parameter)
        down, up = (next(p.detach().clone() for n, p in factors.items() if kind in n) for kind in ("lora_A", "lora_B"))
    update = model.joints["a"].weight - before.joints["a"].weight
    torch.testing.assert_close(update, up @ down)


def test_lora_of_convolutions() -> None:
    model = tiny_resnet()
    targets = set(lora_config(model, TrainingConfig(trainable="lora")).target_modules)
    assert targets == {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    grouped = nn.Conv2d(4, 4, 3, groups=4)
    model.resnet.embedder.embedder.convolution = grouped  # a rank need not divide by the groups
    left = set(lora_config(model, TrainingConfig(trainable="lora")).target_modules)
    assert targets - left == {"resnet.embedder.embedder.convolution"}
