"""What an anchor's image processor does, in two steps: resize and crop (uint8 stays uint8), then normalise.

Apart, since pixels in uint8 take a quarter of the memory, augmentation works on pixels, and the anchors of one
stitched model share both steps: their blocks are joined, so they must see the same input.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor

from klas_hf.training.augmentation import normalise

_CHANNELS = 3
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Processing:
    """How images become inputs of the anchors.

    Attributes:
        size: height and width of the inputs, pixels.
        resize: the processor's `size` before the crop, such as `{"shortest_edge": 256}`.
        mean, std: of the normalisation, per channel, of pixels from 0 to 1.
        processor: the image processor that resizes and crops.
    """

    size: tuple[int, int]
    resize: Mapping[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    processor: BaseImageProcessor = field(repr=False, compare=False)

    def pixels(self, image: Any) -> Tensor:
        """Resize and crop a PIL image in RGB: `(3, height, width)`, uint8."""
        height, width = self.size
        return _pixels(self.processor, image, size=dict(self.resize), crop_size={"height": height, "width": width})


@dataclass(frozen=True)
class CroppedProcessing:
    """Evaluation as timm publishes it with a model: the shorter side resized, the centre cut out, then normalised.

    The side is resized to ⌊size / crop_pct⌋ pixels and the longer one to ⌊side · ratio⌋; the crop begins at half of
    what is left over, rounded as torchvision does, half to even.

    Attributes:
        size: height and width of the inputs, pixels, which are equal.
        crop_pct: what share of the resized side is kept.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        mean, std: of the normalisation, per channel, of pixels from 0 to 1.

    Raises:
        ValueError: an unknown interpolation, inputs that are not square, or a crop_pct that is not in (0, 1].

    Example:
        >>> from PIL import Image
        >>> processing = CroppedProcessing((224, 224), 0.9, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        >>> processing.pixels(Image.new("RGB", (500, 375))).shape
        torch.Size([3, 224, 224])
    """

    size: tuple[int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.size[0] != self.size[1] or not 0 < self.crop_pct <= 1 or self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"got size={self.size}, crop_pct={self.crop_pct} and interpolation={self.interpolation!r}; expected a "
                f"square, more than 0 and at most 1, and one of {', '.join(_INTERPOLATIONS)}"
            )

    def pixels(self, image: Any) -> Tensor:
        """Resize and crop a PIL image in RGB: `(3, height, width)`, uint8."""
        from PIL import Image

        short, long = sorted(image.size)
        side = math.floor(self.size[0] / self.crop_pct)
        sides = {short: side, long: int(side * long / short)} if short < long else {short: side}
        resized = image.resize(tuple(sides[one] for one in image.size), getattr(Image, self.interpolation.upper()))
        left, top = (round((have - want) / 2) for have, want in zip(resized.size, self.size[::-1], strict=True))
        cropped = resized.crop((left, top, left + self.size[1], top + self.size[0]))
        return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous()


def timm_processing(settings: str | Path | Mapping[str, Any]) -> CroppedProcessing:
    """The evaluation that timm publishes with a model.

    Args:
        settings: its `pretrained_cfg`, or the `config.json` of its repository, which holds one.

    Raises:
        OSError: no such file.
        ValueError: it lacks the size, `crop_pct`, the interpolation, the mean or the deviation, or crops otherwise.
    """
    given = settings if isinstance(settings, Mapping) else json.loads(Path(settings).read_text(encoding="utf-8"))
    given = given.get("pretrained_cfg", given)
    if missing := sorted({"input_size", "crop_pct", "interpolation", "mean", "std"} - given.keys()):
        raise ValueError(f"got preprocessing without {missing}; expected a pretrained_cfg of timm, or its config.json")
    if (mode := given.get("crop_mode", "center")) != "center":
        raise ValueError(f"got crop_mode={mode!r}; expected 'center'")
    _, height, width = given["input_size"]
    return CroppedProcessing(
        (height, width), given["crop_pct"], given["interpolation"], tuple(given["mean"]), tuple(given["std"])
    )


def common_processing(
    anchors: Sequence[str | Path | BaseImageProcessor], image_size: int | tuple[int, int] | None = None
) -> Processing:
    """The processing that all anchors of a stitched model share.

    The anchors must normalise alike. Resizing and interpolation are the last anchor's, which is the target's: the
    head that classifies is its own.

    Args:
        anchors: Hub ids, local folders or image processors, source first.
        image_size: height and width of the inputs, pixels, or one number for both. The ratio of resize edge to crop
            stays the processor's. None: the anchors' own size.

    Raises:
        OSError: an anchor has no image processor.
        ValueError: no anchor; normalisations differ; sizes differ and `image_size` is None; a processor does
            something other than resizing, cropping and normalising, or cannot make inputs of that size.
    """
    if not anchors:
        raise ValueError("got no anchors; expected at least one Hub id, local folder or image processor")
    named = [_named_processor(anchor) for anchor in anchors]
    name, processor = named[-1]
    mean, std = normalisation(processor)
    for other, its_processor in named[:-1]:
        theirs = normalisation(its_processor)
        if not np.allclose(theirs, (mean, std), atol=1e-4):
            raise ValueError(
                f"got {other}, which normalises by mean {theirs[0]} and deviation {theirs[1]}, and {name}, which "
                f"normalises by {mean} and {std}; expected one normalisation, since a stitched model has one input: "
                "choose anchors that were trained alike"
            )
    sizes = {other: _output_size(its_processor) for other, its_processor in named}
    if image_size is None and len(set(sizes.values())) > 1:
        raise ValueError(f"got anchors with inputs of different sizes, {sizes}; give image_size=…, one that all take")
    wanted = (image_size, image_size) if isinstance(image_size, int) else image_size or sizes[name]
    return Processing(wanted, _resize_rule(processor, sizes[name], wanted, name), mean, std, processor)


def normalisation(processor: BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel by which a processor normalises pixels from 0 to 1.

    Raises:
        ValueError: what the processor makes of an image is not explained by them: channels in another order, say.
    """
    settings = processor.to_dict()
    factor = 255 * settings["rescale_factor"] if settings.get("do_rescale") else 255.0
    normalises = settings.get("do_normalize")
    mean = _by_channel(settings["image_mean"] if normalises else 0.0, factor)
    std = _by_channel(settings["image_std"] if normalises else 1.0, factor)
    image = _test_image(40, 60)
    expected = normalise(_pixels(processor, image)[None], mean, std)[0]
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    if not (_keeps_colours(processor) and torch.allclose(found.float(), expected, atol=1e-3)):
        raise ValueError(
            f"got {type(processor).__name__}, whose output is not its resized pixels normalised by mean {mean} and "
            f"deviation {std}; expected a processor that resizes, crops and normalises and does nothing else"
        )
    return mean, std


def _named_processor(anchor: str | Path | BaseImageProcessor) -> tuple[str, BaseImageProcessor]:
    if isinstance(anchor, BaseImageProcessor):
        return type(anchor).__name__, anchor
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError('images need Pillow: pip install "klas_hf[vision]"') from error
    return str(anchor), AutoImageProcessor.from_pretrained(anchor)


def _pixels(processor: BaseImageProcessor, image: Any, **settings: Any) -> Tensor:
    inputs = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt", **settings)
    return inputs["pixel_values"][0].to(torch.uint8)


def _by_channel(values: float | Sequence[float], factor: float) -> tuple[float, ...]:
    return tuple(float(value) / factor for value in np.broadcast_to(values, _CHANNELS))


def _test_image(height: int, width: int) -> Any:
    from PIL import Image

    values = np.arange(height * width * _CHANNELS) % 251  # no two channels alike
    return Image.fromarray(values.astype(np.uint8).reshape(height, width, _CHANNELS))


def _keeps_colours(processor: BaseImageProcessor) -> bool:
    from PIL import Image

    colour = (10, 100, 200)
    pixels = _pixels(processor, Image.new("RGB", (60, 40), colour))
    centre = pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]
    return tuple(centre.tolist()) == colour


