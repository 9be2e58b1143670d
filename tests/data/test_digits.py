"""The bundled digits: every image is in one part, the parts are alike, and pixels span 0 to 255."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from klas_hf.data.digits import load_digits_split
from klas_hf.data.images import ImageBatches, ImageSet


def _content(part: ImageSet) -> Counter:
    return Counter((image.numpy().tobytes(), label) for image, label in (part[n] for n in range(len(part))))


def test_parts_make_up_the_whole() -> None:
    digits = load_digits()
    scaled = np.round(digits.images / 16 * 255).astype(np.uint8)
    expected = Counter((image.tobytes(), int(label)) for image, label in zip(scaled, digits.target, strict=True))
    parts = load_digits_split()
    assert sum((_content(part) for part in parts), Counter()) == expected
    assert max(int(part[n][0].max()) for part in parts for n in range(20)) == 255
    for part in parts:
        image, label = part[0]
        assert image.shape == (1, 8, 8) and image.dtype == torch.uint8 and isinstance(label, int)
        assert part.names == tuple("0123456789") and part.skipped == 0


@pytest.mark.parametrize(("test_share", "val_share"), [(0.25, 0.15), (0.1, 0.3)])
def test_shares_are_stratified(test_share: float, val_share: float) -> None:
    sizes = Counter(load_digits().target.tolist())
    parts = load_digits_split(seed=1, test_share=test_share, val_share=val_share)
    for part, share in zip(parts, (1 - test_share - val_share, val_share, test_share), strict=True):
        counts = Counter(part.labels)
        assert all(abs(counts[label] - share * sizes[label]) < 3 for label in range(10))


def test_seed_draws_the_split() -> None:
    for first, again, other in zip(*(load_digits_split(seed=seed) for seed in (0, 0, 1)), strict=True):
        assert first.rows == again.rows
        assert sorted(first.rows) != sorted(other.rows)


def test_batches_of_grey_images() -> None:
    train, _, _ = load_digits_split()
    batch = next(iter(ImageBatches(train, 32, [0.5], [0.5])))
    assert batch["pixel_values"].shape == (32, 1, 8, 8)
    assert batch["pixel_values"].min() == -1 and batch["pixel_values"].max() == 1


@pytest.mark.parametrize(("test_share", "val_share"), [(0.0, 0.1), (0.1, -0.1), (0.6, 0.4)])
def test_impossible_shares(test_share: float, val_share: float) -> None:
    with pytest.raises(ValueError, match="expected both above 0 and their sum below 1"):
        load_digits_split(test_share=test_share, val_share=val_share)


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"klas_hf\[vision\]"):
        load_digits_split()
