"""Costs of image classifiers against published figures, counts by hooks, and the models themselves."""

from itertools import pairwise

import numpy as np
import pytest
import quick_cases
import torch
from quick_cases import quick
from tiny_vision import (
    KINDS,
    PREFIX,
    SIDE,
    blocks,
    embedding,
    images,
    outputs,
    possible,
    sample_paths,
    tiny_classifier,
    tiny_config,
    tiny_pair,
    tiny_path,
    tiny_stitched,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BeitConfig,
    LevitConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.models.levit.modeling_levit import LevitAttention, LevitAttentionSubsample

from klas_hf import Stitch, measure_costs, measure_stitch_costs
from klas_hf.costs.vision import anchor_costs
from klas_hf.models import vision_shapes
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.paths import Path
from klas_hf.stitching.images import stitched_vision_config


def levit(widths: list[int], heads: list[int]) -> LevitConfig:
    return LevitConfig(hidden_sizes=widths, num_attention_heads=heads, depths=[4, 4, 4], key_dim=[32, 32, 32])


def vit(width: int, heads: int) -> ViTConfig:
    return ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)


# (configuration, 10⁹ MACs): "FLOPs" in the papers of SN-Net and of the families
PUBLISHED: dict[str, tuple[PreTrainedConfig, float]] = {
    "DeiT-Ti": (vit(192, 3), 1.258),
    "DeiT-S": (vit(384, 6), 4.608),
    "DeiT-B": (vit(768, 12), 17.58),
    "Swin-Ti": (SwinConfig(), 4.51),
    "Swin-S": (SwinConfig(depths=[2, 2, 18, 2]), 8.77),
    "Swin-B": (SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]), 15.47),
    "ResNet-18": (ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"), 1.82),
    "ResNet-50": (ResNetConfig(), 4.11),
    "LeViT-192": (levit([192, 288, 384], [3, 5, 6]), 0.66),
    "LeViT-256": (levit([256, 384, 512], [4, 6, 8]), 1.13),
}
# Parameters in 10⁶, as the papers print them
PARAMETERS = {"DeiT-Ti": 5.7, "DeiT-S": 22.1, "DeiT-B": 86.6, "Swin-Ti": 28.3, "ResNet-18": 11.7, "ResNet-50": 25.6}


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_are_the_published_ones(name: str) -> None:
    config, macs = PUBLISHED[name]
    config.num_labels = 1000
    cost = measure_costs(config)
    assert cost.macs == pytest.approx(macs * 1e9, rel=0.01)
    assert (cost.image_height, cost.image_width, cost.tokens, cost.kv_bytes_per_token) == (224, 224, 0, 0)
    if name in PARAMETERS:
        assert cost.parameters == pytest.approx(PARAMETERS[name] * 1e6, rel=0.01)


def test_stitches_between_published_anchors_stay_within_a_stage() -> None:
    """A stage of m and n blocks has m · n of them, the first also those to the embedding, the last none to its end."""
    costs = measure_stitch_costs(*(PUBLISHED[name][0] for name in ("Swin-Ti", "Swin-B")))
    assert costs.possible.sum() == 2 * 3 + 2 * 2 + 6 * 18 + 2 * 1
    costs.check_direction()


# ---- counting by hand


