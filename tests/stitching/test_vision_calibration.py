"""How the stitching layer of two classifiers starts: least squares between their hidden states."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vision import (
    PREFIX,
    as_rows,
    blocks,
    images,
    logits,
    outputs,
    sized,
    tiny_classifier,
    tiny_pair,
)
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from klas_hf import Stitch, StitchedModel

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


def test_calibration_from_folders_equals_calibration_from_models(tmp_path: Path) -> None:
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
