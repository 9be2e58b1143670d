"""Calibration on few rows per feature is warned of, once per model, for the joint that has the fewest."""

import warnings

import pytest
from tiny_models import tiny_model, token_ids
from tiny_vision import SIDE, images, tiny_pair
from torch import Tensor

from klas_hf import StitchedModel


def heard(anchors: list, path: str, calibration: list[Tensor], **options: int) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        StitchedModel.from_path(anchors, path, calibration=calibration, **options)
    return [str(warning.message) for warning in seen if "calibration rows" in str(warning.message)]


@pytest.mark.parametrize(("path", "widest"), [("0[:2] 1[2:]", 0), ("0[:1] 1[1:2] 0[2:]", 1)])
def test_few_tokens_are_warned_of_once(path: str, widest: int) -> None:
    anchors = [tiny_model(large=large, seed=1) for large in (False, True)]
    width = anchors[widest].config.hidden_size
    assert heard(anchors, path, [token_ids(4 * width, 2)]) == []  # the first token of two does not count
    (message,) = heard(anchors, path, [token_ids(2 * width, 2)])
    assert f"got {2 * width} calibration rows for linear maps of {width} features, 2.0 per feature" in message


@pytest.mark.parametrize("path", ["0[:1] 1[1:]", "0[:1] 1[1:2] 1[3:]"])
def test_few_positions_of_images_are_warned_of_once(path: str) -> None:
    anchors = list(tiny_pair("vit"))
    assert heard(anchors, path, [images("vit", 64)], image_size=SIDE["vit"]) == []
    (message,) = heard(anchors, path, [images("vit", 2)], image_size=SIDE["vit"])
    fits = StitchedModel.from_path(anchors, path, calibration=[images("vit", 2)], image_size=SIDE["vit"]).config
    width = fits.joint_channels[-1][0]
    assert f"got {fits.joint_fits[-1]['rows']} calibration rows for linear maps of {width} features" in message
