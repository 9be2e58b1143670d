"""Stitched dense models against transformers' own anchors, run with hooks."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dense import (
    NAMES,
    SIZE,
    STAGES,
    dense_images,
    head_config,
    outputs,
    tiny_backbone,
    tiny_dense,
    tiny_dense_pair,
)
from tiny_vision import tiny_classifier
from torch import Tensor, nn
from transformers import (
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    DetrConfig,
    DetrForObjectDetection,
    DPTConfig,
    DPTForSemanticSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedModel,
    SegformerImageProcessorPil,
    pipeline,
)
from transformers.modeling_outputs import BackboneOutput

from klas_hf import StitchedModel, StitchedSupernet, measure_costs, save_delta
from klas_hf.models import StitchedBackbone
from klas_hf.stitching.loading import RANDOM_STITCH

BACKBONE = {"mask2former": "model.pixel_level_module.encoder", "upernet": "backbone"}
PIXELS = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))


def blocks(backbone: nn.Module, kind: str) -> list[nn.Module]:
    """The blocks of a backbone of transformers, in order."""
    if kind == "swin":
        return [block for stage in backbone.swin.encoder.layers for block in stage.blocks]
    return [layer for stage in backbone.encoder.stages for layer in stage.layers]


@torch.no_grad()
def native(model: PreTrainedModel, head: str, kind: str, pixels: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The maps of a dense model's backbone, and what each of its blocks gives."""
    backbone, kept = model.get_submodule(BACKBONE[head]), list[Tensor]()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks(backbone, kind)]
    maps = backbone(pixels).feature_maps
    for handle in handles:
        handle.remove()
    return maps, kept


def as_tokens(hidden: Tensor) -> Tensor:
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def replace_first(new: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})


@torch.no_grad()
def expected(
    source: PreTrainedModel, target: PreTrainedModel, head: str, kinds: tuple[str, str], stitch: tuple[int, int],
    backbone: StitchedBackbone, pixels: Tensor, from_source: Sequence[str],
) -> list[Tensor]:  # fmt: skip
    """What the stitched model should answer, from the two whole anchors of transformers."""
    maps, states = native(source, head, kinds[0], pixels)
    layer, body = backbone.stitching_layers()[0], target.get_submodule(BACKBONE[head])
    rows = as_tokens(states[stitch[0] - 1]) @ layer.weight.flatten(1).T + layer.bias
    if kinds[1] != "swin":
        grid = native(target, head, kinds[1], pixels)[1][stitch[1] - 1].shape[-2:]
        rows = rows.transpose(1, 2).unflatten(2, grid)
    block = blocks(body, kinds[1])[stitch[1]]
    handle = block.register_forward_pre_hook(partial(replace_first, rows), with_kwargs=True)
    theirs = list(body(pixels).feature_maps)
    handle.remove()
    for number, name in enumerate(STAGES):
        if name in from_source:
            lateral = backbone.lateral_joints[name]
            weight = lateral.weight[:, :, 0, 0]
            theirs[number] = torch.einsum("bchw,dc->bdhw", maps[number], weight) + lateral.bias[:, None, None]
    handle = body.register_forward_hook(lambda *args: BackboneOutput(feature_maps=tuple(theirs)))
    found = outputs(target, pixels)
    handle.remove()
    return found


def randomise(backbone: StitchedBackbone) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in [*backbone.stitching_layers(), *backbone.lateral_joints.values()]:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.weight.shape[1] ** 0.5)
            layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=generator))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("size", [pytest.param((64, 96), marks=SLOW), (40, 72)])  # off Swin's windows and below them
@pytest.mark.parametrize(
    ("head", "kind"), [("mask2former", "swin"), pytest.param("upernet", "swin", marks=SLOW), ("upernet", "convnext")]
)
def test_a_whole_anchor_is_itself(head: str, kind: str, size: tuple[int, int]) -> None:
    anchor = tiny_dense(head, kind, large=True)
    model = StitchedModel.from_path([tiny_dense(head, kind), anchor], "1[:]")
    assert type(model) is type(anchor)
    pixels = torch.randn(2, 3, *size)
    for one, other in zip(outputs(model, pixels), outputs(anchor, pixels), strict=True):
        if kind == "swin":
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # ConvNeXt norms in another layout


