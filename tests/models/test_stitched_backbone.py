"""Stitched backbones: feature maps per stage, against the classifier's hidden states and backbones of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision import PREFIX, called, images, tiny_classifier, tiny_pair, tiny_path, tiny_stitched
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    ResNetBackbone,
    SwinBackbone,
)

from klas_hf import StitchedForImageClassification, StitchedModel
from klas_hf.models import StitchedBackbone

# source, target, stitch, (channels, stride in pixels) of the stem and of every stage
STAGED: list[tuple[str, str, tuple[int, int], list[tuple[int, int]]]] = [
    ("resnet", "resnet", (1, 0), [(8, 4), (12, 4), (24, 8)]),
    ("resnet", "resnet", (1, 1), [(8, 4), (12, 4), (24, 8)]),
    ("resnet", "resnet", (2, 2), [(8, 4), (12, 4), (24, 8)]),  # the stitch ends the first stage
    ("resnet", "resnet", (3, 3), [(8, 4), (8, 4), (24, 8)]),
    ("swin", "swin", (1, 1), [(8, 4), (12, 4), (24, 8)]),
    ("swin", "swin", (2, 3), [(8, 4), (8, 4), (24, 8)]),
    ("resnet", "swin", (1, 1), [(8, 4), (12, 4), (24, 8)]),
    ("resnet", "swin", (3, 3), [(8, 4), (8, 4), (24, 8)]),
    ("swin", "resnet", (3, 3), [(8, 4), (8, 4), (24, 8)]),
    ("convnext", "convnext", (2, 3), [(8, 4), (8, 4), (24, 8)]),
    ("mobilenet_v1", "resnet", (3, 1), [(4, 2), (8, 2), (12, 4), (24, 8)]),  # its second stage is ResNet's first
    ("mobilenet_v1", "resnet", (4, 3), [(4, 2), (8, 2), (16, 4), (24, 8)]),
    ("dinov2", "swin", (2, 3), [(16, 8), (24, 8)]),  # the one stage of the source is the target's second
]


def backbone_of(model: StitchedForImageClassification, **features: Any) -> StitchedBackbone:
    """The backbone with the weights of a classifier, and norms that are not at a special value."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.set_output_features_output_indices(features.get("out_features"), features.get("out_indices"))
    backbone = StitchedBackbone(config).to(model.dtype).eval()
    state = model.state_dict()
    backbone.load_state_dict(
        {name: state[name] for name in backbone.state_dict() if "norms." not in name}, strict=False
    )
    with torch.no_grad():
        for parameter in backbone.norms.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return backbone


@torch.no_grad()
def maps(backbone: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, ...]:
    return backbone(pixels).feature_maps


def to_map(hidden: Tensor, grid: int, prefix: int) -> Tensor:
    if hidden.ndim == 4:
        return hidden
    rows = hidden[:, prefix:]
    return torch.stack([torch.stack([rows[:, y * grid + x] for x in range(grid)], -1) for y in range(grid)], -2)


