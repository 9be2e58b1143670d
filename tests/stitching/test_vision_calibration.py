"""How the stitching layer of two classifiers starts: least squares between their hidden states."""

import copy
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from tiny_vision import (
    PREFIX,
    as_rows,
    blocks,
    images,
    logits,
    maps_of,
    outputs,
    path_outputs,
    sized,
    tiny_classifier,
    tiny_pair,
)
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from klas_hf import Stitch, StitchedModel
from klas_hf.paths import Path

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")


def hidden_rows(source: PreTrainedModel, target: PreTrainedModel, stitch: tuple[int, int], pixels: Tensor) -> Any:
    """`(rows, width)` of both sides, one row per position and image, by hooks on the whole anchors."""
    bare = target.config.model_type not in PREFIX
    x, y = outputs(source, pixels)[0][stitch[0]], outputs(target, pixels)[0][stitch[1]]
    return (as_rows(source, x, bare=bare).flatten(0, 1).numpy(), as_rows(target, y, bare=False).flatten(0, 1).numpy())


@pytest.mark.parametrize(
    ("source_kind", "target_kind", "stitch"),
    [
        ("vit", "vit", (1, 1)),
        ("deit_teacher", "deit", (2, 0)),
        ("swin", "swin", (2, 3)),
        ("levit", "levit", (2, 3)),
        ("resnet", "resnet", (2, 0)),
        ("resnet", "swin", (2, 1)),
        ("swin", "resnet", (3, 3)),
        ("dinov2", "swin", (1, 3)),
        ("mobilenet_v1", "mobilenet_v1", (5, 4)),
    ],
)
def test_calibration_is_least_squares_between_the_hidden_states_of_the_whole_anchors(
    source_kind: str, target_kind: str, stitch: tuple[int, int]
) -> None:
    source, target = tiny_pair(source_kind, target_kind)
    batches = [images(source_kind, count, seed=count) for count in (5, 9, 16)]
    x, y = hidden_rows(source, target, stitch, torch.cat(batches))
    design = np.column_stack([x, np.ones(len(x))])
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    r2 = 1 - ((y - design @ solution) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()

    data = iter([batches[0], {"pixel_values": batches[1], "labels": torch.zeros(9, dtype=torch.long)}, batches[2]])
    model = StitchedModel.from_anchors(source, target, Stitch(*stitch), calibration=data, **sized(target_kind))
    layer = model.stitching_layers()[0]
    np.testing.assert_allclose(layer.weight.detach().flatten(1), solution[:-1].T, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(layer.bias.detach(), solution[-1], rtol=1e-6, atol=1e-6)
    assert model.config.joint_fits[0] == {"r2": pytest.approx(r2, abs=1e-8), "ridge": 0.0, "rows": len(x)}
    assert 0 < r2 < 1


@pytest.mark.parametrize("kind", ["vit", "swin", "resnet"])
def test_calibrated_self_stitch_is_the_anchor(kind: str) -> None:
    anchor = tiny_classifier(kind, large=True)
    for depth in (1, 3):
        if depth == len(blocks(anchor)):
            continue
        model = StitchedModel.from_anchors(
            anchor, anchor, (depth, depth), calibration=[images(kind, 24)], **sized(kind)
        )
        weight = model.stitching_layers()[0].weight.detach().flatten(1)
        if kind != "resnet":  # whose units may be 0 everywhere, behind their ReLU
            torch.testing.assert_close(weight, torch.eye(len(weight)).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(logits(model, images(kind)), logits(anchor, images(kind)), rtol=1e-6, atol=1e-6)
        assert model.config.joint_fits[0]["r2"] == pytest.approx(1.0)


def test_calibration_from_folders_equals_calibration_from_models(tmp_path: FilePath) -> None:
    source, target = tiny_pair("levit")
    source.save_pretrained(tmp_path / "source")
    target.save_pretrained(tmp_path / "target")
    one, other = (
        StitchedModel.from_anchors(*pair, (2, 3), calibration=[images("levit", 16)])
        for pair in ((source, target), (tmp_path / "source", tmp_path / "target"))
    )
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)


def test_anchors_in_train_mode_are_calibrated_in_eval_mode_and_left_as_they_were() -> None:
    source, target = tiny_pair("swin", hidden_dropout_prob=0.5, drop_path_rate=0.5)
    expected = StitchedModel.from_anchors(source, target, (2, 3), calibration=[images("swin", 16)])
    source.train()
    target.train()
    blocks(target)[1][0].eval()
    before = [module.training for anchor in (source, target) for module in anchor.modules()]
    model = StitchedModel.from_anchors(source, target, (2, 3), calibration=[images("swin", 16)])
    assert [module.training for anchor in (source, target) for module in anchor.modules()] == before
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model.stitching_layers()[0].weight, expected.stitching_layers()[0].weight)


def test_batch_statistics_of_anchors_in_train_mode_stay() -> None:
    source, target = tiny_pair("resnet")
    before = copy.deepcopy(source.state_dict())
    source.train()
    StitchedModel.from_anchors(source, target, (2, 2), calibration=[images("resnet", 16)], image_size=32)
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())