@pytest.mark.parametrize(
    ("head", "kinds", "stitch", "from_source"),
    [
        ("mask2former", ("swin", "swin"), (2, 3), ["stage1"]),
        ("upernet", ("swin", "resnet"), (4, 5), ["stage1", "stage2"]),
        pytest.param("mask2former", ("resnet", "swin"), (4, 5), ["stage1", "stage2"], marks=SLOW),
        pytest.param("upernet", ("swin", "swin"), (1, 1), [], marks=SLOW),
        pytest.param("upernet", ("convnext", "swin"), (3, 3), ["stage1"], marks=SLOW),
    ],
)  # fmt: skip
def test_a_stitch_gives_the_head_maps_of_both_slices(
    head: str, kinds: tuple[str, str], stitch: tuple[int, int], from_source: list[str]
) -> None:
    source, target = tiny_dense_pair(head, *kinds)
    with pytest.warns(UserWarning, match=RANDOM_STITCH.split(":")[0]):
        model = StitchedModel.from_anchors(source, target, stitch, image_size=SIZE)
    backbone = model.get_submodule(BACKBONE[head])
    assert type(model) is type(target)
    assert isinstance(backbone, StitchedBackbone)
    assert list(backbone.lateral_joints) == from_source
    randomise(backbone)
    wanted = expected(source, target, head, kinds, stitch, backbone, PIXELS, from_source)
    for one, other in zip(outputs(model, PIXELS), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@SLOW
def test_the_maps_of_the_source_are_fitted_to_those_that_the_head_knows() -> None:
    source, target = tiny_dense_pair("upernet")
    data = dense_images(4)
    model = StitchedModel.from_anchors(source, target, (4, 5), calibration=data)
    x, y = ([], [])
    for batch in data:
        for found, anchor in ((x, source), (y, target)):
            found.append(native(anchor, "upernet", "swin", batch["pixel_values"])[0])
    for number, name in enumerate(STAGES[:2]):
        rows = [torch.cat([maps[number] for maps in one]).movedim(1, -1).flatten(0, 2).double() for one in (x, y)]
        design = np.hstack([rows[0].numpy(), np.ones((len(rows[0]), 1))])
        solution = np.linalg.lstsq(design, rows[1].numpy(), rcond=1e-5)[0]
        layer = model.backbone.lateral_joints[name]  # the maps are normed, so that the layer is not unique
        fitted = rows[0].float() @ layer.weight[:, :, 0, 0].T + layer.bias
        np.testing.assert_allclose(fitted.detach(), design @ solution, rtol=1e-3, atol=1e-3)


@SLOW
def test_joints_in_several_stages() -> None:
    anchors = tiny_dense_pair("mask2former")
    path = "0[:1] 1[1:3] 0[2:4] 1[5:]"  # in the first and second stage, and over to the third
    model = StitchedModel.from_path(anchors, path, calibration=dense_images(3))
    backbone = model.model.pixel_level_module.encoder
    assert backbone.out_features == STAGES
    assert [layer.weight.shape[:2] for layer in backbone.stitching_layers()] == [(12, 8), (16, 24), (48, 32)]
    assert backbone.channels == [12, 24, 48, 96]
    assert all(tensor.isfinite().all() for tensor in outputs(model, PIXELS))


@pytest.mark.parametrize("head", ["mask2former", pytest.param("upernet", marks=SLOW)])
def test_saved_models_load_by_the_stock_classes_and_run_in_the_stock_pipeline(head: str, tmp_path: Path) -> None:
    source, target = tiny_dense_pair(head)
    for name, anchor in (("small", source), ("large", target)):
        anchor.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / "small"), str(tmp_path / "large")]
    model = StitchedModel.from_path(folders, "0[:2] 1[3:]", calibration=dense_images(2))
    in_memory = StitchedModel.from_path([source, target], "0[:2] 1[3:]", calibration=dense_images(2))
    assert all(torch.equal(*pair) for pair in zip(outputs(model, PIXELS), outputs(in_memory, PIXELS), strict=True))
    assert model.config.backbone_config.anchor_names == folders
    model.save_pretrained(tmp_path / "stitched")
    auto = AutoModelForUniversalSegmentation if head == "mask2former" else AutoModelForSemanticSegmentation
    loaded = auto.from_pretrained(tmp_path / "stitched")
    assert type(loaded) is type(target)
    assert all(torch.equal(*pair) for pair in zip(outputs(model, PIXELS), outputs(loaded, PIXELS), strict=True))
    processors = {"mask2former": Mask2FormerImageProcessorPil, "upernet": SegformerImageProcessorPil}
    processors[head](size={"height": 64, "width": 64}).save_pretrained(tmp_path / "stitched")
    segment = pipeline("image-segmentation", str(tmp_path / "stitched"), subtask="semantic")
    found = segment(Image.new("RGB", (80, 64), (200, 30, 90)))
    assert {one["label"] for one in found} <= set(NAMES)
    assert sum(np.asarray(one["mask"], dtype=int) for one in found).tolist() == [[255] * 80] * 64


