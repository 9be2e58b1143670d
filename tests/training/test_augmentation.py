"""Augmentation: off it does nothing, on it does what the papers say, and torch's seed repeats it."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, kstest
from torch import Tensor

from klas_hf.training.augmentation import Augmentation, augment, normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EACH = [
    Augmentation(crop_padding=2),
    Augmentation(crop_scale=(0.3, 0.9)),
    Augmentation(horizontal_flip=True),
    Augmentation(randaugment=(2, 9)),
    Augmentation(erasing=0.5),
    Augmentation(mixup=0.8),
    Augmentation(cutmix=1.0),
    Augmentation(mixup=0.8, cutmix=1.0),
]


def _batch(size: int = 8, channels: int = 3, height: int = 12, width: int = 16) -> tuple[Tensor, Tensor]:
    pixels = torch.randint(0, 256, (size, channels, height, width), dtype=torch.uint8)
    return normalise(pixels, MEAN[:channels], STD[:channels]), torch.arange(size) % 5


def _run(images: Tensor, labels: Tensor, what: Augmentation, num_labels: int = 5) -> tuple[Tensor, Tensor]:
    channels = images.shape[1]
    return augment(images, labels, what, MEAN[:channels], STD[:channels], num_labels)


def _unnormalised(images: Tensor) -> Tensor:
    return images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


@given(st.data())
def test_normalise_is_the_formula(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([1, 3]))
    mean = data.draw(st.lists(st.floats(0, 1), min_size=channels, max_size=channels))
    std = data.draw(st.lists(st.floats(0.05, 2), min_size=channels, max_size=channels))
    pixels = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (2, channels, 3, 4), dtype=np.uint8)
    got = normalise(torch.from_numpy(pixels), mean, std)
    for channel in range(channels):
        expected = (pixels[:, channel] / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(got[:, channel].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert got.dtype == torch.float32


def test_off_returns_the_inputs() -> None:
    images, labels = _batch()
    before = images.clone()
    got, targets = _run(images, labels, Augmentation())
    assert got.equal(before)
    assert targets.dtype == torch.float32
    assert targets.tolist() == [[float(label == place) for place in range(5)] for label in labels]


@pytest.mark.parametrize("what", EACH)
def test_seed_repeats_a_batch_and_inputs_stay(what: Augmentation) -> None:
    images, labels = _batch()
    before = images.clone()
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        runs.append([_run(images, labels, what) for _ in range(4)])
    same, again, other = runs
    assert all(x.equal(y) and s.equal(t) for (x, s), (y, t) in zip(same, again, strict=True))
    assert not all(x.equal(y) for (x, _), (y, _) in zip(same, other, strict=True))
    assert not all(x.equal(images) for x, _ in same)
    assert images.equal(before)


@pytest.mark.parametrize("what", EACH)
def test_dtype_stays_and_targets_are_distributions(what: Augmentation) -> None:
    images, labels = _batch()
    got, targets = _run(images.bfloat16(), labels, what)
    assert got.dtype == torch.bfloat16 and got.shape == images.shape
    assert targets.dtype == torch.float32 and targets.min() >= 0
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


@pytest.mark.parametrize("what", [a for a in EACH if a.randaugment is None])
def test_grey_images(what: Augmentation) -> None:
    images, labels = _batch(channels=1)
    assert _run(images, labels, what)[0].shape == images.shape


def test_randaugment_refuses_grey_images() -> None:
    with pytest.raises(ValueError, match=r"1 channel.*expected 3"):
        _run(*_batch(channels=1), Augmentation(randaugment=(1, 9)))


@given(smoothing=st.floats(0, 1), seed=st.integers(0, 99))
def test_label_smoothing_is_that_of_cross_entropy(smoothing: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 5, generator=generator)
    images, labels = _batch()
    _, targets = _run(images, labels, Augmentation(label_smoothing=smoothing))
    torch.testing.assert_close(
        F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=smoothing)
    )


def test_flip_mirrors_some_images() -> None:
    images, labels = _batch(size=32)
    got, _ = _run(images, labels, Augmentation(horizontal_flip=True))
    kept = [torch.allclose(x, y, atol=1e-5) for x, y in zip(got, images, strict=True)]
    mirrored = [torch.allclose(x, y.flip(-1), atol=1e-5) for x, y in zip(got, images, strict=True)]
    assert all(k != m for k, m in zip(kept, mirrored, strict=True))
    assert 4 < sum(mirrored) < 28


def test_padded_crop_is_a_window_of_the_padded_image() -> None:
    images, labels = _batch(size=16)
    got, _ = _run(images, labels, Augmentation(crop_padding=2))
    padded = F.pad(_unnormalised(images), (2, 2, 2, 2))
    offsets = set()
    for cropped, whole in zip(_unnormalised(got), padded, strict=True):
        fits = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.allclose(cropped, whole[:, top : top + 12, left : left + 16], atol=1e-5)
        ]
        assert len(fits) == 1
        offsets.update(fits)
    assert len(offsets) > 4


def test_resized_crop_keeps_the_share_of_the_area() -> None:
    width = 64
    ramp = torch.linspace(0, 1, width).expand(16, 3, width, width)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    got, _ = _run((ramp - mean) / std, torch.zeros(16, dtype=torch.long), Augmentation(crop_scale=(0.25, 0.25)))
    columns = _unnormalised(got)[:, 0, width // 2]
    spans = columns[:, -1] - columns[:, 0]  # of the ramp: the share of the width
    assert ((spans > np.sqrt(0.25 * 3 / 4) - 0.05) & (spans < np.sqrt(0.25 * 4 / 3) + 0.05)).all()
    assert columns[:, 0].std() > 0.05  # at different places


def test_erasing_sets_a_rectangle_to_the_mean_and_leaves_the_rest() -> None:
    images, labels = _batch(size=64)
    got, _ = _run(images, labels, Augmentation(erasing=0.5))
    changed = (got != images).any(1)
    assert (got.movedim(1, -1)[changed] == 0).all()
    assert 16 < changed.flatten(1).any(1).sum() < 48
    for mask in changed[changed.flatten(1).any(1)]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    certain, _ = _run(images, labels, Augmentation(erasing=1.0))
    assert (certain != images).flatten(1).any(1).all()


def test_randaugment_works_on_pixels_whatever_the_normalisation() -> None:
    pixels = torch.rand(16, 3, 12, 12)
    labels = torch.zeros(16, dtype=torch.long)
    results = []
    for mean, std in ((0.0, 1.0), (0.5, 0.25)):
        torch.manual_seed(3)
        got, _ = augment((pixels - mean) / std, labels, Augmentation(randaugment=(3, 15)), [mean] * 3, [std] * 3, 2)
        results.append(got * std + mean)
    torch.testing.assert_close(results[0], results[1], atol=1e-2, rtol=0)  # posterise and equalise round
    assert results[0].min() > -1e-4 and results[0].max() < 1 + 1e-4


def test_randaugment_is_stronger_with_more_operations_and_magnitude() -> None:
    pixels, labels = torch.rand(4, 3, 12, 12), torch.zeros(4, dtype=torch.long)

    def change(what: tuple[int, int]) -> float:
        torch.manual_seed(0)
        runs = [augment(pixels, labels, Augmentation(randaugment=what), [0.0] * 3, [1.0] * 3, 2)[0] for _ in range(30)]
        return float(np.mean([(run - pixels).abs().mean() for run in runs]))

    assert change((1, 5)) < change((4, 5))
    assert change((2, 1)) < change((2, 29))


def test_mixup_mixes_images_as_it_mixes_targets() -> None:
    images, _ = _batch(size=6)
    for _ in range(5):
        got, targets = _run(images, torch.arange(6), Augmentation(mixup=1.0), num_labels=6)
        torch.testing.assert_close(got, torch.einsum("ij,jchw->ichw", targets, images))
        assert (targets > 0).sum(1).max() <= 2
        assert len({round(float(row.max()), 4) for row in targets if row.max() < 1}) <= 1  # one λ for the batch


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_mixup_draws_lambda_from_beta(alpha: float) -> None:
    images, labels = torch.zeros(2, 1, 1, 1), torch.arange(2)
    drawn = [float(augment(images, labels, Augmentation(mixup=alpha), [0.5], [0.5], 2)[1][0, 0]) for _ in range(1500)]
    swapped = [lam for lam in drawn if lam != 1.0]
    assert kstest(swapped, beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_pastes_a_box_and_counts_its_area() -> None:
    size = 6
    images = torch.arange(1.0, size + 1)[:, None, None, None].expand(size, 3, 12, 16).contiguous()
    seen = 0
    for _ in range(10):
        got, targets = _run(images, torch.arange(size), Augmentation(cutmix=1.0), num_labels=size)
        for place in range(size):
            share = torch.bincount(got[place, 0].long().flatten() - 1, minlength=size) / (12 * 16)
            torch.testing.assert_close(targets[place], share)
            pasted = got[place, 0] != place + 1
            if pasted.any():
                rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
                assert pasted.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                seen += 1
    assert seen > 20


def test_cutmix_of_large_beta_keeps_half() -> None:
    images, labels = torch.ones(64, 1, 32, 32), torch.arange(64)
    _, targets = augment(images, labels, Augmentation(cutmix=1000.0), [0.5], [0.5], 64)
    kept = targets.diagonal()
    assert ((kept > 0.4) & (kept < 0.6) | (kept == 1)).all()  # 1: paired with itself


def test_mixup_and_cutmix_take_turns() -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8).contiguous()
    kinds: Counter[str] = Counter()
    for _ in range(40):
        got, _ = augment(images, torch.arange(4), Augmentation(mixup=1.0, cutmix=1.0), [0.5], [0.5], 4)
        patched = (got.flatten(1).max(1).values > got.flatten(1).min(1).values).any()
        kinds["cutmix" if patched else "mixup" if not got.equal(images) else "neither"] += 1
    assert kinds["cutmix"] > 10 and kinds["mixup"] > 10


def test_no_graph_is_kept() -> None:
    images, labels = _batch()
    got, targets = _run(images.requires_grad_(), labels, Augmentation(2, None, True, (1, 9), 0.5, 0.4, 1.0, 0.1))
    assert not got.requires_grad and not targets.requires_grad


def test_label_smoothing_and_mixup_together() -> None:
    images, labels = _batch(size=6)
    torch.manual_seed(1)
    _, plain = _run(images, labels, Augmentation(mixup=1.0))
    torch.manual_seed(1)
    _, smooth = _run(images, labels, Augmentation(mixup=1.0, label_smoothing=0.1))
    torch.testing.assert_close(smooth, 0.9 * plain + 0.1 / 5)


@settings(max_examples=20)
@given(size=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_batch_size(size: int, seed: int) -> None:
    images, labels = _batch(size=size)
    torch.manual_seed(seed)
    everything = Augmentation(2, None, True, (1, 9), 0.5, 0.4, 1.0, 0.1)
    got, targets = _run(images, labels, everything)
    assert got.shape == images.shape and got.isfinite().all()
    torch.testing.assert_close(targets.sum(1), torch.ones(size))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"crop_scale": (0.5, 0.6, 0.7)}, "crop_scale=.*expected two"),
        ({"randaugment": (2,)}, "randaugment=.*expected two"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.3)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale"),
        ({"crop_padding": 4, "crop_scale": (0.5, 1.0)}, "expected one of them"),
        ({"randaugment": (0, 9)}, "randaugment"),
        ({"randaugment": (2, 30)}, "below 30"),
        ({"mixup": -0.1}, "mixup=-0.1"),
        ({"cutmix": -0.1}, "cutmix=-0.1"),
        ({"erasing": 1.1}, "erasing=1.1"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
    ],
)
def test_settings_out_of_range(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings_)


def test_lists_as_yaml_gives_them() -> None:
    assert Augmentation(randaugment=[2, 9], crop_scale=[0.5, 1.0]) == Augmentation(0, (0.5, 1.0), False, (2, 9))


def test_wrong_inputs_are_named() -> None:
    images, labels = _batch()
    with pytest.raises(TypeError, match="normalise"):
        augment((images * 0).to(torch.uint8), labels, Augmentation(), MEAN, STD, 5)
    with pytest.raises(TypeError, match="expected uint8"):
        normalise(images, MEAN, STD)
    with pytest.raises(ValueError, match=r"3 channel\(s\), 1 mean"):
        augment(images, labels, Augmentation(horizontal_flip=True), [0.5], [0.5], 5)
    with pytest.raises(ValueError, match=r"labels of shape \(7,\)"):
        _run(images, labels[:7], Augmentation())
    for wrong in (-100, 5):
        with pytest.raises(ValueError, match="expected 0 to 4"):
            _run(images, torch.where(labels == 0, wrong, labels), Augmentation())


def test_missing_kornia_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    images, labels = _batch(height=11)  # a size of its own: transforms are remembered
    with pytest.raises(ImportError, match=r"klas_hf\[vision\]"):
        _run(images, labels, Augmentation(horizontal_flip=True))
    assert _run(images, labels, Augmentation(mixup=0.2))[0].shape == images.shape
