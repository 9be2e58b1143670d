"""Stitched classifiers: against hooks on the whole anchors, what they hold and run, and what they give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision import (
    CLASSES,
    KINDS,
    PREFIX,
    SIDE,
    apply_block,
    blocks,
    called,
    embedding,
    images,
    logits,
    middle,
    outputs,
    possible,
    reference_logits,
    small_resnet,
    tensors_in,
    tiny_classifier,
    tiny_pair,
    tiny_stitched,
    used_tensors,
    values,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    PreTrainedModel,
)

from klas_hf import StitchedForImageClassification
from klas_hf.models import StitchedVisionConfig
from klas_hf.models.modeling_stitched_vision import StitchingLayer
from klas_hf.models.vision_features import Features
from klas_hf.models.vision_kinds import VISION_KINDS

# Small source, large target, side of the images in pixels
ACROSS = [
    ("resnet", "swin", 32),  # map → tokens
    ("convnext", "swinv2", 32),
    ("mobilenet_v1", "convnext", 32),  # map → map
    ("swin", "resnet", 32),  # tokens → map
    ("dinov2", "swin", 32),  # the class token is dropped
    ("deit_teacher", "swin", 32),  # both class tokens are dropped
    ("vit", "dinov2", 32),  # the class token is kept
    ("deit", "deit_teacher", 32),
    ("levit", "levit_teacher", 64),
    ("resnet", "levit", 64),
]


def check_against_the_anchors(
    source: PreTrainedModel, target: PreTrainedModel, stitch: tuple[int, int], pixels: Tensor, **options: Any
) -> None:
    model = tiny_stitched(source, target, stitch, **options)
    layer = model.stitching_layers()[0]
    expected = reference_logits(source, target, stitch, layer.weight.detach(), layer.bias.detach(), pixels)
    torch.testing.assert_close(logits(model, pixels), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_possible_stitch_equals_hooks_on_the_whole_anchors(kind: str) -> None:
    source, target = tiny_pair(kind)
    pixels = images(kind)
    every = possible(source, target, pixels)
    assert {i for i, _ in every} == set(range(1, len(blocks(source)) + 1))
    assert {j for _, j in every} == set(range(len(blocks(target))))
    for stitch in every[:: 8 if kind == "mobilenet_v1" else 1]:
        check_against_the_anchors(source, target, stitch, pixels)


@pytest.mark.parametrize(("source_kind", "target_kind", "side"), ACROSS)
def test_stitches_across_kinds_equal_hooks_on_the_whole_anchors(source_kind: str, target_kind: str, side: int) -> None:
    source, target = tiny_pair(source_kind, target_kind)
    pixels = torch.randn(2, 3, side, side, dtype=torch.float64)
    if side == 64:
        source = small_resnet() if source_kind == "resnet" else source
    every = possible(source, target, pixels)
    assert every
    for stitch in (every[0], every[len(every) // 2], every[-1]):
        check_against_the_anchors(source, target, stitch, pixels)


def test_images_that_are_not_square() -> None:
    pixels = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    for source_kind, target_kind, j in (("resnet", "swin", 1), ("swin", "convnext", 3), ("mobilenet_v1", "resnet", 0)):
        source, target = tiny_pair(source_kind, target_kind)
        check_against_the_anchors(
            source, target, ({"mobilenet_v1": 3}.get(source_kind, 2), j), pixels, image_size=(32, 64)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_self_stitch_with_an_identity_is_the_anchor_at_every_depth(kind: str) -> None:
    anchor = tiny_classifier(kind, large=True).float()
    pixels = images(kind, dtype=torch.float32)
    expected = logits(anchor, pixels)
    for depth in range(1, len(blocks(anchor)), 3 if kind == "mobilenet_v1" else 1):
        model = tiny_stitched(anchor, anchor, (depth, depth))
        layer = model.stitching_layers()[0]
        with torch.no_grad():
            layer.weight.copy_(torch.eye(len(layer.weight)).reshape(layer.weight.shape))
            layer.bias.zero_()
        assert torch.equal(logits(model, pixels), expected), depth


# ---- the stitching layer


@pytest.mark.parametrize("source", ["vit", "deit", "swin", "resnet"])
@pytest.mark.parametrize("target", ["vit", "deit", "swin", "resnet"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_stitching_layer_maps_every_position_alike(source: str, target: str, bias: bool) -> None:
    kinds = VISION_KINDS[source], VISION_KINDS[target]
    prefixes = [PREFIX.get(name, 0) for name in (source, target)]
    if prefixes[1] not in (0, prefixes[0]):
        with pytest.raises(ValueError, match=rf"{prefixes[0]} class tokens and a target with {prefixes[1]}.*as many"):
            StitchingLayer(*kinds, 4, 6, bias)
        return
    layer = StitchingLayer(*kinds, 4, 6, bias).double()
    assert (layer.projection.bias is not None) == bias
    height, width = 2, 3
    shape = (5, 4, height, width) if source == "resnet" else (5, prefixes[0] + height * width, 4)
    hidden = torch.randn(shape, dtype=torch.float64)
    found = layer(Features(hidden, height, width))
    assert (found.height, found.width) == (height, width)
    dropped = prefixes[0] - prefixes[1]
    assert found.hidden.shape == ((5, 6, 2, 3) if target == "resnet" else (5, prefixes[1] + 6, 6))
    assert found.hidden.is_contiguous()
    weight = layer.projection.weight.flatten(1)
    for sample in range(5):
        for place in range(prefixes[1] + height * width):
            at = divmod(place, width)
            x = hidden[sample, :, at[0], at[1]] if source == "resnet" else hidden[sample, dropped + place]
            y = found.hidden[sample, :, at[0], at[1]] if target == "resnet" else found.hidden[sample, place]
            expected = weight @ x + (layer.projection.bias if bias else 0)
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


def test_a_configuration_without_a_bias_makes_a_stitch_without_one() -> None:
    for kind in ("vit", "resnet"):
        source, target = tiny_pair(kind)
        config = tiny_stitched(source, target, (1, 1)).config
        config.joint_bias = False
        model = StitchedForImageClassification(config).float()
        assert model.stitching_layers()[0].bias is None
        assert logits(model, images(kind, dtype=torch.float32)).isfinite().all()


# ---- a stitched model has what it uses


@pytest.mark.parametrize("kind", KINDS)
def test_unused_blocks_are_neither_kept_nor_saved(kind: str, tmp_path: Path) -> None:
    source, target, (stop, start) = middle(kind)
    model = tiny_stitched(source, target, (stop, start))
    used = {
        "slices.0": used_tensors(source, 0, stop, embed=True, head=False),
        "slices.1": used_tensors(target, start, len(blocks(target)), embed=False, head=True),
    }
    names = {f"{side}.{name}" for side, of_side in used.items() for name in of_side}
    names |= {"joints.0.projection.weight", "joints.0.projection.bias"}
    assert set(model.state_dict()) == names
    for side, anchor in (("slices.0", source), ("slices.1", target)):
        for name in used[side]:
            assert torch.equal(model.state_dict()[f"{side}.{name}"], anchor.state_dict()[name])

    model.save_pretrained(tmp_path)
    # Files may have names of their own, so tensors are known by their values.
    saved = sorted(values(tensor) for tensor in tensors_in(tmp_path).values())
    assert saved == sorted(values(tensor) for tensor in model.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_only_used_blocks_run(kind: str) -> None:
    source, target, (stop, start) = middle(kind)
    model = tiny_stitched(source, target, (stop, start))
    ran = called(model, lambda: logits(model, images(kind)))
    expected = set()
    for side, anchor, used in (
        ("slices.0", source, [[embedding(source)], *blocks(source)[:stop]]),
        ("slices.1", target, blocks(target)[start:]),
    ):
        parts = {module for block in used for module in block}
        expected |= {f"{side}.{name}" for name, module in anchor.named_modules() if module in parts}
        unused = {module for block in blocks(anchor) for module in block} - parts
        assert not {f"{side}.{name}" for name, module in anchor.named_modules() if module in unused} & ran
    assert expected <= ran


# ---- the forward


@pytest.mark.parametrize("kind", ["vit", "swin", "levit", "resnet", "mobilenet_v1"])
def test_hidden_states_are_those_of_the_anchors_and_of_the_stitch(kind: str) -> None:
    source, target, (stop, start) = middle(kind)
    model = tiny_stitched(source, target, (stop, start))
    with torch.no_grad():
        states = model(images(kind), output_hidden_states=True).hidden_states
    assert len(states) == stop + len(blocks(target)) - start + 2
    expected, _ = outputs(source, images(kind))
    assert all(torch.equal(*pair) for pair in zip(states[: stop + 1], expected[: stop + 1], strict=True))
    hidden = states[stop + 1]
    assert hidden.shape == outputs(target, images(kind))[0][start].shape
    for block, state in zip(blocks(target)[start:], states[stop + 2 :], strict=True):
        with torch.no_grad():
            hidden = apply_block(target, block, hidden)
        torch.testing.assert_close(state, hidden, rtol=1e-9, atol=1e-9)
    assert model(images(kind)).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(images(kind)).hidden_states) == len(states)


def test_outputs_as_tuples_and_the_loss() -> None:
    model = tiny_stitched(*middle("vit"))
    pixels, labels = images("vit", 3), torch.tensor([1, 4, 1])
    output = model(pixels, labels=labels, output_hidden_states=True)
    shares = output.logits.detach().softmax(-1)
    expected = -sum(shares[row, label].log() for row, label in enumerate(labels)) / 3
    torch.testing.assert_close(output.loss.detach(), expected)
    loss, found, states = model(pixels, labels=labels, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(found, output.logits)
    assert all(torch.equal(*pair) for pair in zip(states, output.hidden_states, strict=True))
    (alone,) = model(pixels, return_dict=False)
    assert torch.equal(alone, output.logits)
    model.config.return_dict = False
    assert isinstance(model(pixels), tuple)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_attention_kernel_can_be_chosen(kind: str) -> None:
    source, target, stitch = middle(kind)
    models = {name: tiny_stitched(source, target, stitch, attn_implementation=name) for name in ("eager", "sdpa")}
    for name, model in models.items():
        sides = (model.config, *(part.config for part in model.slices))
        assert {config._attn_implementation for config in sides} == {name}
    # The eager kernel takes its softmax in float32.
    torch.testing.assert_close(*(logits(model, images(kind)) for model in models.values()), rtol=1e-5, atol=1e-6)


# ---- bad input


def test_bad_images_are_refused() -> None:
    model = tiny_stitched(*tiny_pair("vit"), (1, 1))
    with pytest.raises(ValueError, match=r"shape \(2, 4, 32, 32\); expected \(batch, 3, height, width\)"):
        model(torch.zeros(2, 4, 32, 32).double())
    with pytest.raises(ValueError, match=r"\(64, 64\) pixels for a vit of \(32, 32\).*expected that size"):
        model(torch.zeros(2, 3, 64, 64).double())


def test_images_that_the_target_does_not_take_are_refused() -> None:
    model = tiny_stitched(small_resnet(), tiny_classifier("levit", large=True), (3, 2))
    assert logits(model, images("levit")).shape == (2, CLASSES)
    with pytest.raises(ValueError, match=r"\(128, 128\) pixels for a levit of \(64, 64\)"):
        model(torch.zeros(2, 3, 128, 128).double())


def test_an_unknown_kind_in_a_configuration_is_told_the_known_ones() -> None:
    config = AutoConfig.for_model("beit")
    with pytest.raises(ValueError, match="unknown type 'beit'.*'swin'"):
        StitchedVisionConfig(anchor_configs=[config])


def test_the_default_image_size_is_the_sources() -> None:
    config = tiny_classifier("swin").config
    assert StitchedVisionConfig(anchor_configs=[config]).image_size == [SIDE["swin"]] * 2
    given = StitchedVisionConfig(anchor_configs=[config], image_size=[8, 9])
    assert given.image_size == [8, 9]
