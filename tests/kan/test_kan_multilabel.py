"""KAN heads for images with any number of labels: training, mean average precision, compression."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kan_examples import tiny_kan
from scipy.stats import entropy
from sklearn.metrics import average_precision_score
from torch import Tensor
from transformers import AutoModelForImageClassification

from klas_hf import Augmentation, TrainingConfig, compress_kan, evaluate, train_stitches
from klas_hf.data.multilabel import MultiLabelSet
from klas_hf.evaluation.multilabel import average_precisions, mean_average_precision
from klas_hf.training.loop import held_objective_of

NAMES = ["red", "green", "blue"]


def pictures(count: int = 28) -> MultiLabelSet:
    """A bright channel for each class that an image has."""
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(count, 3, generator=generator) < 0.5
    pixels = 40 + 150 * present[..., None, None] + torch.randint(0, 40, (count, 3, 32, 32), generator=generator)
    return MultiLabelSet(pixels.to(torch.uint8), [row.nonzero().flatten().tolist() for row in present], NAMES)


def multi_kan(**settings: Any) -> Any:
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: n for n, name in enumerate(NAMES)}}
    settings = {"problem_type": "multi_label_classification"} | names | settings
    model = tiny_kan(**settings | {"num_labels": 3})
    return model


def batch(data: MultiLabelSet) -> dict[str, Tensor]:
    pixels, labels = zip(*(data[n] for n in range(len(data))), strict=True)
    return {"pixel_values": (torch.stack(pixels) / 255 - 0.5) / 0.25, "labels": torch.stack(labels)}


CONFIG = TrainingConfig(
    trainable="head", max_steps=25, per_device_batch_size=14, gradient_accumulation_steps=1, learning_rate=2e-2,
    mean=[0.5] * 3, std=[0.25] * 3,
)  # fmt: skip


def test_heads_learn_several_labels_and_stay_good_compressed(tmp_path: Path) -> None:
    model, data = multi_kan(), pictures()
    inputs = batch(data)
    before = evaluate(model, [inputs])
    with torch.no_grad():
        expected = model(inputs["pixel_values"], labels=inputs["labels"].float()).loss  # transformers' own
    result = train_stitches(model, data, CONFIG)
    assert before.metrics["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert result.losses[-1] < 0.6 * result.losses[0]
    trained = evaluate(model, [inputs])
    assert trained.metrics["mean_average_precision"] > max(0.95, before.metrics["mean_average_precision"])
    assert trained.details["images"] == 28 and list(trained.details["average_precision"]) == NAMES
    small = compress_kan(model, 32)
    small.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.problem_type == "multi_label_classification"
    assert evaluate(again, [inputs]).metrics == evaluate(small, [inputs]).metrics
    assert evaluate(again, [inputs]).metrics["mean_average_precision"] > 0.9


def test_chance_is_a_mean_over_classes_each_by_itself() -> None:
    data = pictures()
    share, count = batch(data)["labels"].double().mean(0).tolist(), len(data)
    expected = np.mean([entropy([one, 1 - one]) for one in share]) + np.log((count + 1) / count)  # Laplace's rule
    assert held_objective_of(multi_kan(), data, CONFIG).chance() == pytest.approx(expected)


def test_the_first_loss_is_that_of_transformers() -> None:
    model, data = multi_kan(), pictures(14)
    inputs = batch(data)
    with torch.no_grad():
        expected = model(inputs["pixel_values"], labels=inputs["labels"].float()).loss
    found = train_stitches(model, data, replace(CONFIG, max_steps=1)).losses[0]
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_average_precision_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(3)
    labels = generator.random((40, 5)) < [0.5, 0.1, 0.9, 0.0, 0.3]
    logits = generator.normal(size=(40, 5)).astype(np.float32) + labels
    found = average_precisions(torch.from_numpy(logits), torch.from_numpy(labels).long())
    expected = [average_precision_score(labels[:, n], logits[:, n]) for n in (0, 1, 2, 4)]
    np.testing.assert_allclose(found[[0, 1, 2, 4]], expected, atol=1e-6)
    assert found[3].isnan()
    mean = mean_average_precision(torch.from_numpy(logits), torch.from_numpy(labels).long())
    assert mean == pytest.approx(np.mean(expected), abs=1e-6)
    alone = torch.zeros(40, 5, dtype=torch.long)
    alone[:, 0] = torch.from_numpy(labels[:, 0])
    one = average_precisions(torch.from_numpy(logits), alone)
    assert float(one[0]) == pytest.approx(expected[0], abs=1e-6) and one[1:].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augmentation": Augmentation(mixup=0.5)}, r"got \['mixup'\] for images with any number of labels"),
        ({"distillation_weight": 1.0}, "got distillation for images with any number of labels"),
    ],
)
def test_what_needs_one_label_is_refused(change: dict[str, Any], message: str) -> None:
    teacher = multi_kan(seed=1)
    with pytest.raises(ValueError, match=message):
        train_stitches(
            multi_kan(), pictures(), TrainingConfig(trainable="head", max_steps=1, **change), teacher=teacher
        )


def test_labels_of_another_form_are_refused() -> None:
    model, inputs = multi_kan(), batch(pictures())
    for labels in (inputs["labels"][:, 0], inputs["labels"][:, :2], 2 * inputs["labels"]):
        with pytest.raises(ValueError, match=r"got labels of shape .* of 3 classes, .* expected \(batch, classes\)"):
            evaluate(model, [inputs | {"labels": labels}])
    with pytest.raises(ValueError, match="got images without a label; expected some class to occur"):
        evaluate(model, [inputs | {"labels": 0 * inputs["labels"]}])
    with pytest.raises(ValueError, match="got no images to measure on"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="got classes for a model of any number of labels"):
        evaluate(model, [inputs], classes=[0])
    data = MultiLabelSet(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [[0], [1]], ["a", "b"])
    with pytest.raises(ValueError, match="got images of 2 classes for a model of 3"):
        train_stitches(model, data, CONFIG)
