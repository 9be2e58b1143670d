"""Augmentation of image batches on the device they are on: crops, flips, RandAugment, erasing, mixup, CutMix.

The transforms are kornia's; they draw from torch's global generator on the CPU, so `torch.manual_seed` repeats a
batch on any device. Sources: RandAugment, Cubuk et al. 2020; random erasing, Zhong et al. 2020; mixup, Zhang et al.
2018; CutMix, Yun et al. 2019; label smoothing, Szegedy et al. 2016.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klas_hf.training.config import Augmentation, TrainingConfig

_UNMASKED = ("randaugment", "erasing", "mixup", "cutmix", "label_smoothing")  # what masks cannot have


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images as models take them: `(pixels / 255 − mean) / std`, per channel, in float32.

    Args:
        pixels: `(batch, channels, height, width)`, uint8.
        mean, std: per channel, of pixels from 0 to 1.

    Raises:
        TypeError: pixels are not uint8.
        ValueError: another number of channels than of means and deviations.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"got pixels of {pixels.dtype}; expected uint8 from 0 to 255, which are not yet normalised")
    shift, scale = _per_channel(pixels, mean, std)
    return (pixels.float() / 255 - shift) / scale


def as_floats(pixels: Tensor, config: TrainingConfig) -> Tensor:
    """Pixels of a batch in float32: uint8 normalised as the settings say, floats as they are."""
    return pixels.float() if pixels.is_floating_point() else normalise(pixels, config.mean, config.std)


@torch.no_grad()
def augment(
    pixel_values: Tensor,
    labels: Tensor,
    settings: Augmentation,
    mean: Sequence[float],
    std: Sequence[float],
    num_labels: int,
) -> tuple[Tensor, Tensor]:
    """Augment a batch; with nothing switched on the images are returned as they came.

    Args:
        pixel_values: `(batch, channels, height, width)`, floats, normalised by `mean` and `std`.
        labels: `(batch,)`, integers from 0.
        settings: what is applied.
        mean, std: per channel, of pixels from 0 to 1.
        num_labels: classes.

    Returns:
        The images in their dtype, and targets `(batch, num_labels)` in float32 whose rows sum to 1.

    Raises:
        ImportError: kornia is missing and something is switched on that needs it.
        TypeError: the images are not floats.
        ValueError: a label out of range, RandAugment of images that have not 3 channels, means that do not fit.
    """
    _check(pixel_values, labels, settings, num_labels)
    images = _transformed(pixel_values, settings, mean, std)
    targets = F.one_hot(labels.long(), num_labels).float()
    images, targets = _mixed(images, labels, targets, settings)
    smoothing = settings.label_smoothing
    return images, targets * (1 - smoothing) + smoothing / num_labels if smoothing else targets


@torch.no_grad()
def augment_masks(pixel_values: Tensor, masks: Tensor, settings: Augmentation) -> tuple[Tensor, Tensor]:
    """Flip and crop images and their masks alike.

    Args:
        pixel_values: `(batch, channels, height, width)`, floats, normalised: what a crop leaves empty is the mean.
        masks: `(batch, height, width)`, class numbers; what a crop leaves empty is 255.

    Raises:
        ImportError: kornia is missing and something is switched on that needs it.
        ValueError: augmentation that masks cannot have.
    """
    wrong = [name for name in _UNMASKED if getattr(settings, name)]
    if wrong:
        raise ValueError(f"got {wrong} for images with masks; expected crop_padding, crop_scale or horizontal_flip")
    transforms = _pixel_transforms(settings, *pixel_values.shape[-2:])
    if not len(transforms):
        return pixel_values, masks
    both = _kornia().AugmentationSequential(*transforms, data_keys=["input", "mask"])  # masks by the nearest pixel
    pixels, moved = both(pixel_values, (masks + 1.0)[:, None])  # 0 is what lies outside
    moved = moved[:, 0].round().long() - 1
    return pixels, moved.where(moved >= 0, 255)


def _check(pixel_values: Tensor, labels: Tensor, settings: Augmentation, num_labels: int) -> None:
    if not pixel_values.is_floating_point():
        raise TypeError(f"got images of {pixel_values.dtype}; expected floats: call `normalise` on uint8 pixels first")
    if pixel_values.ndim != 4 or labels.shape != pixel_values.shape[:1]:
        raise ValueError(
            f"got images of shape {tuple(pixel_values.shape)} and labels of shape {tuple(labels.shape)}; "
            "expected (batch, channels, height, width) and (batch,)"
        )
    if settings.randaugment is not None and pixel_values.shape[1] != 3:
        raise ValueError(
            f"got images with {pixel_values.shape[1]} channel(s) and randaugment={settings.randaugment}; expected 3 "
            "channels, since some of its operations change colours: set randaugment to None, or repeat the grey channel"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
        raise ValueError(
            f"got labels from {int(labels.min())} to {int(labels.max())}; expected 0 to {num_labels - 1} "
            f"(num_labels={num_labels}): leave examples without a label out of the batch"
        )


def _transformed(pixel_values: Tensor, settings: Augmentation, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    height, width = pixel_values.shape[-2:]
    on_pixels = _pixel_transforms(settings, height, width)
    images = pixel_values
    if len(on_pixels):
        shift, scale = _per_channel(images, mean, std)
        images = (images.float() * scale + shift).clamp(0, 1)  # rounding leaves [0, 1] by an ulp
        images = (on_pixels(images) - shift) / scale
    if settings.erasing:
        images = _eraser(settings.erasing)(images.float())
    return images.to(pixel_values.dtype)


# The modules hold no state but the last draw; building RandAugment for each batch takes milliseconds.
@lru_cache(maxsize=8)
def _pixel_transforms(settings: Augmentation, height: int, width: int) -> nn.Sequential:
    transforms: list[nn.Module] = []
    if settings.crop_padding:
        transforms.append(_kornia().RandomCrop((height, width), padding=settings.crop_padding))
    if settings.crop_scale is not None:
        transforms.append(_kornia().RandomResizedCrop((height, width), scale=settings.crop_scale))
    if settings.horizontal_flip:
        transforms.append(_kornia().RandomHorizontalFlip(p=0.5))
    if settings.randaugment is not None:
        # kornia draws the operations once per batch, and their signs per image; the paper draws all per image.
        operations, magnitude = settings.randaugment
        transforms.append(_kornia().auto.RandAugment(operations, magnitude))
    return nn.Sequential(*transforms)


@lru_cache(maxsize=8)
def _eraser(probability: float) -> nn.Module:
    return _kornia().RandomErasing(p=probability, value=0.0)  # 0 is the mean colour of normalised images


def _mixed(images: Tensor, labels: Tensor, targets: Tensor, settings: Augmentation) -> tuple[Tensor, Tensor]:
    if settings.mixup and settings.cutmix:
        chosen = _mixup if torch.rand(()) < 0.5 else _cutmix
    elif settings.mixup:
        chosen = _mixup
    elif settings.cutmix:
        chosen = _cutmix
    else:
        return images, targets
    return chosen(images, labels, targets, settings)


def _mixup(images: Tensor, labels: Tensor, targets: Tensor, settings: Augmentation) -> tuple[Tensor, Tensor]:
    # Not kornia's RandomMixUpV2, which draws λ uniformly; one λ per batch as in the authors' code.
    lam = torch.distributions.Beta(settings.mixup, settings.mixup).sample().item()
    others = torch.randperm(len(images)).to(images.device)
    return lam * images + (1 - lam) * images[others], lam * targets + (1 - lam) * targets[others]


def _cutmix(images: Tensor, labels: Tensor, targets: Tensor, settings: Augmentation) -> tuple[Tensor, Tensor]:
    # kornia draws a λ and a box for each image, and the box lies inside the image; the paper draws one of each for
    # a batch and clips the box. Either way the share of the target is the area that was kept.
    mix = _kornia().RandomCutMixV2(beta=settings.cutmix, data_keys=["input", "class"], use_correct_lambda=True)
    # Rows instead of labels: kornia returns them as floats, and a row number gives the other's target directly.
    mixed, drawn = mix(images.float(), torch.arange(len(images), device=images.device))
    _, others, kept = drawn[0].unbind(-1)
    kept = kept.to(targets.dtype)[:, None]
    return mixed.to(images.dtype), kept * targets + (1 - kept) * targets[others.long()]


def _per_channel(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and deviation as `(channels, 1, 1)`, float32, on the images' device."""
    if not images.shape[-3] == len(mean) == len(std):
        raise ValueError(
            f"got images with {images.shape[-3]} channel(s), {len(mean)} mean(s) and {len(std)} deviation(s); "
            "expected one mean and one deviation per channel"
        )
    return tuple(torch.tensor(list(v), dtype=torch.float32, device=images.device)[:, None, None] for v in (mean, std))


def _kornia() -> ModuleType:
    try:
        import kornia.augmentation
    except ImportError as error:
        raise ImportError('augmentation needs kornia: pip install "klas_hf[vision]"') from error
    return kornia.augmentation