def four_stages(kind: str, *, large: bool = False) -> PreTrainedModel:
    config = tiny_backbone(kind, large=large).to_dict()
    names = ("embed_dim", "depths", "num_heads", "window_size", "image_size", "hidden_sizes", "embedding_size")
    kept = {name: config[name] for name in names if name in config}
    if kind == "swin":
        kept["window_size"] = 2  # no classifier has a grid below its windows
    return tiny_classifier(kind, large=large, **kept).float()


@pytest.mark.parametrize("head", [pytest.param("mask2former", marks=SLOW), "upernet"])
def test_classifiers_get_a_new_head(head: str) -> None:
    small, large = four_stages("swin"), four_stages("swin", large=True)
    model = StitchedModel.from_anchors(small, large, (2, 3), head=head_config(head), calibration=dense_images(2))
    backbone = model.get_submodule(BACKBONE[head])
    assert backbone.channels == [8, 24, 48, 96]  # the head is made for what the path gives
    assert not backbone.lateral_joints
    assert model.config.num_labels == len(NAMES)
    own = {name: tensor for name, tensor in large.state_dict().items() if "layers.3" in name}
    assert own
    for name, tensor in own.items():
        assert torch.equal(backbone.state_dict()[f"slices.1.{name}"], tensor)
    assert measure_costs(model).parameters == model.num_parameters()