def test_a_ridge_asked_for_is_used_and_recorded() -> None:
    source, target = tiny_pair("vit")
    plain, ridged = (
        StitchedModel.from_anchors(source, target, (1, 1), calibration=[images("vit", 16)], ridge=ridge)
        for ridge in (None, 0.5)
    )
    assert ridged.config.joint_fits[0]["ridge"] == 0.5
    assert ridged.config.joint_fits[0]["r2"] < plain.config.joint_fits[0]["r2"]
    assert ridged.stitching_layers()[0].weight.norm() < plain.stitching_layers()[0].weight.norm()


def test_without_calibration_the_layer_is_random_and_says_so() -> None:
    source, target = tiny_pair("vit")
    with pytest.warns(UserWarning, match="random.*calibration=") as caught:
        models = [StitchedModel.from_anchors(source, target, (1, 1)) for _ in range(2)]
    assert caught[0].filename == __file__
    weights = [model.stitching_layers()[0].weight for model in models]
    assert not torch.equal(*weights)
    assert models[0].config.joint_fits is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StitchedModel.from_anchors(source, target, (1, 1), calibration=[images("vit", 16)])


@pytest.mark.parametrize(
    ("kinds", "path"),
    [
        (("vit", "vit"), "0[:1] 1[1:2] 1[3:]"),  # the last joint feeds the head
        (("deit", "deit_teacher"), "1[:1] 0[:1] 1[1:]"),
        (("swin", "swin"), "1[:1] 0[1:3] 1[3:]"),
        (("resnet", "swin"), "0[:1] 1[1:3] 0[3:]"),
        (("levit", "levit"), "0[:2] 1[3:4] 0[2:]"),
    ],
)
def test_every_joint_is_fitted_on_what_the_path_before_it_gives(kinds: tuple[str, str], path: str) -> None:
    """To what the next slice's anchor has there, in order; data that can be read only once will do."""
    anchors, way = tiny_pair(*kinds), Path.parse(path)
    pixels = images(kinds[0], 40)
    model = StitchedModel.from_path(
        anchors, path, calibration=iter([pixels[:15], pixels[15:]]), image_size=pixels.shape[-1]
    )
    bounds = way.bounds([len(blocks(anchor)) for anchor in anchors])
    assert len(model.config.joint_fits) == way.joints == 2
    for number, fitted in enumerate(model.config.joint_fits):
        left, (right, start, _) = bounds[number][0], bounds[number + 1]
        # the joints before are the model's own: an error in one would not show in the next
        x = path_outputs(anchors, way, maps_of(model)[:number], pixels)[0][number]
        y = outputs(anchors[right], pixels)[0][start]
        bare = anchors[right].config.model_type not in PREFIX
        x = as_rows(anchors[left], x, bare=bare).flatten(0, 1).numpy()
        y = as_rows(anchors[right], y, bare=False).flatten(0, 1).numpy()
        design = np.column_stack([x, np.ones(len(x))])
        solution, *_ = np.linalg.lstsq(design, y, rcond=None)
        r2 = 1 - ((y - design @ solution) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        layer = model.stitching_layers()[number]
        assert fitted == {"r2": pytest.approx(r2, abs=1e-6), "ridge": pytest.approx(0, abs=1e-5), "rows": len(x)}
        found = design[:, :-1] @ layer.weight.detach().flatten(1).T.numpy() + layer.bias.detach().numpy()
        np.testing.assert_allclose(found, design @ solution, rtol=1e-4, atol=1e-4)


def test_a_path_without_joints_needs_no_calibration() -> None:
    anchors = tiny_pair("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = StitchedModel.from_path(anchors, "1[:]")
    assert torch.equal(logits(model, images("vit")), logits(anchors[1], images("vit")))


# ---- a model in parts


@pytest.mark.parametrize(
    "placed",
    [
        {"joints": "disk"},
        {"joints.0.projection": "disk"},
        {"slices.0": "disk"},
        {"slices.1": "disk", "joints.1": "disk"},
        pytest.param(
            {"slices": "disk", "joints": "disk"},
            marks=pytest.mark.skipif(
                Version(version("accelerate")) < Version("1.15"), reason="accelerate refuses a model wholly on the disk"
            ),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_offloaded_parts_are_fitted_and_run(kind: str, placed: dict[str, str], tmp_path: FilePath) -> None:
    anchors = tiny_pair(kind)
    anchors[0].save_pretrained(tmp_path / "0")
    anchors[1].save_pretrained(tmp_path / "1")
    folders, path = [tmp_path / "0", tmp_path / "1"], "1[:1] 0[1:2] 1[3:]" if kind == "vit" else "1[:1] 0[1:2] 1[2:]"
    options = {"calibration": [images(kind, 40)], **sized(kind)}
    whole = StitchedModel.from_path(folders, path, **options)
    device_map = {name: "cpu" for name in whole.state_dict() if not name.startswith(tuple(placed))} | placed
    split = StitchedModel.from_path(
        folders, path, device_map=device_map, offload_folder=str(tmp_path / "offload"), **options
    )
    assert any(parameter.is_meta for parameter in split.parameters())
    assert split.config.joint_fits == [
        {name: pytest.approx(value) for name, value in fit.items()} for fit in whole.config.joint_fits
    ]
    torch.testing.assert_close(logits(split, images(kind)), logits(whole, images(kind)), rtol=1e-9, atol=1e-9)


def no_images() -> list[Tensor]:
    return [torch.zeros(0, 3, 32, 32)] * 3


@pytest.mark.usefixtures("no_vision_loading")
@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (list, ValueError, "no calibration images.*iterator was not used up"),
        (no_images, ValueError, "no calibration images"),
        (lambda: ["image"], TypeError, "batch of type str.*'pixel_values'"),
        (lambda: [{"pixels": torch.zeros(1, 3, 32, 32)}], ValueError, r"fields \['pixels'\].*'pixel_values'"),
        (lambda: [torch.zeros(3, 32, 32)], ValueError, r"shape \(3, 32, 32\).*\(batch, channels, height, width\)"),
        (
            lambda: [torch.zeros(2, 1, 32, 32)],
            ValueError,
            r"shape \(2, 1, 32, 32\); expected \(batch, 3, height, width\)",
        ),
        (lambda: [torch.zeros(2, 3, 40, 40)], ValueError, r"\(40, 40\) pixels for a vit of \(32, 32\)"),
        (lambda: [*no_images(), torch.zeros(2, 3, 40, 40)], ValueError, r"\(40, 40\) pixels for a vit"),
    ],
)
def test_calibration_without_usable_images(
    calibration: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        StitchedModel.from_anchors(*tiny_pair("vit"), (1, 1), calibration=calibration())


def test_calibration_skips_nothing_but_empty_batches() -> None:
    batches = [torch.zeros(0, 3, 32, 32), images("vit", 7), torch.zeros(0, 3, 32, 32), images("vit", 9)]
    model = StitchedModel.from_anchors(*tiny_pair("vit"), (1, 1), calibration=batches)
    assert model.config.joint_fits[0]["rows"] == 16 * 17


@pytest.mark.parametrize("what", ["source", "target", "images"])
def test_nan_stops_the_calibration(what: str) -> None:
    source, target = tiny_pair("vit")
    pixels = images("vit", 16)
    with torch.no_grad():
        if what == "images":
            pixels[3, 0, 0, 0] = torch.nan
        else:
            next(blocks({"source": source, "target": target}[what])[0][0].parameters())[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite hidden states.*check their weights"):
        StitchedModel.from_anchors(source, target, (1, 1), calibration=[pixels])
