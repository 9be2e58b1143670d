"""What no model can read is refused in the user's terms wherever it is given: float labels, unknown token ids."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from image_examples import ToyImages, tiny_vit
from tiny_models import VOCABULARY, tiny_model, token_ids
from torch import Tensor

from klas_hf import ImageProbeConfig, StitchedModel, TrainingConfig, evaluate, score_stitches, train_probes
from klas_hf import train_stitches as train
from klas_hf.evaluation import evaluate_divergence

SETTINGS = TrainingConfig(trainable="full", max_steps=1)
Use = Callable[[Any], Any]


def text(*wrong: float) -> list[dict[str, Tensor]]:
    """Three batches, the last of which ends with these."""
    batches = list(token_ids(12, 6).split(4))
    if wrong:
        batches[2] = batches[2].to(torch.tensor(wrong).dtype)
        batches[2][-1, -len(wrong) :] = torch.tensor(wrong)
    return [{"input_ids": ids, "labels": ids.clone()} for ids in batches]


def examples(batches: list[dict[str, Tensor]]) -> list[dict[str, list]]:
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for batch in batches for row in batch["input_ids"]]


TEXT_USES: dict[str, Use] = {
    "train": lambda data: train(tiny_model(), examples(data), SETTINGS),
    "evaluate": lambda data: evaluate(tiny_model(), data),
    "divergence": lambda data: evaluate_divergence(tiny_model(), tiny_model(seed=3), data),
    "probes": lambda data: train_probes(tiny_model(), data),
    "score": lambda data: score_stitches(tiny_model(seed=1), tiny_model(large=True, seed=2), data),
    "calibration": lambda data: StitchedModel.from_anchors(
        tiny_model(), tiny_model(large=True), (2, 2), calibration=data
    ),
}


@pytest.mark.parametrize("use", TEXT_USES.values(), ids=TEXT_USES.keys())
@pytest.mark.filterwarnings("ignore:.*rows")
def test_token_ids_that_the_model_does_not_know(use: Use) -> None:
    expected = rf"vocabulary of {VOCABULARY}; expected ids from 0 to {VOCABULARY - 1}: use the tokenizer"
    for wrong in (VOCABULARY, -7):
        with pytest.raises(ValueError, match=f"token id {wrong} for a model with a {expected}"):
            use(text(wrong))
    with pytest.raises(TypeError, match="expected whole numbers"):
        use(text(3.0))
    use(text(VOCABULARY - 1, 0))


def test_unknown_labels_of_text_are_refused_before_training() -> None:
    for wrong in (VOCABULARY, -7):
        data = examples(text())
        data[5]["labels"][2] = wrong
        with pytest.raises(ValueError, match=f"token id {wrong} for a model"):
            train(tiny_model(), data, SETTINGS)
    data[5] = {"input_ids": torch.tensor([4, 5]), "labels": torch.tensor([-100, 5])}
    train(tiny_model(), data, SETTINGS)


def pictures(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    data = ToyImages(30, floats=True)
    return [
        {"pixel_values": pixels, "labels": labels.to(dtype)}
        for pixels, labels in zip(data.images.split(5), torch.tensor(data.labels).split(5), strict=True)
    ]


IMAGE_USES: dict[str, Use] = {
    "evaluate": lambda data: evaluate(tiny_vit(), data),
    "probes": lambda data: train_probes(tiny_vit(), data, ImageProbeConfig(epochs=1)),
    "score": lambda data: score_stitches(tiny_vit(1), tiny_vit(2, num_hidden_layers=3), data),
    "calibration": lambda data: StitchedModel.from_anchors(tiny_vit(1), tiny_vit(2), (1, 1), calibration=data),
}


@pytest.mark.parametrize("use", IMAGE_USES.values(), ids=IMAGE_USES.keys())
@pytest.mark.filterwarnings("ignore:.*rows")
def test_labels_that_are_no_whole_numbers(use: Use) -> None:
    with pytest.raises(TypeError, match=r"labels of torch\.float32; expected whole numbers, of classes: labels\.long"):
        use(pictures(torch.float32))
    use(pictures(torch.int32))


@pytest.mark.parametrize("half", [0.5, 1.0, torch.tensor(1.0)])
def test_images_to_train_on_whose_labels_are_no_whole_numbers(half: Any) -> None:
    data = ToyImages()
    data.labels[7] = half
    with pytest.raises(TypeError, match=r"label of (float|torch\.float32).*expected whole numbers"):
        train(tiny_vit(), data, SETTINGS)
    data.labels[7] = torch.tensor(1)
    train(tiny_vit(), data, SETTINGS)
