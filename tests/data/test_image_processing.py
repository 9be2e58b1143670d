"""Processing: the anchors' own processors are the reference, for every family's rules of resizing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from klas_hf.data.image_processing import Processing, common_processing, normalisation
from klas_hf.training.augmentation import normalise

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# As the families' checkpoints on the Hub write them, old names included; the edges are smaller here.
SETTINGS = {
    "mobilenet_v1": {
        "image_processor_type": "MobileNetV1ImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 56, "width": 56},
    },
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 56, "width": 56}},
    "swin": {"feature_extractor_type": "ViTFeatureExtractor", "size": 56, "resample": 3, **IMAGENET},
    "deit": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 64, "crop_size": 56, "resample": 3, **IMAGENET},
    "levit": {"feature_extractor_type": "LevitFeatureExtractor", "size": 56, "crop_size": 56, **IMAGENET},
    "resnet": {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 56, "crop_pct": 0.875, **IMAGENET},
    "bit": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 56, "width": 56},
        "do_normalize": False,
    },
    "unscaled": {"image_processor_type": "ViTImageProcessor", "size": 56, "do_rescale": False, "do_normalize": False},
}


def _anchor(folder: Path, name: str, **changes: object) -> Path:
    place = folder / f"{name}-{len(list(folder.iterdir()))}"
    place.mkdir()
    (place / "preprocessor_config.json").write_text(json.dumps({**SETTINGS[name], **changes}))
    return place


def _image(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shape", [(90, 70), (50, 120)])
def test_both_steps_together_are_the_processor(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    folder = _anchor(tmp_path, name)
    processing = common_processing([folder])
    pixels = processing.pixels(_image(*shape))
    assert processing.size == (56, 56)
    assert pixels.shape == (3, 56, 56) and pixels.dtype == torch.uint8
    expected = AutoImageProcessor.from_pretrained(folder)(_image(*shape), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        normalise(pixels[None], processing.mean, processing.std), expected.float(), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "resized"),
    [
        ("mobilenet_v1", {"size": {"shortest_edge": 46}, "crop_size": {"height": 40, "width": 40}}),  # 45.7
        ("vit", {"size": {"height": 40, "width": 40}}),
        ("deit", {"size": {"height": 46, "width": 46}, "crop_size": {"height": 40, "width": 40}}),
        ("levit", {"size": 40, "crop_size": 40}),
        ("resnet", {"size": 40}),
    ],
)
def test_another_size_keeps_the_rule(name: str, resized: dict[str, object], tmp_path: Path) -> None:
    processing = common_processing([_anchor(tmp_path, name)], image_size=40)
    by_hand = common_processing([_anchor(tmp_path, name, **resized)])
    assert processing.size == by_hand.size == (40, 40)
    assert processing.resize == by_hand.resize
    assert processing.pixels(_image(90, 70)).equal(by_hand.pixels(_image(90, 70)))


def test_pixels_are_pillows_resize_and_crop(tmp_path: Path) -> None:
    processing = common_processing([_anchor(tmp_path, "mobilenet_v1")])
    image = _image(128, 96)
    resized = np.asarray(image.resize((64, 85), Image.Resampling.BILINEAR))  # 128 · 64/96 = 85.3
    top, left = (85 - 56) // 2, (64 - 56) // 2
    expected = resized[top : top + 56, left : left + 56]
    np.testing.assert_array_equal(processing.pixels(image).numpy(), expected.transpose(2, 0, 1))


def test_height_and_width_may_differ(tmp_path: Path) -> None:
    for name in ("mobilenet_v1", "vit"):
        processing = common_processing([_anchor(tmp_path, name)], image_size=(40, 48))
        assert processing.size == (40, 48)
        white = Image.new("RGB", (70, 90), "white")
        assert processing.pixels(white).equal(torch.full((3, 40, 48), 255, dtype=torch.uint8))  # no black edge
    with pytest.raises(ValueError, match=r"image_size=\(40, 48\).*makes (\(40, 40\)|\(48, 48\))"):
        common_processing([_anchor(tmp_path, "resnet")], image_size=(40, 48))


def test_normalisation_as_the_processor_declares_it(tmp_path: Path) -> None:
    folder = _anchor(tmp_path, "swin")
    assert normalisation(AutoImageProcessor.from_pretrained(folder)) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    folder = _anchor(tmp_path, "bit")
    assert normalisation(AutoImageProcessor.from_pretrained(folder)) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True},
        {"image_processor_type": "EfficientNetImageProcessor", "include_top": True, **IMAGENET},  # divides twice
        {"image_processor_type": "EfficientNetImageProcessor", "include_top": False, "rescale_offset": True},
    ],
)
def test_processor_that_does_more_is_refused(settings: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="expected a processor that resizes, crops and normalises and does nothing"):
        common_processing([tmp_path])


def test_anchors_share_one_processing_and_the_target_resizes(tmp_path: Path) -> None:
    resnet, swin = _anchor(tmp_path, "resnet"), _anchor(tmp_path, "swin")
    image = _image(90, 70)
    both = common_processing([resnet, swin])
    assert both == common_processing([swin])
    assert both.pixels(image).equal(common_processing([swin]).pixels(image))
    assert not both.pixels(image).equal(common_processing([resnet]).pixels(image))
    assert common_processing([str(resnet), AutoImageProcessor.from_pretrained(swin)]) == both


def test_anchors_that_normalise_differently_are_named(tmp_path: Path) -> None:
    vit, swin = _anchor(tmp_path, "vit"), _anchor(tmp_path, "swin")
    with pytest.raises(ValueError) as caught:
        common_processing([vit, swin])
    for part in (str(vit), str(swin), "0.485", "0.5", "0.225"):
        assert part in str(caught.value)


def test_anchors_of_different_sizes_need_one(tmp_path: Path) -> None:
    small, large = _anchor(tmp_path, "vit", size={"height": 32, "width": 32}), _anchor(tmp_path, "vit")
    with pytest.raises(ValueError, match=r"different sizes.*\(32, 32\).*\(56, 56\).*give image_size=…"):
        common_processing([small, large])
    assert isinstance(common_processing([small, large], image_size=48), Processing)
    assert common_processing([small, large], image_size=48).size == (48, 48)


def test_inputs_of_unequal_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unequal sizes"):
        common_processing([_anchor(tmp_path, "mobilenet_v1", do_center_crop=False)])


def test_no_anchor_and_no_processor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no anchors"):
        common_processing([])
    with pytest.raises(OSError):
        common_processing([tmp_path])
