"""Handwritten digits that scikit-learn carries: 1,797 grey images of 8×8 pixels, for runs without a download.

The UCI set "Optical recognition of handwritten digits" (Alpaydin and Kaynak, 1998), its test part.
"""

import numpy as np
import torch

from klas_hf.data.images import ImageSet

_GREATEST = 16  # the data's brightest pixel


def load_digits_split(
    seed: int = 0, test_share: float = 0.25, val_share: float = 0.15, scale: int = 1
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training, validation and test set, `(1, 8·scale, 8·scale)` uint8 images with the digits' shares alike in each.

    Args:
        seed: of the split.
        test_share, val_share: shares of all images; the rest is for training.
        scale: how often each pixel is repeated along both sides, for models whose stems halve the image twice.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: a share that is not above 0, or nothing is left for training.
    """
    if min(test_share, val_share) <= 0 or test_share + val_share >= 1:
        raise ValueError(
            f"got test_share={test_share} and val_share={val_share}; expected both above 0 and their sum below 1"
        )
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError('the digits need scikit-learn: pip install "klas_hf[vision]"') from error
    digits = load_digits()
    pixels = torch.from_numpy(np.rint(digits.images * 255 / _GREATEST).astype(np.uint8))[:, None]
    pixels = pixels.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    every = np.arange(len(pixels))
    rest, test = train_test_split(every, test_size=test_share, stratify=digits.target, random_state=seed)
    train, val = train_test_split(
        rest, test_size=val_share / (1 - test_share), stratify=digits.target[rest], random_state=seed
    )
    names = tuple(str(name) for name in digits.target_names)
    whole = ImageSet(pixels, digits.target.tolist(), names)
    return whole.select(train.tolist()), whole.select(val.tolist()), whole.select(test.tolist())
