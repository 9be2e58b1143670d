"""A supernet trains through `train_stitches`: its paths learn, and a resumed run equals an uninterrupted one.

The images of a class share a pattern, so a few steps are enough to learn them.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from image_examples import changed, interrupted_after
from labelled_images import joined, labelled
from tiny_vision import SIDE, tiny_pair
from torch import Tensor

from klas_hf import StitchedSupernet, TrainingConfig, train_stitches


class Normalised:
    """Labelled float images as a data set."""

    def __init__(self, kind: str, count: int = 3, size: int = 16):
        self.pixels, labels = joined(labelled(kind, count, size, noise=0.3))
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], self.labels[index]


def trained_supernet(kind: str, data: Normalised) -> StitchedSupernet:
    pair = [model.float() for model in tiny_pair(kind)]
    return StitchedSupernet.from_anchors(pair, [(1, 1), (2, 1)], calibration=[data.pixels], image_size=SIDE[kind])


def losses(supernet: StitchedSupernet, data: Normalised) -> list[float]:
    labels = torch.tensor(data.labels)
    with torch.no_grad():
        logits = [supernet(data.pixels, path=path).logits for path in supernet.paths]
    return [F.cross_entropy(one, labels).item() for one in logits]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vit", {}),
        ("vit", {"sampling": "bucket", "sampling_buckets": 3}),
        ("vit", {"drop_path": 0.1}),
        ("vit", {"low_rank_stitches": 2}),
        ("vit", {"trainable": "lora", "lora_rank": 8, "learning_rate": 2e-2}),
        ("vit", {"trainable": "stitch"}),
        ("resnet", {"batch_norm": "frozen"}),
        ("resnet", {"batch_norm": "train"}),
    ],
)
def test_training_lowers_the_loss_of_the_paths(kind: str, options: dict[str, Any]) -> None:
    data = Normalised(kind)
    supernet = trained_supernet(kind, data)
    before, old = losses(supernet, data), copy.deepcopy(supernet)
    settings: dict[str, Any] = {
        "trainable": "full",
        "gradient_accumulation_steps": 1,
        "max_steps": 24,
        "per_device_batch_size": 16,
        "learning_rate": 5e-3,
    } | options
    result = train_stitches(supernet, data, TrainingConfig(**settings))
    assert result.steps == 24 and not supernet.training
    after, frozen = losses(supernet, data), options.get("trainable") == "stitch"
    assert [tensor.dtype for tensor in supernet.parameters()] == [tensor.dtype for tensor in old.parameters()]
    for path, one, other in zip(supernet.paths, before, after, strict=True):
        if frozen and not path.joints:
            assert other == pytest.approx(one)
        elif options.get("batch_norm") != "train":
            assert other < one
    assert sum(after) < sum(before) * (0.98 if frozen else 0.8)
    assert (changed(supernet, old) <= {name for name in supernet.state_dict() if name.startswith("joints")}) == frozen


@pytest.mark.parametrize(
    ("kind", "options"),
    [("vit", {"drop_path": 0.2}), ("vit", {"low_rank_stitches": 2}), ("resnet", {"sampling": "bucket"})],
)
def test_a_resumed_run_equals_an_uninterrupted_one(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = Normalised(kind)
    config = TrainingConfig(
        trainable="full", gradient_accumulation_steps=1, max_steps=6, per_device_batch_size=8,
        learning_rate=5e-3, save_steps=2, **options
    )  # fmt: skip
    whole, parts = trained_supernet(kind, data), trained_supernet(kind, data)
    expected = train_stitches(whole, data, config)
    with interrupted_after(3):
        train_stitches(parts, data, config, output_dir=tmp_path)
    fresh = trained_supernet(kind, data)
    result = train_stitches(fresh, data, config, output_dir=tmp_path)
    assert result.losses == pytest.approx(expected.losses, rel=1e-6)
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], atol=1e-6, rtol=1e-5, msg=name)


def test_an_extracted_model_keeps_how_the_supernet_was_trained(tmp_path: Path) -> None:
    data = Normalised("vit")
    supernet = trained_supernet("vit", data)
    assert supernet.extract((1, 1)).config.training is None
    train_stitches(supernet, data, TrainingConfig(max_steps=2, per_device_batch_size=4))
    supernet.save_pretrained(tmp_path)
    for one in (supernet, StitchedSupernet.from_pretrained(tmp_path)):
        assert one.extract((1, 1)).config.training["steps"] == 2
        assert one.extract((1, 1)).config.training["settings"]["per_device_batch_size"] == 4
    assert supernet.extract((1, 1)).config.training is not supernet.config.training