def normed(one: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean, variance = one.mean(1, keepdim=True), one.var(1, keepdim=True, unbiased=False)
    weight, bias = (tensor.detach()[:, None, None] for tensor in (norm.weight, norm.bias))
    return (one - mean) / (variance + norm.eps).sqrt() * weight + bias


@pytest.mark.parametrize(("source", "target", "stitch", "expected"), STAGED)
def test_maps_are_the_last_hidden_states_of_each_grid(
    source: str, target: str, stitch: tuple[int, int], expected: list[tuple[int, int]]
) -> None:
    model = tiny_stitched(*tiny_pair(source, target), stitch)
    names = ["stem", *(f"stage{number}" for number in range(1, len(expected)))]
    backbone = backbone_of(model, out_features=names)
    found = maps(backbone, images("swin"))
    assert backbone.stage_names == names
    assert backbone.channels == backbone.num_features == [channels for channels, _ in expected]
    assert [tuple(one.shape) for one in found] == [(2, c, 32 // stride, 32 // stride) for c, stride in expected]

    with torch.no_grad():
        states = model(images("swin"), output_hidden_states=True).hidden_states
    prefixes = [PREFIX.get(source, 0)] * (stitch[0] + 1) + [0] * (len(states) - stitch[0] - 1)
    by_grid: dict[int, Tensor] = {}
    for prefix, state in zip(prefixes, states, strict=True):
        grid = state.shape[-1] if state.ndim == 4 else round((state.shape[1] - prefix) ** 0.5)
        by_grid[grid] = to_map(state, grid, prefix)
    stem = to_map(states[0], 32 // expected[0][1], prefixes[0])
    torch.testing.assert_close(found[0], stem, rtol=1e-12, atol=1e-12)
    for name, one, last in zip(names[1:], found[1:], by_grid.values(), strict=True):
        wanted = normed(last, backbone.norms[name]) if name in backbone.norms else last
        torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("source", "target", "stitch", "with_norm"),
    [
        ("resnet", "resnet", (1, 1), set()),
        ("mobilenet_v1", "resnet", (3, 1), set()),
        ("swin", "swin", (2, 3), {"stage1", "stage2"}),
        ("resnet", "swin", (3, 3), {"stage2"}),
        ("swin", "resnet", (3, 3), {"stage1"}),
        ("vit", "vit", (1, 2), {"stage1", "stage2"}),
    ],
)
def test_maps_of_families_that_norm_them_are_normed(
    source: str, target: str, stitch: tuple[int, int], with_norm: set[str]
) -> None:
    model = tiny_stitched(*tiny_pair(source, target), stitch)
    names = model.config.stage_names
    assert set(backbone_of(model, out_features=names).norms) == with_norm
    assert set(backbone_of(model, out_features=names[:2]).norms) == with_norm & set(names[:2])


# kinds, path, (channels, stride in pixels) of the stem and of every stage
PATHS: list[tuple[tuple[str, str], str, list[tuple[int, int]]]] = [
    (("resnet", "resnet"), "1[:1] 0[1:3] 1[3:]", [(8, 4), (8, 4), (24, 8)]),
    (("resnet", "swin"), "1[:1] 0[1:2] 1[2:]", [(12, 4), (12, 4), (24, 8)]),  # the last joint ends the first stage
    (("swin", "resnet"), "0[:1] 1[2:3] 0[3:]", [(8, 4), (12, 4), (16, 8)]),  # an empty last slice ends the path
    (("swin", "convnext"), "0[:1] 1[1:3] 0[2:]", [(8, 4), (12, 4), (16, 8)]),
    (("swin", "swin"), "1[:]", [(12, 4), (12, 4), (24, 8)]),
]


@pytest.mark.parametrize(("kinds", "path", "expected"), PATHS)
def test_maps_of_paths_are_the_last_hidden_states_of_each_grid(
    kinds: tuple[str, str], path: str, expected: list[tuple[int, int]]
) -> None:
    model = tiny_path(list(tiny_pair(*kinds)), path, image_size=32)
    names = ["stem", *(f"stage{number}" for number in range(1, len(expected)))]
    backbone = backbone_of(model, out_features=names)
    found = maps(backbone, images("swin"))
    assert backbone.stage_names == names
    assert backbone.num_features == [channels for channels, _ in expected]
    with torch.no_grad():
        states = model(images("swin"), output_hidden_states=True).hidden_states
    by_grid: dict[int, Tensor] = {}
    for state in states:
        grid = state.shape[-1] if state.ndim == 4 else round(state.shape[1] ** 0.5)
        by_grid[grid] = to_map(state, grid, 0)
    assert list(by_grid) == [32 // stride for _, stride in expected[1:]]
    torch.testing.assert_close(found[0], to_map(states[0], 32 // expected[0][1], 0), rtol=1e-12, atol=1e-12)
    for name, one, last in zip(names[1:], found[1:], by_grid.values(), strict=True):
        wanted = normed(last, backbone.norms[name]) if name in backbone.norms else last
        torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-9)


def test_every_block_of_a_vit_is_a_stage() -> None:
    for kind in ("vit", "deit", "dinov2"):
        source, target = tiny_pair(kind)
        model = tiny_stitched(source, target, (2, 1))
        names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        backbone = backbone_of(model, out_features=names)
        assert backbone.channels == [16, 16, 16, 24, 24]
        found = maps(backbone, images(kind))
        with torch.no_grad():
            states = list(model(images(kind), output_hidden_states=True).hidden_states)
        del states[3]  # the stitch
        for name, one, state in zip(names, found, states, strict=True):
            expected = to_map(state, 4, PREFIX[kind])
            if name != "stem":
                expected = normed(expected, backbone.norms[name])
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


# ---- the backbones of transformers


def identity_backbone(kind: str, depth: int, names: list[str]) -> tuple[PreTrainedModel, StitchedBackbone]:
    anchor = tiny_classifier(kind, large=True)
    model = tiny_stitched(anchor, anchor, (depth, depth))
    layer = model.stitching_layers()[0]
    with torch.no_grad():
        layer.weight.copy_(torch.eye(len(layer.weight)).reshape(layer.weight.shape))
        layer.bias.zero_()
    return anchor, backbone_of(model, out_features=names)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", ["resnet", "bottleneck"])
def test_an_identity_is_the_resnet_backbone(kind: str, depth: int) -> None:
    names = ["stem", "stage1", "stage2"]
    anchor, backbone = identity_backbone(kind, depth, names)
    config = type(anchor.config).from_dict(anchor.config.to_dict())
    config.out_features = names
    native = ResNetBackbone(config).double().eval()
    native.load_state_dict(anchor.resnet.state_dict())
    assert backbone.channels == native.channels
    assert backbone.stage_names == native.stage_names
    for one, other in zip(maps(backbone, images(kind)), maps(native, images(kind)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_identity_is_the_swin_backbone(depth: int) -> None:
    names = ["stage1", "stage2"]
    anchor, backbone = identity_backbone("swin", depth, names)
    config = type(anchor.config).from_dict(anchor.config.to_dict())
    config.out_features = names
    native = SwinBackbone(config).double().eval()
    norms = {f"hidden_states_norms.{name}": tensor for name, tensor in backbone.norms.state_dict().items()}
    loaded = native.load_state_dict(anchor.state_dict() | norms, strict=False)
    if loaded.missing_keys:  # the body has no prefix in some versions
        loaded = native.load_state_dict(anchor.swin.state_dict() | norms, strict=False)
    assert not loaded.missing_keys
    assert backbone.channels == native.channels
    for one, other in zip(maps(backbone, images("swin")), maps(native, images("swin")), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# ---- which stages


def test_features_are_chosen_by_name_or_index() -> None:
    model = tiny_stitched(*tiny_pair("resnet"), (1, 1))
    every = maps(backbone_of(model, out_features=["stem", "stage1", "stage2"]), images("resnet"))
    for features, places in (
        ({}, [2]),
        ({"out_features": ["stage1"]}, [1]),
        ({"out_indices": [0, 2]}, [0, 2]),
        ({"out_indices": (1, 2)}, [1, 2]),
        ({"out_features": ["stem", "stage2"]}, [0, 2]),
    ):
        backbone = backbone_of(model, **features)
        assert list(backbone.out_indices) == places
        assert backbone.out_features == [["stem", "stage1", "stage2"][place] for place in places]
        assert backbone.channels == [[8, 12, 24][place] for place in places]
        found = maps(backbone, images("resnet"))
        assert all(torch.equal(one, every[place]) for one, place in zip(found, places, strict=True))
    with pytest.raises(ValueError, match="stage9"):
        backbone_of(model, out_features=["stage9"])


def test_outputs_as_tuples_and_hidden_states() -> None:
    model = tiny_stitched(*tiny_pair("swin"), (1, 1))
    backbone = backbone_of(model, out_indices=[1, 2])
    with torch.no_grad():
        states = model(images("swin"), output_hidden_states=True).hidden_states
        output = backbone(images("swin"), output_hidden_states=True)
        feature_maps, hidden_states = backbone(images("swin"), output_hidden_states=True, return_dict=False)
    for found in (output.hidden_states, hidden_states):
        assert all(torch.equal(*pair) for pair in zip(found, states, strict=True))
    assert all(torch.equal(*pair) for pair in zip(feature_maps, output.feature_maps, strict=True))
    assert output.attentions is None
    assert backbone(images("swin")).hidden_states is None


# ---- saving and loading


@pytest.mark.parametrize(
    ("source", "target", "stitch"),
    [("swin", "swin", (2, 3)), ("resnet", "resnet", (1, 1)), ("vit", "vit", (1, 1)), ("convnext", "swin", (1, 1))],
)
def test_a_saved_classifier_is_loaded_as_a_backbone(
    source: str, target: str, stitch: tuple[int, int], tmp_path: Path
) -> None:
    model = tiny_stitched(*tiny_pair(source, target), stitch)
    model.save_pretrained(tmp_path / "classifier")
    backbone, info = StitchedBackbone.from_pretrained(
        tmp_path / "classifier", out_indices=[1, 2], output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    old, new = model.state_dict(), backbone.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in new if not name.startswith("norms."))
    lost = {name for name in old.keys() - new.keys() if "num_batches" not in name}
    assert all("classifier" in name or "layernorm" in name for name in lost)
    for norm in backbone.norms.values():
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
    with torch.no_grad():
        for parameter in backbone.norms.parameters():
            parameter += torch.randn_like(parameter)
    expected = maps(backbone, images(source))
    backbone.save_pretrained(tmp_path / "backbone")
    for loader in (StitchedBackbone, StitchedModel):
        loaded = loader.from_pretrained(tmp_path / "backbone")
        assert type(loaded) is StitchedBackbone
        assert loaded.out_features == backbone.out_features
        assert loaded.state_dict().keys() == new.keys()
        for one, other in zip(maps(loaded, images(source)), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_auto_backbone_makes_one_from_a_configuration(tmp_path: Path) -> None:
    model = tiny_stitched(*tiny_pair("resnet", "swin"), (1, 1))
    model.config.out_features = ["stage1", "stage2"]
    model.config.save_pretrained(tmp_path)
    backbone = AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(backbone) is StitchedBackbone
    assert backbone.channels == [12, 24]
    assert [one.shape[1:] for one in maps(backbone, images("resnet", dtype=backbone.dtype))] == [(12, 8, 8), (24, 4, 4)]


def test_unused_blocks_and_the_head_are_not_kept() -> None:
    source, target = tiny_pair("swin")
    backbone = backbone_of(tiny_stitched(source, target, (2, 3)), out_indices=[1, 2])
    classifier = tiny_stitched(source, target, (2, 3))
    kept = {name for name in backbone.state_dict() if not name.startswith("norms.")}
    head = {f"slices.1.{part}.{kind}" for part in ("swin.layernorm", "classifier") for kind in ("weight", "bias")}
    assert kept == set(classifier.state_dict()) - head
    ran = called(backbone, lambda: maps(backbone, images("swin")))
    assert not [name for name in ran if name.startswith("slices.0.swin.encoder.layers.1.blocks.1")]
    assert not [name for name in ran if name.startswith("slices.1.swin.encoder.layers.0")]


@pytest.mark.parametrize("pair", [("swin", "swin"), ("resnet", "swin")])
def test_mask2former_takes_it_as_its_backbone(pair: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    widths = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]} if pair[0] == "resnet" else {}
    four = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    source = tiny_classifier(pair[0], **(widths or four))
    target = tiny_classifier("swin", large=True, **four | {"embed_dim": 12, "depths": [1, 1, 2, 1]})
    config = tiny_stitched(source, target, (2, 2), image_size=64, dtype=torch.float32).config
    config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    settings = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "dim_feedforward": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "encoder_feedforward_dim": 32}
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=config, num_queries=4, num_labels=3, **settings, **layers)
    ).eval()
    backbone = next(module for module in model.modules() if isinstance(module, StitchedBackbone))
    assert backbone.channels == [8, 24, 48, 96]
    pixels = torch.randn(2, 3, 64, 96)
    model.train()
    labels = {"mask_labels": [torch.ones(1, 64, 96)] * 2, "class_labels": [torch.tensor([1])] * 2}
    model(pixels, **labels).loss.backward()
    assert backbone.stitching_layers()[0].weight.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        output = model(pixels)
    assert output.masks_queries_logits.shape == (2, 4, 16, 24)
    assert output.class_queries_logits.shape == (2, 4, 4)
    model.save_pretrained(tmp_path)
    loaded, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        again = loaded(pixels)
    torch.testing.assert_close(again.masks_queries_logits, output.masks_queries_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.class_queries_logits, output.class_queries_logits, rtol=1e-5, atol=1e-5)
