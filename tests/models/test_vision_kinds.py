"""Classifiers taken apart: embedding, blocks and head of every kind against the whole models of transformers."""

import json
from typing import Any

import pytest
import torch
from tiny_vision import (
    KINDS,
    PREFIX,
    SIDE,
    embedding,
    grid,
    images,
    outputs,
    stages,
    tiny_classifier,
    tiny_config,
    used_tensors,
)
from torch import nn
from transformers import (
    BeitConfig,
    ConvNextConfig,
    LevitConfig,
    MobileNetV1Config,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from klas_hf.anchors.images import ImageBatch
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.models.vision_features import Features, drop_block
from klas_hf.models.vision_kinds import VISION_KINDS, vision_kind
from klas_hf.models.vision_shapes import classifier, keep_blocks, trace

# Other values of what decides how a kind is taken apart: (kind, changes, (height, width) of the images).
VARIANTS: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("vit", {"image_size": [32, 16]}, (32, 16)),
    ("deit", {"image_size": [16, 32]}, (16, 32)),
    ("dinov2", {"use_swiglu_ffn": True}, (48, 24)),
    ("swin", {"use_absolute_embeddings": True}, (32, 32)),
    ("swin", {"window_size": 4}, (32, 32)),  # as large as the second stage's grid
    ("swin", {}, (36, 44)),  # odd grids are padded where patches are merged
    ("swinv2", {}, (36, 44)),
    ("levit", {"mlp_ratio": [0, 2, 0]}, (64, 64)),
    ("levit", {"image_size": 80}, (80, 80)),
    ("resnet", {"downsample_in_first_stage": True}, (32, 48)),
    ("bottleneck", {"downsample_in_bottleneck": True}, (48, 32)),
    ("convnext", {"hidden_sizes": [8, 12, 16], "depths": [1, 2, 1], "num_stages": 3}, (64, 32)),
    ("mobilenet_v1", {"tf_padding": False}, (32, 32)),
    ("mobilenet_v1", {}, (33, 47)),
    ("mobilenet_v1", {"classifier_dropout_prob": 0.9}, (32, 32)),
]
EVERY = [(kind, {}, (SIDE[kind], SIDE[kind])) for kind in KINDS] + VARIANTS


@pytest.mark.parametrize(("kind", "changes", "size"), EVERY)
def test_embedding_blocks_and_head_are_the_model_bit_for_bit(
    kind: str, changes: dict[str, Any], size: tuple[int, int]
) -> None:
    for dtype in (torch.float32, torch.float64):
        model = tiny_classifier(kind, **changes).to(dtype)
        pixels = torch.randn(3, 3, *size, dtype=dtype)
        expected, logits = outputs(model, pixels)
        anchor = VisionAnchor(model)
        found = anchor.states(ImageBatch(pixels))
        assert len(found) == anchor.num_blocks + 1 == len(expected)
        for number, (features, hidden) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(features.hidden, hidden), number
        assert torch.equal(anchor.logits(found[-1]), logits)
        assert logits.std() > 1e-3