def test_mobilenets_have_a_backbone_through_ours() -> None:
    small = tiny_classifier("mobilenet_v1", depth_multiplier=0.25, image_size=64).float()
    model = StitchedModel.from_path([small], "0[:]", head=head_config("upernet"), image_size=64)
    strides = [64 // one.shape[-1] for one in model.backbone(torch.zeros(1, 3, 64, 64)).feature_maps]
    assert strides == [4, 8, 16, 32]
    other = StitchedModel.from_path([model], "0[:]")  # as an anchor it has a stitched backbone of one slice
    assert all(torch.equal(*pair) for pair in zip(outputs(model, PIXELS), outputs(other, PIXELS), strict=True))


def test_detection_heads_take_a_stitched_backbone(tmp_path: Path) -> None:
    small, large = four_stages("resnet"), four_stages("resnet", large=True)
    stitched = StitchedModel.from_anchors(small, large, (2, 3), calibration=dense_images(2), image_size=64)
    config = stitched.config
    config.out_features = ["stage4"]
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 4, "num_labels": 3}
    model = DetrForObjectDetection(DetrConfig(backbone_config=config, use_timm_backbone=False, **sizes, **heads)).eval()
    assert any(isinstance(module, StitchedBackbone) for module in model.modules())
    with torch.no_grad():
        found = model(PIXELS)
    assert found.pred_boxes.shape == (2, 4, 4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = DetrForObjectDetection.from_pretrained(tmp_path)(PIXELS)
    assert torch.equal(again.pred_boxes, found.pred_boxes)


def test_stochastic_depth_is_the_anchors_own() -> None:
    backbone = tiny_backbone("swin", large=True, drop_path_rate=0.9)
    target = type(tiny_dense("upernet"))(head_config("upernet", backbone_config=backbone)).eval()
    model = StitchedModel.from_path([tiny_dense("upernet"), target], "1[:]")
    assert model.config.backbone_config.drop_path_rate == 0.9
    assert torch.equal(outputs(model, PIXELS)[0], outputs(model, PIXELS)[0])
    model.backbone.train()
    torch.manual_seed(0)
    assert not torch.equal(outputs(model, PIXELS)[0], outputs(model, PIXELS)[0])


# ---- what does not fit


def test_heads_of_other_classes_are_refused() -> None:
    source, target = tiny_dense("upernet"), tiny_dense("upernet", large=True, num_labels=7)
    with pytest.raises(ValueError, match="anchors of 4 and 7 classes"):
        StitchedModel.from_anchors(source, target, (2, 3))


def test_a_missing_stride_is_named() -> None:
    source = tiny_dense("upernet", "convnext", patch_size=4)
    coarse = head_config("upernet", backbone_config=tiny_backbone("convnext", patch_size=8))
    coarse = type(source)(coarse)
    with pytest.raises(ValueError, match=r"map of stride 4 \(16×16 of 64×64 pixels\)"):
        StitchedModel.from_path([coarse, source], "0[:1] 1[3:]")
    levit = tiny_classifier("levit").float()
    with pytest.raises(ValueError, match=r"strides \[16, 32, 64\] for upernet.*expected those of \[4, 8\] too"):
        StitchedModel.from_path([levit], "0[:]", head=head_config("upernet"))


def test_a_map_that_the_source_has_no_norm_for_is_named() -> None:
    source = type(tiny_dense("upernet"))(
        head_config("upernet", backbone_config=tiny_backbone("swin", out_features=STAGES[1:]), use_auxiliary_head=False)
    )
    target = tiny_dense("upernet", large=True)
    with pytest.raises(ValueError, match="does not take the map of its stage1"):
        StitchedModel.from_path([source, target], "0[:2] 1[3:]")


def test_anchors_that_are_not_dense_alike_are_refused() -> None:
    source, target = tiny_dense_pair("upernet")
    stitched = StitchedModel.from_path([source, target], "0[:2] 1[3:]", calibration=dense_images(2))
    with pytest.raises(ValueError, match=r"whose backbone is the path 0\[:2\] 1\[3:\]"):
        StitchedModel.from_path([source, stitched], "0[:2] 1[3:]")
    with pytest.raises(ValueError, match="got head=a UperNetConfig for anchors of the kind 'dense model'"):
        StitchedModel.from_anchors(source, target, (2, 3), head=head_config("upernet"))
    with pytest.raises(ValueError, match="dense model and image classifier"):
        StitchedModel.from_path([source, four_stages("swin")], "0[:2] 1[3:]")
    with pytest.raises(ValueError, match="reversed"):
        StitchedModel.from_anchors(target, source, (3, 2))
    vit = tiny_classifier("vit").float()
    with pytest.raises(ValueError, match=r"type 'vit' for a dense head; expected one of several stages"):
        StitchedModel.from_path([vit], "0[:]", head=head_config("upernet"))
    dpt = DPTForSemanticSegmentation(
        DPTConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32,
                  patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8)
    )  # fmt: skip
    with pytest.raises(ValueError, match="dpt"):
        StitchedModel.from_path([dpt], "0[:]")


def test_what_dense_models_do_not_have_is_refused(tmp_path: Path) -> None:
    pair = tiny_dense_pair("upernet")
    with pytest.raises(ValueError, match=r"got dense models for a supernet; expected .* StitchedModel.from_path"):
        StitchedSupernet.from_anchors(pair, [(2, 3)])
    with pytest.raises(TypeError, match="got a UperNetForSemanticSegmentation; expected one of"):
        save_delta(StitchedModel.from_path(pair, "1[:]"), tmp_path)
    with pytest.raises(ValueError, match="a dense model, whose parts are not timed; leave it out"):
        StitchedModel.from_anchors(*pair, budget="20 ms", calibration=dense_images(2))