@torch.no_grad()
def macs_by_hooks(model: PreTrainedModel, pixels: Tensor) -> dict[nn.Module, int]:
    """Multiply-accumulates of every linear layer, convolution and attention in a forward on one image."""
    counts: dict[nn.Module, int] = {}

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            per_output = module.in_features
        else:
            height, width = module.kernel_size
            per_output = module.in_channels // module.groups * height * width
        counts[module] = counts.get(module, 0) + output.numel() * per_output

    handles = [
        module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    hidden, _ = outputs(model, pixels)
    for handle in handles:
        handle.remove()
    for block, before, after in zip(blocks(model), hidden, hidden[1:], strict=False):
        for module in block:
            counts[module] = counts.get(module, 0) + attention_macs(model, module, before, after)
    return counts


def attention_macs(model: PreTrainedModel, module: nn.Module, before: Tensor, after: Tensor) -> int:
    """Queries times keys and weights times values."""
    kind = model.config.model_type
    if kind in ("vit", "deit", "dinov2"):
        tokens, width = after.shape[1:]
        return 2 * tokens * tokens * width
    if kind in ("swin", "swinv2") and not hasattr(module, "reduction"):  # not the merging of patches
        tokens, width = after.shape[1:]
        return 2 * tokens * model.config.window_size**2 * width
    inner = getattr(module, "module", module)
    if isinstance(inner, LevitAttention | LevitAttentionSubsample):
        queries = after.shape[1]
        keys = before.shape[1] if isinstance(inner, LevitAttentionSubsample) else queries
        return queries * keys * inner.num_attention_heads * inner.key_dim * (1 + inner.attention_ratio)
    return 0


def size(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def counted(model: PreTrainedModel, counts: dict[nn.Module, int], modules: list[nn.Module]) -> int:
    return sum(counts.get(inner, 0) for module in modules for inner in module.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [False, True])
def test_macs_and_parameters_are_those_of_the_layers(kind: str, large: bool) -> None:
    model = tiny_classifier(kind, large=large)
    cost = measure_costs(model, image_size=SIDE[kind])
    assert cost.macs == sum(macs_by_hooks(model, images(kind, 1)).values())
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert measure_costs(model.config, image_size=SIDE[kind]) == cost


@pytest.mark.parametrize("name", ["Swin-Ti", "ResNet-50", "LeViT-192"])
def test_blocks_that_are_alike_are_counted_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And cost what torch counts in a forward of the whole."""
    runs: list[str] = []
    config = PUBLISHED[name][0]
    kind = type(vision_kind(config))
    run = kind.run_module
    monkeypatch.setattr(kind, "run_module", lambda self, *given: runs.append(given[1]) or run(self, *given))
    vision_shapes._traced.cache_clear()
    macs = sum(vision_shapes.traced(config).macs)
    ran = len(runs)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        vision_shapes.classifier(config).eval()(torch.zeros(1, 3, 224, 224))
    assert macs == counter.get_total_flops() // 2
    assert 0 < ran < len(set(name for block in vision_kind(config).blocks(config) for name in block.modules))


@pytest.mark.parametrize("kind", KINDS)
def test_costs_of_every_block_and_stitch_are_those_of_the_layers(kind: str) -> None:
    source, target = tiny_pair(kind)
    costs = measure_stitch_costs(source, target, image_size=SIDE[kind])
    counts = [macs_by_hooks(model, images(kind, 1)) for model in (source, target)]
    of_blocks = [
        [counted(model, count, block) for block in blocks(model)]
        for model, count in zip((source, target), counts, strict=True)
    ]
    assert costs.source_blocks.tolist() == of_blocks[0]
    assert costs.target_blocks.tolist() == of_blocks[1]
    embedded = counted(source, counts[0], [embedding(source)])
    head = sum(counts[1].values()) - sum(of_blocks[1]) - counted(target, counts[1], [embedding(target)])
    hidden = outputs(source, images(kind, 1))[0], outputs(target, images(kind, 1))[0]
    held = [[size(block) for block in blocks(model)] for model in (source, target)]
    assert costs.source_parameters.tolist() == held[0]
    assert costs.target_parameters.tolist() == held[1]
    ends = size([embedding(source)]) + size([target]) - sum(held[1]) - size([embedding(target)])
    for i, j in possible(source, target, images(kind)):
        x, y = hidden[0][i], hidden[1][j]
        positions = y[0, 0].numel() if y.ndim == 4 else y.shape[1]
        widths = [one.shape[1 if one.ndim == 4 else -1] for one in (x, y)]
        stitch = positions * widths[0] * widths[1]
        layer = (widths[0] + 1) * widths[1]
        assert costs.parameters[i - 1, j] == ends + sum(held[0][:i]) + layer + sum(held[1][j:])
        assert costs.macs[i - 1, j] == embedded + sum(of_blocks[0][:i]) + stitch + sum(of_blocks[1][j:]) + head


# ---- stitched models


@pytest.mark.parametrize("kind", quick(KINDS, quick_cases.KINDS))
def test_costs_of_stitches_are_those_of_the_models_they_make(kind: str) -> None:
    source, target = tiny_pair(kind)
    side = (SIDE[kind], SIDE[kind])
    costs = measure_stitch_costs(source, target, image_size=SIDE[kind])
    every = possible(source, target, images(kind))
    for stitch in every[:: len(every) // 2]:  # every one is counted by hand above
        config = stitched_vision_config([source.config, target.config], Stitch(*stitch).path, side)
        cost = measure_costs(config)
        assert (cost.macs, cost.parameters) == costs.of(Stitch(*stitch))
        assert (cost.image_height, cost.image_width) == side
    model = tiny_stitched(source, target, every[-1])
    assert costs.of(Stitch(*every[-1])) == (measure_costs(model).macs, model.num_parameters())
    assert costs.source_total == measure_costs(source, image_size=side).macs
    assert costs.target_total == measure_costs(target, image_size=side).macs


@pytest.mark.parametrize(
    ("source_kind", "target_kind"),
    [("resnet", "swin"), ("swin", "resnet"), ("deit", "swin"), ("vit", "dinov2"), ("mobilenet_v1", "convnext")],
)
def test_costs_of_stitches_across_kinds_are_those_of_the_models(source_kind: str, target_kind: str) -> None:
    source, target = tiny_pair(source_kind, target_kind)
    costs = measure_stitch_costs(source, target, image_size=32)
    for stitch in possible(source, target, images("swin"))[::3]:
        model = tiny_stitched(source, target, stitch)
        assert costs.of(Stitch(*stitch)) == (measure_costs(model).macs, model.num_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_stitches_are_possible_between_equal_grids(kind: str) -> None:
    source, target = tiny_pair(kind)
    costs = measure_stitch_costs(source, target, image_size=SIDE[kind])
    expected = np.zeros((len(blocks(source)), len(blocks(target))), dtype=bool)
    for i, j in possible(source, target, images(kind)):
        expected[i - 1, j] = True
    assert np.array_equal(costs.possible, expected)
    assert costs.source_stages.tolist() == sorted(costs.source_stages.tolist())
    assert len(costs.source_stages) == len(blocks(source))
    assert len(costs.target_stages) == len(blocks(target))
    assert (costs.image_height, costs.image_width, costs.tokens) == (SIDE[kind], SIDE[kind], 0)


def test_stages_are_those_of_the_blocks() -> None:
    costs = measure_stitch_costs(*tiny_pair("levit"))
    assert costs.source_stages.tolist() == [0, 1, 1, 2]
    assert costs.target_stages.tolist() == [0, 0, 1, 1, 2, 2]


# ---- options


def test_the_image_size_can_be_chosen() -> None:
    source, target = tiny_pair("resnet", "convnext")
    small, wide = (measure_stitch_costs(source, target, image_size=size) for size in (32, (32, 64)))
    assert (wide.image_height, wide.image_width) == (32, 64)
    assert np.array_equal(wide.source_blocks, 2 * small.source_blocks)
    assert np.array_equal(wide.stitch, 2 * small.stitch)
    assert np.array_equal(wide.parameters, small.parameters)
    one, four = (measure_costs(source, image_size=size) for size in ((32, 32), 64))
    head = 5 * 16
    assert four.macs - head == 4 * (one.macs - head)
    assert (four.image_height, four.image_width) == (64, 64)
    assert measure_costs(source).image_height == 224  # ResNet's configuration has no image size
    assert measure_costs(target).image_height == 32
    assert measure_stitch_costs(source, target).image_height == 32  # the target's


def test_positions_among_several_anchors_are_kept() -> None:
    costs = measure_stitch_costs(*tiny_pair("vit"), positions=(2, 5))
    assert (costs.source, costs.target) == (2, 5)
    default = measure_stitch_costs(*tiny_pair("vit"))
    assert (default.source, default.target) == (0, 1)


@pytest.mark.parametrize("kind", ["vit", "swin", "levit", "resnet", "convnext"])
def test_costs_do_not_depend_on_the_dtype(kind: str) -> None:
    source, target = (tiny_config(kind, large=large) for large in (False, True))
    half = tiny_config(kind, dtype="bfloat16"), tiny_config(kind, large=True, dtype="float16")
    size = SIDE[kind]
    assert measure_costs(half[0], image_size=size) == measure_costs(source, image_size=size)
    one, other = measure_stitch_costs(source, target, image_size=size), measure_stitch_costs(*half, image_size=size)
    assert np.array_equal(one.macs, other.macs)
    assert np.array_equal(one.parameters, other.parameters)


def test_nothing_is_allocated() -> None:
    """A model of some 8 TB on images of 65,536 pixels a side."""
    config = ViTConfig(
        hidden_size=2**17,
        intermediate_size=2**19,
        num_hidden_layers=10,
        num_attention_heads=2**10,
        image_size=2**16,
        patch_size=2**10,
        num_labels=2,
    )
    cost = measure_costs(config)
    tokens, width = 64 * 64 + 1, 2**17
    block = tokens * width * (4 * width + 2 * 2**19) + 2 * tokens * tokens * width
    assert cost.macs == 64 * 64 * 3 * 2**20 * width + 10 * block + 2 * width
    assert cost.parameters > 2 * 10**12


def test_configurations_and_models_are_left_as_they_were() -> None:
    source, target = tiny_pair("levit")
    before = [model.config.to_dict() for model in (source, target)]
    measure_stitch_costs(source, target)
    measure_costs(source.config)
    assert [model.config.to_dict() for model in (source, target)] == before
    assert {tensor.device.type for tensor in (*source.parameters(), *target.parameters())} == {"cpu"}


def test_any_classifier_of_transformers_is_counted_but_only_known_kinds_are_stitched() -> None:
    beit = BeitConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    width, tokens = 16, 17
    block = tokens * width * (4 * width + 2 * 32) + 2 * tokens * tokens * width
    assert measure_costs(beit).macs == 16 * 3 * 64 * width + 2 * block + 2 * width
    with pytest.raises(ValueError, match="unknown type 'beit'; expected one of .*'vit'"):
        measure_stitch_costs(beit, tiny_config("vit", large=True))


# ---- bad input


def test_anchors_that_cannot_be_stitched() -> None:
    with pytest.raises(ValueError, match="source with 1 class tokens and a target with 2"):
        measure_stitch_costs(tiny_config("vit"), tiny_config("deit", large=True))
    with pytest.raises(ValueError, match=r"\(32, 32\) pixels for a vit of \(16, 16\)"):
        measure_stitch_costs(tiny_config("vit", image_size=16), tiny_config("vit", large=True))
    with pytest.raises(ValueError, match=r"\(48, 48\) pixels for a levit of \(64, 64\)"):
        measure_stitch_costs(tiny_config("levit"), tiny_config("levit", large=True), image_size=48)


def test_an_image_classifier_and_a_language_model() -> None:
    for pair in ((tiny_config("vit"), LlamaConfig()), (LlamaConfig(), tiny_config("vit"))):
        with pytest.raises(ValueError, match="an image classifier.*expected two anchors of one kind"):
            measure_stitch_costs(*pair)


def test_class_tokens_are_stitched_where_both_have_them() -> None:
    for kinds in (("vit", "vit"), ("vit", "dinov2"), ("dinov2", "swin")):
        source, target = tiny_pair(*kinds)
        costs = measure_stitch_costs(source, target, image_size=32)
        i, j = possible(source, target, images("vit"))[0]
        widths = 16 * (24 if kinds[1] == "swin" else 24)
        assert costs.stitch[i - 1, j] == (16 + PREFIX.get(kinds[1], 0)) * widths


# ---- paths


def counted_path(anchors: list[PreTrainedModel], path: Path, pixels: Tensor) -> tuple[int, int]:
    """MACs and parameters of a path, from what hooks count in the whole anchors."""
    counts = [macs_by_hooks(anchor, pixels) for anchor in anchors]
    hidden = [outputs(anchor, pixels)[0] for anchor in anchors]
    bounds = path.bounds([len(blocks(anchor)) for anchor in anchors])
    first, last = anchors[bounds[0][0]], anchors[bounds[-1][0]]
    tails = [module for block in blocks(last) for module in block] + [embedding(last)]
    macs = counted(first, counts[bounds[0][0]], [embedding(first)])
    macs += sum(counts[bounds[-1][0]].values()) - counted(last, counts[bounds[-1][0]], tails)
    parameters = size([embedding(first)]) + size([last]) - size(tails)
    for place, start, stop in bounds:
        used = [module for block in blocks(anchors[place])[start:stop] for module in block]
        macs, parameters = macs + counted(anchors[place], counts[place], used), parameters + size(used)
    for (left, _, stop), (right, start, _) in pairwise(bounds):
        x, y = hidden[left][stop], hidden[right][start]
        positions = y[0, 0].numel() if y.ndim == 4 else y.shape[1]
        widths = [one.shape[1 if one.ndim == 4 else -1] for one in (x, y)]
        macs, parameters = macs + positions * widths[0] * widths[1], parameters + (widths[0] + 1) * widths[1]
    return macs, parameters


@pytest.mark.parametrize("kind", quick(KINDS, ["vit", "swin", "resnet"]))
def test_costs_of_paths_are_those_of_their_parts_and_of_the_models(kind: str) -> None:
    anchors = list(tiny_pair(kind))
    for path in sample_paths(anchors, images(kind)):
        expected = counted_path(anchors, path, images(kind, 1))
        model = tiny_path(anchors, path, image_size=SIDE[kind])
        cost = measure_costs(model)
        assert (cost.macs, cost.parameters) == expected == (cost.macs, model.num_parameters())
        assert measure_costs(model.config) == cost


@pytest.mark.parametrize("kind", KINDS)
def test_costs_of_an_anchors_parts_are_those_of_its_layers(kind: str) -> None:
    model = tiny_classifier(kind, large=True)
    found = anchor_costs(model.config, (SIDE[kind], SIDE[kind]))
    counts = macs_by_hooks(model, images(kind, 1))
    assert found.block_macs == [counted(model, counts, block) for block in blocks(model)]
    assert found.block_parameters == [size(block) for block in blocks(model)]
    assert found.embed_macs == counted(model, counts, [embedding(model)])
    assert found.embed_parameters == size([embedding(model)])
    assert found.total_macs == sum(counts.values())
    assert found.embed_parameters + sum(found.block_parameters) + found.head_parameters == model.num_parameters()
    hidden = outputs(model, images(kind, 1))[0]
    assert found.widths == [one.shape[1 if one.ndim == 4 else -1] for one in hidden]
    assert found.positions == [one[0, 0].numel() if one.ndim == 4 else one.shape[1] for one in hidden]