def _output_size(processor: BaseImageProcessor, **settings: Any) -> tuple[int, int]:
    """Height and width that a processor makes, found by use, since each class has its own rules for them."""
    wide, high = (tuple(_pixels(processor, _test_image(*hw), **settings).shape[-2:]) for hw in ((40, 60), (60, 40)))
    if wide != high:
        raise ValueError(
            f"got {type(processor).__name__}, which makes inputs of unequal sizes ({wide} and {high} of images of "
            "40×60 and 60×40 pixels); expected one that crops, or resizes to one height and width"
        )
    return wide


def _resize_rule(
    processor: BaseImageProcessor, own: tuple[int, int], wanted: tuple[int, int], name: str
) -> dict[str, int]:
    """The processor's `size`, scaled from its own inputs' size to the wanted one."""
    ratios = {"height": (wanted[0], own[0]), "width": (wanted[1], own[1])}
    largest = max(ratios.values(), key=lambda ratio: ratio[0] / ratio[1])
    rule = {}
    for key, value in processor.to_dict()["size"].items():
        new, old = ratios.get(key, largest)
        rule[key] = int(value * new / old + 0.5)
    crop = {"height": wanted[0], "width": wanted[1]}
    made = _output_size(processor, size=rule, crop_size=crop)
    if made != wanted:
        raise ValueError(f"got image_size={wanted}, of which {name}'s image processor makes {made}; choose another")
    return rule