@pytest.mark.parametrize(("kind", "changes", "size"), EVERY)
def test_grids_follow_the_images(kind: str, changes: dict[str, Any], size: tuple[int, int]) -> None:
    """Where hidden states are maps they show their grid; tokens are as many as it has positions."""
    model = tiny_classifier(kind, **changes)
    features = VisionAnchor(model).states(ImageBatch(torch.randn(1, 3, *size, dtype=torch.float64)))
    shapes = trace(model.config, size)
    for one, shape in zip(features, shapes, strict=True):
        assert (one.height, one.width) == shape.grid
        if one.hidden.ndim == 4:
            assert one.hidden.shape == (1, shape.channels, one.height, one.width)
        else:
            tokens = PREFIX.get(model.config.model_type, 0) + one.height * one.width
            assert one.hidden.shape == (1, tokens, shape.channels)
        assert abs(one.height / one.width - size[0] / size[1]) < 0.6
    if size[0] == size[1]:
        assert [shape.grid for shape in shapes] == [grid(model, one.hidden) for one in features]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_the_model_stage_by_stage(kind: str) -> None:
    for large in (False, True):
        model = tiny_classifier(kind, large=large)
        found = vision_kind(model.config).blocks(model.config)
        expected = [(stage, block) for stage, of_stage in enumerate(stages(model)) for block in of_stage]
        assert [(block.stage, [model.get_submodule(name) for name in block.modules]) for block in found] == expected
        assert [shape.stage for shape in trace(model.config, (SIDE[kind],) * 2)[1:]] == [stage for stage, _ in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_belongs_to_the_embedding_one_block_or_the_head(kind: str) -> None:
    model = tiny_classifier(kind, large=True)
    parts = vision_kind(model.config)
    known = {name for name, _ in model.named_modules()}
    groups = [parts.embed, *(block.modules for block in parts.blocks(model.config))]
    groups.append(tuple(name for name in parts.head if name in known))
    held = [
        id(weight)
        for group in groups
        for name in group
        for weight in (*model.get_submodule(name).parameters(), *model.get_submodule(name).buffers())
    ]
    assert len(held) == len(set(held))
    assert set(held) == {id(weight) for weight in (*model.parameters(), *model.buffers())}


# (configuration, blocks per stage, grid per stage, channels per stage), from the papers
PUBLISHED: dict[str, tuple[PreTrainedConfig, list[int], list[int], list[int]]] = {
    "ViT-S": (ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536), [12], [14], [384]),
    "Swin-T": (SwinConfig(), [2, 2, 6, 2], [56, 28, 14, 7], [96, 192, 384, 768]),
    "ResNet-18": (
        ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"),
        [2, 2, 2, 2],
        [56, 28, 14, 7],
        [64, 128, 256, 512],
    ),
    "ResNet-50": (ResNetConfig(), [3, 4, 6, 3], [56, 28, 14, 7], [256, 512, 1024, 2048]),
    "LeViT-192": (
        LevitConfig(hidden_sizes=[192, 288, 384], num_attention_heads=[3, 5, 6], depths=[4, 4, 4], key_dim=[32] * 3),
        [4, 4, 4],
        [14, 7, 4],
        [192, 288, 384],
    ),
    "ConvNeXt-T": (ConvNextConfig(), [3, 3, 9, 3], [56, 28, 14, 7], [96, 192, 384, 768]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_stages_of_their_papers(name: str) -> None:
    config, depths, grids, channels = PUBLISHED[name]
    stage_of_block = [stage for stage, depth in enumerate(depths) for _ in range(depth)]
    embedded, *shapes = trace(config)
    assert [shape.stage for shape in shapes] == stage_of_block
    assert [shape.grid for shape in shapes] == [(grids[stage], grids[stage]) for stage in stage_of_block]
    assert [shape.channels for shape in shapes] == [channels[stage] for stage in stage_of_block]
    assert (embedded.stage, embedded.grid) == (0, (grids[0], grids[0]))


def test_mobilenet_has_thirteen_blocks_in_five_stages() -> None:
    shapes = trace(MobileNetV1Config())
    assert [shape.stage for shape in shapes[1:]] == [0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4]
    assert [shape.height for shape in shapes[1:]] == [112, 56, 56, 28, 28] + [14] * 6 + [7, 7]
    assert [shape.channels for shape in shapes[1:]] == [64, 128, 128, 256, 256] + [512] * 6 + [1024] * 2


# ---- shapes from a configuration


def test_a_trace_allocates_nothing_and_leaves_the_configuration_alone() -> None:
    config = tiny_config("levit")
    config.hidden_sizes = [2**16, 2**16, 2**17]  # 5 TB
    before = config.to_dict()
    assert [shape.channels for shape in trace(config)] == [2**16] * 4 + [2**17]
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", ["resnet", "convnext", "swin", "dinov2", "mobilenet_v1"])
def test_a_trace_takes_the_image_size_asked_for(kind: str) -> None:
    config = tiny_config(kind)
    for one, twice in zip(trace(config, (32, 32)), trace(config, (64, 96)), strict=True):
        assert twice.grid == (2 * one.height, 3 * one.width)
        assert (twice.channels, twice.stage) == (one.channels, one.stage)
    assert trace(config) == trace(config, (224, 224) if kind == "resnet" else (32, 32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_trace_takes_configurations_of_any_dtype(kind: str, dtype: str) -> None:
    size = (SIDE[kind], SIDE[kind])
    assert trace(tiny_config(kind, dtype=dtype), size) == trace(tiny_config(kind), size)


def test_a_classifier_is_of_the_class_that_its_configuration_names_or_of_its_familys_first() -> None:
    for kind in KINDS:
        assert type(classifier(tiny_config(kind))).__name__ == KINDS[kind][0]
    for kind, name in (
        ("deit_teacher", "DeiTForImageClassification"),
        ("levit_teacher", "LevitForImageClassification"),
    ):
        config = tiny_config(kind, architectures=None)
        before = config.to_dict()
        assert type(classifier(config)).__name__ == name
        assert config.to_dict() == before


# ---- taking out what is not used


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("embed", "head"), [(True, False), (False, True), (False, False), (True, True)])
def test_what_is_not_kept_becomes_an_identity_and_names_stay(kind: str, embed: bool, head: bool) -> None:
    model, start, stop = tiny_classifier(kind, large=True), 1, 3
    expected = used_tensors(model, start, stop, embed=embed, head=head)
    assert expected < set(model.state_dict())
    keep_blocks(model, start, stop, embed=embed, head=head)
    assert set(model.state_dict()) == expected
    for number, block in enumerate(vision_kind(model.config).blocks(model.config)):
        gone = [isinstance(model.get_submodule(name), nn.Identity) for name in block.modules]
        assert gone == [not start <= number < stop] * len(block.modules)
    assert isinstance(embedding(model), nn.Identity) == (not embed)


# ---- pooling and stochastic depth


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_features_are_the_mean_over_the_grid(kind: str) -> None:
    model = tiny_classifier(kind)
    anchor = VisionAnchor(model)
    for features in anchor.states(ImageBatch(images(kind))):
        pooled = anchor.kind.pooled(features)
        for sample in range(2):
            hidden = features.hidden[sample]
            if hidden.ndim == 3:
                rows = [hidden[:, y, x] for y in range(features.height) for x in range(features.width)]
            else:
                rows = list(hidden)[-features.height * features.width :]  # class tokens come first
            torch.testing.assert_close(pooled[sample], torch.stack(rows).mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(4000, 3, 2), (4000, 2, 1, 3)])
def test_a_dropped_block_is_left_out_whole_and_the_mean_stays(shape: tuple[int, ...]) -> None:
    before, after = (Features(torch.randn(*shape, dtype=torch.float64), 1, 3) for _ in range(2))
    found = drop_block(before, after, 0.3).hidden
    change = ((found - before.hidden) / (after.hidden - before.hidden)).flatten(1)
    torch.testing.assert_close(change, change[:, :1].expand_as(change))  # samples are dropped whole
    assert {round(value, 6) for value in change[:, 0].tolist()} == {0.0, round(1 / 0.7, 6)}
    assert (change[:, 0] == 0).double().mean().item() == pytest.approx(0.3, abs=0.03)  # four standard errors
    assert drop_block(before, after, 0.0) is after


def test_a_block_that_changes_shape_is_never_dropped() -> None:
    before, after = Features(torch.randn(50, 4, 2), 2, 2), Features(torch.randn(50, 1, 4), 1, 1)
    assert drop_block(before, after, 0.9) is after


# ---- bad input


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_other_channels_or_dimensions_are_refused(kind: str) -> None:
    anchor, side = VisionAnchor(tiny_classifier(kind)), SIDE[kind]
    for shape in ((2, 1, side, side), (3, side, side), (2, side, side, 3)):
        with pytest.raises(ValueError, match=r"pixel_values of shape \(.*expected \(batch, 3, height, width\)"):
            anchor.states(ImageBatch(torch.zeros(shape)))


@pytest.mark.parametrize("kind", ["vit", "deit", "levit"])
def test_images_of_another_size_are_refused_where_one_size_is_needed(kind: str) -> None:
    side = SIDE[kind]
    config = tiny_config(kind)
    with pytest.raises(ValueError, match=rf"\(48, {side}\) pixels for a {kind} of \({side}, {side}\).*image processor"):
        VisionAnchor(tiny_classifier(kind)).states(ImageBatch(torch.zeros(1, 3, 48, side)))
    with pytest.raises(ValueError, match="expected that size"):
        trace(config, (48, side))


def test_an_unknown_kind_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown type 'beit'.*'convnext'.*'vit'"):
        vision_kind(BeitConfig())
    for kind in VISION_KINDS:
        assert json.dumps(kind) in {json.dumps(tiny_config(name).model_type) for name in KINDS}
