"""Paths of any number of slices through image classifiers: against hooks on the whole anchors, saved and loaded."""

import json
from pathlib import Path as FilePath
from typing import Any

import pytest
import quick_cases
import torch
from quick_cases import quick
from tiny_vision import (
    CLASSES,
    KINDS,
    LABELS,
    blocks,
    called,
    embedding,
    images,
    logits,
    maps_of,
    path_logits,
    path_outputs,
    sample_paths,
    sized,
    small_resnet,
    tensors_in,
    tiny_classifier,
    tiny_pair,
    tiny_path,
    used_tensors,
    values,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from klas_hf import StitchedForImageClassification, StitchedModel
from klas_hf.models import StitchedVisionConfig
from klas_hf.paths import Path


def check(anchors: list[PreTrainedModel], path: Path, pixels: Tensor, **options: Any) -> StitchedForImageClassification:
    model = tiny_path(anchors, path, **options)
    expected = path_logits(anchors, path, maps_of(model), pixels)
    torch.testing.assert_close(logits(model, pixels), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 1e-3
    assert model.config.path == str(path)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_paths_equal_hooks_on_the_whole_anchors(kind: str) -> None:
    anchors = list(tiny_pair(kind))
    every = sample_paths(anchors, images(kind))
    assert {path.joints for path in every} == {0, 1, 2}
    for path in every:
        model = check(anchors, path, images(kind), **sized(kind))
        assert len(model.stitching_layers()) == path.joints


# Kinds of the anchors, a path with joints in several stages, side of the images in pixels
ACROSS = [
    (("resnet", "swin"), "0[:1] 1[1:3] 0[3:]", 32),
    (("swin", "resnet"), "0[:1] 1[1:2] 0[1:3] 1[4:]", 32),
    (("mobilenet_v1", "convnext"), "0[:3] 1[1:3] 0[4:5] 1[3:]", 32),
    (("dinov2", "swin"), "0[:2] 1[3:4] 1[3:]", 32),
    (("deit_teacher", "deit"), "0[:2] 1[1:2] 0[1:]", 32),
    (("vit", "dinov2"), "1[:1] 0[:1] 1[1:]", 32),
]


@pytest.mark.parametrize(("kinds", "path", "side"), ACROSS)
def test_paths_across_kinds_equal_hooks_on_the_whole_anchors(kinds: tuple[str, str], path: str, side: int) -> None:
    check(list(tiny_pair(*kinds)), Path.parse(path), images(kinds[0]), image_size=side)


def test_paths_of_three_anchors_have_joints_in_several_stages() -> None:
    anchors = [
        tiny_classifier(kind, large=large, seed=seed, **changes)
        for seed, (kind, large, changes) in enumerate(
            [("resnet", False, {}), ("convnext", True, {}), ("swin", True, {"depths": [2, 2]})]
        )
    ]
    for text in ("0[:1] 1[1:3] 2[3:]", "1[:2] 2[1:2] 0[1:3] 1[4:]", "2[:1] 0[:3] 1[3:4] 2[3:]"):
        check(anchors, Path.parse(text), images("swin"), image_size=32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_anchor_cut_in_several_places_and_joined_by_identities_is_the_anchor(kind: str) -> None:
    anchor = tiny_classifier(kind, large=True).float()
    pixels = images(kind, dtype=torch.float32)
    depth = len(blocks(anchor))
    for path in ("0[:]", f"0[:1] 0[1:2] 0[2:{depth - 1}] 0[{depth - 1}:]", f"0[:1] 0[1:{depth}] 0[{depth}:]"):
        model = tiny_path([anchor], path.replace("0[2:2] ", ""), **sized(kind))
        with torch.no_grad():
            for layer in model.stitching_layers():
                layer.weight.copy_(torch.eye(len(layer.weight)).reshape(layer.weight.shape))
                layer.bias.zero_()
        assert torch.equal(logits(model, pixels), logits(anchor, pixels)), path


def test_repeated_blocks_are_weights_of_their_own() -> None:
    anchor = tiny_classifier("vit", large=True)
    model = tiny_path([anchor], "0[:2] 0[1:]")
    names = used_tensors(anchor, 1, 2, embed=False, head=False)
    state = model.state_dict()
    for name in names:
        assert torch.equal(state[f"slices.0.{name}"], state[f"slices.1.{name}"])
        assert state[f"slices.0.{name}"].data_ptr() != state[f"slices.1.{name}"].data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_in_the_middle_has_neither_embedding_nor_head(kind: str) -> None:
    anchors = list(tiny_pair(kind))
    path = next(path for path in reversed(sample_paths(anchors, images(kind))) if path.joints == 2)
    model = tiny_path(anchors, path, **sized(kind))
    bounds = path.bounds([len(blocks(anchor)) for anchor in anchors])
    expected = {f"joints.{number}.projection.{part}" for number in range(2) for part in ("weight", "bias")}
    running, ran = set(), called(model, lambda: logits(model, images(kind)))
    for number, (place, start, stop) in enumerate(bounds):
        used = used_tensors(anchors[place], start, stop, embed=number == 0, head=number == 2)
        expected |= {f"slices.{number}.{name}" for name in used}
        for name in used:
            assert torch.equal(model.state_dict()[f"slices.{number}.{name}"], anchors[place].state_dict()[name])
        parts = {module for block in blocks(anchors[place])[start:stop] for module in block}
        parts |= {embedding(anchors[place])} if number == 0 else set()
        inside = {module for block in blocks(anchors[place]) for module in block} | {embedding(anchors[place])}
        named = {module: f"slices.{number}.{name}" for name, module in anchors[place].named_modules()}
        running |= {named[module] for module in parts}
        assert not {named[module] for module in inside - parts} & ran
    assert set(model.state_dict()) == expected
    assert running <= ran


@pytest.mark.parametrize("kind", ["vit", "swin", "levit", "resnet"])
def test_hidden_states_are_those_of_every_block_and_joint(kind: str) -> None:
    anchors = list(tiny_pair(kind))
    path = next(path for path in reversed(sample_paths(anchors, images(kind))) if path.joints == 2)
    model = tiny_path(anchors, path, **sized(kind))
    with torch.no_grad():
        states = model(images(kind), output_hidden_states=True).hidden_states
    bounds = path.bounds([len(blocks(anchor)) for anchor in anchors])
    assert len(states) == 1 + path.joints + path.depth([len(blocks(anchor)) for anchor in anchors])
    left, _ = path_outputs(anchors, path, maps_of(model), images(kind))
    place = 0
    for number, (expected, (_, start, stop)) in enumerate(zip(left, bounds, strict=True)):
        place += stop - start + (number > 0)
        torch.testing.assert_close(states[place], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", quick(KINDS, quick_cases.KINDS))
def test_a_saved_path_is_the_same_model(kind: str, tmp_path: FilePath) -> None:
    anchors = list(tiny_pair(kind))
    paths = sample_paths(anchors, images(kind))
    for number, path in enumerate((paths[0], paths[1], paths[-1])):
        model = tiny_path(anchors, path, **sized(kind))
        folder = tmp_path / str(number)
        model.save_pretrained(folder, max_shard_size="20KB")
        saved = sorted(values(tensor) for tensor in tensors_in(folder).values())
        assert saved == sorted(values(tensor) for tensor in model.state_dict().values())
        for loader in (AutoModelForImageClassification, StitchedModel):
            loaded = loader.from_pretrained(folder)
            assert type(loaded) is StitchedForImageClassification
            assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(folder)}
            assert loaded.state_dict().keys() == model.state_dict().keys()
            assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
            expected = logits(model, images(kind))
            torch.testing.assert_close(logits(loaded, images(kind)), expected, rtol=1e-12, atol=1e-12)


def test_a_configuration_from_json_has_the_path_and_all_anchors(tmp_path: FilePath) -> None:
    model = tiny_path(list(tiny_pair("swin")), "1[:1] 0[1:3] 1[3:]")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["path"], written["format_version"]) == ("1[:1] 0[1:3] 1[3:]", 3)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is StitchedVisionConfig
    assert config.slices == [[1, 0, 1], [0, 1, 3], [1, 3, 4]]
    assert [one.depths for one in config.anchor_configs] == [[1, 2], [2, 2]]
    assert config.joint_channels == [[12, 8], [16, 24]]
    assert config.hidden_size == 24
    assert config.id2label == LABELS


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_another_number_of_labels_makes_a_new_head(kind: str, tmp_path: FilePath) -> None:
    """Also where the anchor that gives the head occurs before."""
    tiny_path(list(tiny_pair(kind)), "1[:1] 0[1:2] 1[1:]", **sized(kind)).save_pretrained(tmp_path)
    loaded = StitchedModel.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert logits(loaded, images(kind)).shape == (2, 7)


def test_stochastic_depth_grows_over_all_slices() -> None:
    model = tiny_path(list(tiny_pair("vit")), "0[:1] 1[1:2] 0[:1] 1[1:]").train()
    pixels, rates = images("vit", 400), []
    with torch.no_grad():
        states = model(pixels, drop_path=0.6, output_hidden_states=True).hidden_states
    for number in (1, 3, 5, 7, 8):  # the blocks: 0 is the embedding, 2, 4 and 6 are joints
        rates.append(float((states[number] == states[number - 1]).flatten(1).all(1).double().mean()))
    assert rates == pytest.approx([0, 0.15, 0.3, 0.45, 0.6], abs=0.1)


def test_gradients_reach_every_slice_and_joint() -> None:
    model = tiny_path(list(tiny_pair("swin")), "1[:1] 0[1:3] 1[3:]")
    model(images("swin"), labels=torch.tensor([0, 3])).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradients_with_checkpointing_are_those_without() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_path(list(tiny_pair("vit")), "0[:1] 1[1:2] 0[:1] 1[1:]").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(images("vit"), labels=torch.tensor([0, 3])).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_kernel_is_chosen_for_every_slice(name: str) -> None:
    model = tiny_path(list(tiny_pair("vit")), "1[:1] 0[:1] 1[1:]", attn_implementation=name)
    assert {part.config._attn_implementation for part in model.slices} == {name}


def test_images_that_a_slice_in_the_middle_does_not_take_are_refused() -> None:
    anchors = [small_resnet(), tiny_classifier("levit", large=True)]
    model = tiny_path(anchors, "0[:3] 1[1:2] 0[3:]")
    assert logits(model, images("levit")).shape == (2, CLASSES)
    with pytest.raises(ValueError, match=r"\(128, 128\) pixels for a levit of \(64, 64\)"):
        model(torch.zeros(2, 3, 128, 128).double())


def test_blocks_of_slices_in_the_middle_are_not_split_between_devices() -> None:
    model = tiny_path(list(tiny_pair("resnet", "swin")), "0[:1] 1[1:3] 0[3:]", image_size=32)
    assert set(model._no_split_modules) == {"ResNetBasicLayer", "SwinLayer", "SwinPatchMerging"}
    assert all(type(layer) in (nn.Linear, nn.Conv2d) for layer in model.stitching_layers())
