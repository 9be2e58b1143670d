"""Images that know their classes are refused by models of other classes, until somebody says which is which."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from image_examples import tiny_vit
from transformers import PreTrainedModel

from klas_hf import ImageProbeConfig, TrainingConfig, evaluate, train_probes, train_stitches
from klas_hf.data.images import ImageBatches, ImageSet, map_labels, subset
from klas_hf.evaluation import predict_probabilities

NAMES = ("cat", "dog", "eel")
SETTINGS = TrainingConfig(trainable="full", max_steps=1, mean=(0.5,) * 3, std=(0.25,) * 3)


def images(names: tuple[str, ...] = NAMES) -> ImageSet:
    pixels = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, [n % len(names) for n in range(30)], names)


def model(*labels: str) -> PreTrainedModel:
    named = tiny_vit(classes=len(labels))
    named.config.id2label = dict(enumerate(labels))
    return named


def batches(of: ImageSet) -> ImageBatches:
    return ImageBatches(of, 4, (0.5,) * 3, (0.25,) * 3, seed=0)


def train(of: PreTrainedModel, data: ImageSet) -> Any:
    return train_stitches(of, data, SETTINGS)


def measure(of: PreTrainedModel, data: ImageSet) -> Any:
    return evaluate(of, batches(data))


def predict(of: PreTrainedModel, data: ImageSet) -> Any:
    return predict_probabilities(of, batches(data))


def probe(of: PreTrainedModel, data: ImageSet) -> Any:
    return train_probes(of, batches(data), ImageProbeConfig(epochs=1))


def stop_early(of: PreTrainedModel, data: ImageSet) -> Any:
    unnamed = list(batches(map_labels(data, dict(zip(data.names, range(3), strict=True)))))
    return train_probes(of, unnamed, ImageProbeConfig(epochs=1), validation=batches(data))


@pytest.mark.parametrize("use", [train, measure, predict, probe, stop_early])
def test_other_classes_are_refused_with_the_remedy(use: Callable[[PreTrainedModel, ImageSet], Any]) -> None:
    with pytest.raises(
        ValueError, match=r"images of 3 classes for a model of 4; .*map_labels\(images, model\.config\)"
    ):
        use(model("background", "cat", "dog", "eel"), images())
    with pytest.raises(ValueError, match=r"in 2 of 3 places, class 1 'dog' and 'eel'; .*map_labels"):
        use(model("cat", "eel", "dog"), subset(images(), count=24))
    with pytest.raises(ValueError, match=r"in 1 of 3 places, class 0 'n01440764' and 'n01443537 goldfish'"):
        use(model("n01443537 goldfish", "dog", "eel"), images(("n01440764", "dog", "eel")))
    mapped = map_labels(images(), {"cat": 0, "dog": 2, "eel": 7})
    with pytest.raises(ValueError, match=r"mapped to the labels \[7\] for a model of 3 classes; .*map_labels"):
        use(model(*NAMES), mapped)


@pytest.mark.parametrize("use", [train, measure, predict, probe])
def test_the_same_classes_and_mapped_ones_are_taken(use: Callable[[PreTrainedModel, ImageSet], Any]) -> None:
    use(model("cat, Felis catus", "Dog", "LABEL_2"), images())
    use(model("zero", "one", "two"), images(("0", "1", "2")))
    use(model("tench", "goldfish", "n01484850 great white"), images(("n01440764", "n01443537", "n01484850")))
    wide = model("background", "eel, Anguilla", "cat", "dog")
    use(wide, subset(map_labels(images(), wide.config), count=24))


def test_a_configuration_maps_as_its_labels_by_name() -> None:
    config = model("background", "eel, Anguilla", "cat", "dog").config
    mapped = map_labels(images(), config)
    assert mapped.ids == (2, 3, 1) and mapped.labels == [(2, 3, 1)[n % 3] for n in range(30)]
    with pytest.raises(ValueError, match=r"fit none .*'eel' \(none\)"):
        map_labels(images(), model("cat", "dog", "emu").config)
