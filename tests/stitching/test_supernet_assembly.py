"""Making supernets: every stitching layer is the least-squares map that it is said to be, and mistakes are told."""

import copy
import warnings
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from tiny_supernets import alone, by_hooks, stitches_of, three_vits, tiny_supernet
from tiny_vision import (
    SIDE,
    as_rows,
    blocks,
    embedding,
    images,
    outputs,
    possible,
    sample_paths,
    sized,
    tiny_classifier,
    tiny_config,
    tiny_pair,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from klas_hf import (
    Path,
    Stitch,
    StitchedModel,
    StitchedSupernet,
    StitchedSupernetConfig,
    StitchedSupernetForImageClassification,
    measure_costs,
)
from klas_hf.training.batch_norm import batch_norms

PAIRS = [("vit", "vit"), ("swin", "swin"), ("resnet", "resnet"), ("resnet", "swin"), ("dinov2", "swin")]
Models = list[PreTrainedModel] | tuple[PreTrainedModel, ...]


def sides(anchors: Models, stitch: Stitch, pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows that a stitching layer maps from and to."""
    source, target = anchors[stitch.source], anchors[stitch.target]
    is_bare = target.config.model_type not in ("vit", "dinov2")
    x = as_rows(source, outputs(source, pixels)[0][stitch.source_stop], bare=is_bare)
    y = as_rows(target, outputs(target, pixels)[0][stitch.target_start], bare=is_bare)
    return x.flatten(0, 1).numpy(), y.flatten(0, 1).numpy()


def lstsq(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Weight, bias and R²."""
    found = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
    residual = y - x @ found[:-1] - found[-1]
    return found[:-1].T, found[-1], 1 - (residual**2).sum() / ((y - y.mean(0)) ** 2).sum()


def assert_layer(layer: nn.Module, x: np.ndarray, y: np.ndarray) -> None:
    weight, bias, _ = lstsq(x, y)
    np.testing.assert_allclose(layer.projection.weight.detach().flatten(1), weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.projection.bias.detach(), bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_stitching_layers_start_at_their_least_squares_map(source: str, target: str) -> None:
    pair, side = tiny_pair(source, target), SIDE[target]
    batches = [images(target, 7, seed=0), images(target, 5, seed=1)]
    stitches = [Stitch(*stitch) for stitch in possible(*pair, batches[0])]
    supernet = StitchedSupernet.from_anchors(pair, stitches, calibration=iter(batches), image_size=side)
    assert stitches_of(supernet) == stitches and len(supernet.joints) == len(stitches)
    for number, stitch in enumerate(stitches):
        x, y = sides(pair, stitch, torch.cat(batches))
        (layer,), fit = supernet.joints_of(stitch), supernet.config.joint_fits[number]
        assert_layer(layer, x, y)
        assert fit["rows"] == len(x) and fit["ridge"] == 0
        assert fit["r2"] == pytest.approx(lstsq(x, y)[2], abs=1e-9)
    alone = StitchedModel.from_anchors(*pair, stitches[-1], calibration=batches, image_size=side)
    extracted = supernet.extract(stitches[-1])
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(extracted.state_dict()[name], tensor, rtol=1e-9, atol=1e-9, msg=name)
    assert extracted.config.joint_fits[0] == pytest.approx(alone.config.joint_fits[0])


@pytest.mark.parametrize("kind", ["vit", "swin", "resnet"])
def test_later_joints_start_as_those_of_the_path_alone(kind: str) -> None:
    pair, calibration = tiny_pair(kind), [images(kind, 12), images(kind, 9, seed=1)]
    paths = [path for path in sample_paths(pair, calibration[0]) if path.joints]
    supernet = StitchedSupernet.from_anchors(pair, paths, calibration=calibration, **sized(kind))
    for path in paths:
        model = StitchedModel.from_path(pair, path, calibration=calibration, **sized(kind))
        extracted = supernet.extract(path)
        for one, other in zip(extracted.stitching_layers(), model.stitching_layers(), strict=True):
            torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(one.bias, other.bias, rtol=1e-6, atol=1e-7)
        for one, other in zip(extracted.config.joint_fits, model.config.joint_fits, strict=True):
            assert one == pytest.approx(other)


def test_a_ridge_is_handed_on() -> None:
    pair, calibration = tiny_pair("vit"), [images("vit", 6)]
    alone = StitchedModel.from_anchors(*pair, (1, 1), calibration=calibration, ridge=0.1)
    supernet = StitchedSupernet.from_anchors(pair, [(1, 1)], calibration=calibration, ridge=0.1)
    weight = supernet.joints[0].projection.weight
    torch.testing.assert_close(weight, alone.stitching_layers()[0].weight, rtol=1e-9, atol=1e-9)
    plain = StitchedSupernet.from_anchors(pair, [(1, 1)], calibration=calibration)
    assert not torch.allclose(weight, plain.joints[0].projection.weight, rtol=1e-2)
    assert supernet.config.joint_fits[0]["ridge"] == 0.1


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_shared_layer_is_the_map_of_all_its_stitches_together(kind: str) -> None:
    pair, pixels = tiny_pair(kind), images(kind, 8)
    # The widths of ResNet's stages differ; those of (1, 1) and (2, 1) agree.
    stitches = [Stitch(1, 1), Stitch(2, 1), Stitch(2, 2), Stitch(1, 2)]
    supernet = StitchedSupernet.from_anchors(
        pair, stitches, calibration=[pixels], shared=[7, 7, 3, 7], image_size=SIDE[kind]
    )
    assert len(supernet.joints) == 2 and supernet.config.joint_of == [[0], [0], [1], [0]]
    together = [sides(pair, stitch, pixels) for stitch in (stitches[0], stitches[1], stitches[3])]
    x, y = (np.concatenate(rows) for rows in zip(*together, strict=True))
    assert_layer(supernet.joints[0], x, y)
    assert_layer(supernet.joints[1], *sides(pair, stitches[2], pixels))
    assert supernet.config.joint_fits[0]["rows"] == len(x)
    for stitch in stitches:
        assert supernet.joints_of(stitch) == [supernet.joints[int(stitch == Stitch(2, 2))]]
        expected = by_hooks(supernet, pair, stitch, pixels)
        with torch.no_grad():
            torch.testing.assert_close(supernet(pixels, path=stitch).logits, expected, rtol=1e-9, atol=1e-9)
            assert torch.equal(supernet.extract(stitch)(pixels).logits, supernet(pixels, path=stitch).logits)


def test_three_anchors_are_fitted_in_one_pass_no_further_than_needed() -> None:
    anchors, batches = three_vits(), [images("vit", 12, seed=seed) for seed in range(2)]
    seen: list[tuple[int, int]] = []
    for place, model in enumerate(anchors):
        embedding(model).register_forward_hook(lambda *_, place=place: seen.append((place, 0)))
        for number, block in enumerate(blocks(model), 1):
            block[0].register_forward_hook(lambda *_, place=place, number=number: seen.append((place, number)))
    stitches = [Stitch(1, 1), Stitch(1, 2, 0, 2), Stitch(2, 1, 1, 2)]
    supernet = StitchedSupernet.from_anchors(anchors, stitches, calibration=batches)
    run = {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)}
    assert set(seen) == run and len(seen) == 2 * len(run)
    for stitch in stitches:
        assert_layer(supernet.joints_of(stitch)[0], *sides(anchors, stitch, torch.cat(batches)))


def test_an_anchor_stitched_to_itself_skips_blocks() -> None:
    anchors, pixels = three_vits()[1:], images("vit", 12)
    skip = Stitch(1, 3, 1, 1)
    supernet = StitchedSupernet.from_anchors(anchors, [skip], calibration=[pixels])
    assert supernet.paths == (alone(1), skip.path)
    assert_layer(supernet.joints[0], *sides(anchors, skip, pixels))
    with torch.no_grad():
        expected = by_hooks(supernet, anchors, skip, pixels)
        torch.testing.assert_close(supernet(pixels, path=skip).logits, expected, rtol=1e-9, atol=1e-9)
    assert supernet.path_costs[1].macs < supernet.path_costs[0].macs


def test_without_calibration_layers_are_random_with_a_warning() -> None:
    pair = tiny_pair("vit")
    with pytest.warns(UserWarning, match="the stitching layer is random") as caught:
        supernet = StitchedSupernet.from_anchors(pair, [(1, 1), (2, 1)])
    assert [FilePath(one.filename).name for one in caught] == [FilePath(__file__).name]
    assert supernet.config.joint_fits is None and supernet.extract((1, 1)).config.joint_fits is None
    assert all(layer.projection.weight.any() for layer in supernet.joints)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StitchedSupernet.from_anchors(pair, [(1, 1)], calibration=[images("vit", 6)])


def test_anchors_are_copied_and_left_as_they_were() -> None:
    pair = tiny_pair("resnet")
    for model in pair:
        model.train()
    weights = [copy.deepcopy(model.state_dict()) for model in pair]
    supernet = StitchedSupernet.from_anchors(pair, [(1, 1)], calibration=[images("resnet", 6)], image_size=32)
    assert not supernet.training and not any(module.training for module in supernet.modules())
    for place, (model, before) in enumerate(zip(pair, weights, strict=True)):
        state = supernet.anchors[place].state_dict()
        assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
        with torch.no_grad():
            for parameter in supernet.anchors[place].parameters():
                parameter.zero_()
        assert all(module.training for module in model.modules())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert batch_norms(supernet)


def test_folders_are_loaded_and_named(tmp_path: FilePath) -> None:
    pair = [model.float() for model in tiny_pair("swin")]
    folders = [str(tmp_path / "small"), tmp_path / "large"]
    for model, folder in zip(pair, folders, strict=True):
        model.save_pretrained(folder)
    calibration = [images("swin", 6, dtype=torch.float32)]
    supernet = StitchedSupernet.from_anchors(folders, [(1, 1)], calibration=calibration)
    assert supernet.dtype == torch.float32
    assert supernet.config.anchor_names == [str(folder) for folder in folders]
    config = supernet.extract((1, 1)).config
    assert config.anchor_names == [str(folder) for folder in folders]
    for place, model in enumerate(pair):
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in supernet.anchors[place].state_dict().items())


def test_the_image_size_is_the_one_asked_for_or_the_anchors_own() -> None:
    pair, calibration = tiny_pair("resnet"), [images("resnet", 6)]
    small = StitchedSupernet.from_anchors(pair, [(1, 1)], calibration=calibration, image_size=(64, 32))
    usual = StitchedSupernet.from_anchors(pair, [(1, 1)], calibration=calibration)
    assert (small.config.image_size, usual.config.image_size) == ([64, 32], [224, 224])
    for supernet, size in ((small, (64, 32)), (usual, (224, 224))):
        assert supernet.path_costs[:2] == tuple(measure_costs(model, image_size=size) for model in pair)
        assert supernet.extract((1, 1)).config.image_size == list(size)
    mixed = StitchedSupernet.from_anchors(tiny_pair("dinov2", "vit"), [(1, 1)], calibration=[images("vit", 6)])
    assert mixed.config.image_size == [32, 32]


def test_a_configuration_has_defaults() -> None:
    config = StitchedSupernetConfig(
        anchor_configs=[tiny_config("resnet"), tiny_config("swin").to_dict()],
        paths=["0[:1] 1[1:]", "0[:2] 1[1:2] 1[3:]"],
    )
    assert config.image_size == [32, 32] and config.joint_of == [[0], [1, 2]]  # the last anchor's; nothing is shared
    assert StitchedSupernetForImageClassification(config).paths == (alone(0), alone(1), *map(Path.of, config.paths))


def test_any_form_of_stitches_will_do() -> None:
    pair = tiny_pair("vit")
    given = [(1, 1), (2, 1, 0, 1), Stitch(2, 2), "0[:1] 1[2:]", Path.parse("1[:1] 1[2:]")]
    assert tiny_supernet(pair, iter(given)).paths == (alone(0), alone(1), *map(Path.of, given))


VIT, SWIN = tiny_pair("vit"), tiny_pair("swin")
TWO = [Stitch(1, 1), Stitch(2, 1)]
MISTAKES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "one anchor": (VIT[:1], TWO, {}, "for 1 anchors; expected positions from 0 to 0"),
    "an anchor twice": ([VIT[0], copy.deepcopy(VIT[0])], TWO, {}, "twice .*expected different anchors"),
    "other classes": ([tiny_classifier("vit", num_labels=7), VIT[1]], TWO, {}, "got anchors of 7 and 5 classes"),
    "no stitch": (VIT, [], {}, "got no paths; expected at least one"),
    "a stitch twice": (VIT, [*TWO, (1, 1)], {}, r"got path 0\[:1\] 1\[1:\] more than once"),
    "too far in the source": (VIT, [(3, 1)], {}, r"out of range: 0\[:3\] of an anchor of 2 blocks"),
    "too far in the target": (VIT, [(1, 4)], {}, r"out of range: 1\[4:\] of an anchor of 3 blocks"),
    "no such anchor": (VIT, [(1, 1, 0, 2)], {}, "for 2 anchors; expected positions from 0 to 1"),
    "no such source": (VIT, [(1, 1, -1, 1)], {}, "expected positions of 0 or more"),
    "other grids": (SWIN, [(1, 3)], {}, "joints are possible between equal grids only"),
    "reversed": (VIT[::-1], TWO, {}, "reversed; expected the cheaper anchor as the source"),
    "reversed positions": (VIT, [(1, 1, 1, 0)], {}, "reversed; expected the cheaper anchor as the source"),
    "class tokens": ([SWIN[0], VIT[1]], [(1, 1)], {}, "got a source with 0 class tokens and a target with 1"),
    "other sizes": ([VIT[0], tiny_classifier("vit", large=True, image_size=64)], TWO, {}, "anchors for one image size"),
    "another size": (VIT, TWO, {"image_size": 64}, "anchors for one image size"),
    "shared of wrong length": (VIT, TWO, {"shared": [0]}, "got 1 numbers in shared for 2 paths"),
    "shared between widths": (SWIN, [(1, 1), (2, 3)], {"shared": [0, 0]}, "sharing a layer with paths between"),
    "no calibration images": (VIT, TWO, {"calibration": []}, "got no calibration images; expected some"),
    "calibration of another size": (
        VIT, TWO, {"calibration": [torch.zeros(1, 3, 64, 64)]}, r"got images of \(64, 64\) pixels",
    ),
    "calibration of other channels": (VIT, TWO, {"calibration": [torch.zeros(1, 1, 32, 32)]}, "expected .batch, 3"),
    "NaN": (VIT, TWO, {"calibration": [torch.full((8, 3, 32, 32), torch.nan)]}, "got NaN or infinite features"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(mistake: str) -> None:
    anchors, stitches, options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        StitchedSupernet.from_anchors(anchors, stitches, **options)


@torch.no_grad()
@pytest.mark.parametrize("path", ["1[:1] 0[1:]", Path.parse("1[:2] 0[1:]")])
def test_a_path_may_lead_from_the_dearer_anchor_to_the_cheaper(path: Any) -> None:
    """As those that `search_paths` finds do; what is refused is a `Stitch` that way."""
    supernet, pixels = tiny_supernet(VIT, [path, "0[:1] 1[2:]"]), images("vit")
    got = supernet(pixels, path=path).logits
    torch.testing.assert_close(got, by_hooks(supernet, VIT, Path.of(path), pixels), rtol=1e-9, atol=1e-9)


def test_mistakes_among_three_anchors_are_told() -> None:
    anchors = three_vits()
    stitches = [Stitch(1, 1), Stitch(1, 1, 1, 2)]
    with pytest.raises(ValueError, match="sharing a layer with paths between other anchors or widths"):
        StitchedSupernet.from_anchors(anchors, stitches, shared=[0, 0])
    deeper = tiny_classifier("vit", large=True, num_hidden_layers=5)  # as wide as the one in the middle
    with pytest.raises(ValueError, match="sharing a layer with paths between other anchors or widths"):
        StitchedSupernet.from_anchors([*anchors[:2], deeper], [Stitch(1, 1), Stitch(1, 1, 0, 2)], shared=[0, 0])
    with pytest.raises(ValueError, match="reversed"):
        StitchedSupernet.from_anchors(anchors, [*stitches, Stitch(1, 1, 2, 0)])
    with pytest.raises(ValueError, match=r"got path 1\[:4\] 2\[1:\], out of range"):
        StitchedSupernet.from_anchors(anchors, [Stitch(1, 1), Stitch(4, 1, 1, 2)])
    sizeless = [tiny_classifier("resnet"), tiny_classifier("resnet", large=True), tiny_classifier("swin", large=True)]
    mixed = [Stitch(1, 1), Stitch(2, 1, 0, 2)]
    assert tiny_supernet(sizeless, mixed).config.image_size == [32, 32]  # the dearest's
    assert tiny_supernet(sizeless, mixed, image_size=64).config.image_size == [64, 64]


def test_a_bad_form_of_stitch_is_refused() -> None:
    with pytest.raises(ValueError, match="expected slices of anchors by position"):
        StitchedSupernet.from_anchors(VIT, ["12a"])
    for stitch in ((1,), (1, 1, 1), 3):
        with pytest.raises(TypeError, match=r"expected Stitch\(i, j\) or a pair"):
            StitchedSupernet.from_anchors(VIT, [stitch])
