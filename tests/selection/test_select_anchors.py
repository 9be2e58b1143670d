"""Choosing anchors: the matrix is that of the models' own logits, and each rule chooses what it says."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_images import Batch, joined, labelled
from tiny_vision import embedding, tiny_classifier
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedModel

from klas_hf import measure_costs, select_anchors


def three() -> list[PreTrainedModel]:
    """ViTs, the cheapest first."""
    sizes = [(16, 2, 2), (24, 3, 3), (32, 4, 4)]
    return [
        tiny_classifier("vit", seed=seed, hidden_size=width, num_attention_heads=heads, num_hidden_layers=depth)
        for seed, (width, heads, depth) in enumerate(sizes)
    ]


@torch.no_grad()
def naive(models: list[PreTrainedModel], data: list[Batch]) -> np.ndarray:
    pixels = joined(data)[0].double()
    outputs = [Categorical(logits=model(pixels).logits) for model in models]
    return np.array([[float(kl_divergence(one, other).mean()) for other in outputs] for one in outputs])


@pytest.mark.parametrize("kind", ["vit", "levit_teacher", "swin"])
def test_divergences_are_those_of_the_models_own_logits(kind: str) -> None:
    models = [tiny_classifier(kind, large=large, seed=seed) for seed, large in enumerate((False, True, True))]
    data = [*labelled(kind, 2, 8), *labelled(kind, 1, 3, seed=1)]  # batches of unequal size
    got = select_anchors(models[:2], data)
    np.testing.assert_allclose(got.divergence, naive(models[:2], data), rtol=1e-4, atol=1e-6)
    assert got.macs == tuple(measure_costs(model).macs for model in models[:2])
    assert got.pairs == ((0, 1),) and got.rule == "least_kl"
    # In any order: the cheaper one is the source. Labels are not needed, an iterator will do.
    turned = select_anchors(models[1::-1], iter([batch["pixel_values"] for batch in data]))
    assert turned.pairs == ((1, 0),)
    np.testing.assert_allclose(turned.divergence, got.divergence[::-1, ::-1])


@pytest.mark.parametrize(
    ("sharpness", "least"),
    [
        ((0.0, 2.0, 4.0), ((0, 1), (1, 2))),  # the middle anchor lies between the others
        ((0.0, 9.0, 0.1), ((0, 2),)),  # it is far from both
    ],
)
def test_the_rules_choose_by_divergence_or_by_cost(
    sharpness: tuple[float, ...], least: tuple[tuple[int, int], ...]
) -> None:
    models, data = three(), labelled("vit", 1, 4)
    with torch.no_grad():
        for model, scale in zip(models, sharpness, strict=True):
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(scale * torch.arange(5.0))
    matrix = naive(models, data)
    assert (matrix[0, 1] + matrix[1, 2] < matrix[0, 2]) == (len(least) == 2)
    assert select_anchors(models, data).pairs == least
    assert select_anchors(models, data, rule="nearest").pairs == ((0, 1), (1, 2))
    assert set(select_anchors(models, data, rule="all").pairs) == {(0, 1), (0, 2), (1, 2)}


def test_anchors_are_told_apart_by_name(tmp_path: Path) -> None:
    models, data = three(), labelled("vit", 1, 4)
    models[2].save_pretrained(tmp_path / "dear")
    names = select_anchors([*models[:2], tmp_path / "dear"], data).names
    assert names[2] == str(tmp_path / "dear")
    assert len(set(names)) == 3 and all(name.startswith("ViTForImageClassification") for name in names[:2])


def test_costs_are_for_the_images_compared() -> None:
    models = [tiny_classifier("resnet", large=large) for large in (False, True)]
    got = select_anchors(models, [torch.randn(2, 3, 64, 32)])
    assert got.macs == tuple(measure_costs(model, image_size=(64, 32)).macs for model in models)


def test_what_cannot_be_compared_is_refused_before_an_anchor_runs() -> None:
    models, data = three(), labelled("vit", 1, 4)
    seen: list[int] = []
    for model in models:
        embedding(model).register_forward_hook(lambda module, args, output: seen.append(1))
    other = tiny_classifier("vit", large=True, num_labels=7)
    for anchors, images, options, message in (
        (models[:1], data, {}, "got 1 anchors; expected at least 2"),
        ([models[0], models[1], copy.deepcopy(models[0])], data, {}, "twice .*expected different anchors"),
        ([models[0], other], data, {}, "got anchors of 5 and 7 classes"),
        (models, [], {}, "got no images to compare anchors on"),
        (models, data, {"rule": "best"}, "got rule='best'; expected one of"),
        ([models[0], tiny_classifier("vit", seed=7)], data, {}, "got anchors that all cost"),
    ):
        with pytest.raises(ValueError, match=message):
            select_anchors(anchors, images, **options)
    assert not seen


def test_outputs_that_are_not_finite_are_refused() -> None:
    models = three()
    with torch.no_grad():
        models[1].classifier.bias[0] = torch.nan
    with pytest.raises(ValueError, match="got divergences that are NaN or infinite"):
        select_anchors(models, labelled("vit", 1, 4))
