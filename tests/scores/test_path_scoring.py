"""Functional KL of paths: against the models that `from_path` makes, run by themselves."""

import pytest
import torch
from tiny_models import left_padded, tiny_model, token_ids
from tiny_vision import images, sample_paths, sized, tiny_classifier, tiny_pair
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from klas_hf import Path, StitchedModel
from klas_hf.anchors.images import ImageBatch
from klas_hf.anchors.language import LanguageAnchor
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.scores.paths import PathScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")
RIDGE = 1e-4
TEXT = [
    "1[:1] 1[3:]",
    "0[:2] 1[2:]",
    "1[:1] 0[1:2] 1[2:]",
    "1[:1] 1[2:3] 1[4:]",
    "0[:2] 1[5:]",
    "0[:1] 0[2:]",
    "0[:]",
    "1[:]",
]


def text_batches(anchor: LanguageAnchor) -> tuple[list, list]:
    parts = [left_padded(token_ids(12, 12, seed=seed), [12, 7, 10] * 4) for seed in range(4)]
    batches = list(anchor.read(parts))
    return batches[:2], batches[2:]


def divergences(model: torch.nn.Module, dearest: torch.nn.Module, batches: list, temperature: float) -> list[Tensor]:
    """Naively: one tensor per sequence."""
    found = []
    for batch in batches:
        with torch.no_grad():
            p, q = (Categorical(logits=one(**batch.inputs).logits.double() / temperature) for one in (dearest, model))
        every = kl_divergence(p, q)
        found += [every[n][batch.counted[n]] for n in range(len(batch))] if every.ndim == 2 else list(every[:, None])
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_of_text_are_those_of_the_models_alone(family: str, temperature: float) -> None:
    models = [tiny_model(family, seed=1), tiny_model(family, large=True, seed=2)]
    anchors = [LanguageAnchor(model) for model in models]
    calibration, scored = text_batches(anchors[1])
    scorer = PathScorer(anchors, 1, calibration, scored, temperature=temperature, ridge=RIDGE)
    paths = [Path.parse(text) for text in TEXT]
    found = scorer.score(paths)
    for path, score in zip(paths, found, strict=True):
        model = StitchedModel.from_path(models, path, calibration=[batch.inputs for batch in calibration], ridge=RIDGE)
        terms = divergences(model, models[1], scored, temperature)
        assert score.divergence == pytest.approx(float(torch.cat(terms).mean()), rel=2e-3, abs=1e-7)
        assert score.items == 24
    assert found[-1].divergence == 0
    few = scorer.score(paths[:2], batches=1)
    assert few[0].items == 12 and few[0].divergence != found[0].divergence


@pytest.mark.parametrize("kind", ["vit", "swin", "resnet", "mobilenet_v1"])
def test_divergences_of_images_are_those_of_the_models_alone(kind: str) -> None:
    models = tiny_pair(kind)
    anchors = [VisionAnchor(model) for model in models]
    calibration, scored = ([ImageBatch(images(kind, 8, seed=seed)) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    paths = sample_paths(models, images(kind))
    found = PathScorer(anchors, 1, calibration, scored, ridge=RIDGE).score(paths)
    for path, score in zip(paths, found, strict=True):
        options = {"calibration": calibration, "ridge": RIDGE} if path.joints else {}
        model = StitchedModel.from_path(models, path, **options, **sized(kind))
        expected = torch.cat(divergences(model, models[1], scored, 1.0))
        assert score.divergence == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-6)
        assert score.error == pytest.approx(float(expected.std() / len(expected) ** 0.5), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("allowed", [{"moment_bytes": 1}, {"workspace_bytes": 1}, {"workspace_bytes": 60_000}])
def test_the_memory_allowed_changes_nothing(allowed: dict[str, int]) -> None:
    anchors = [LanguageAnchor(tiny_model(seed=1)), LanguageAnchor(tiny_model(large=True, seed=2))]
    calibration, scored = text_batches(anchors[1])
    paths = [Path.parse(text) for text in TEXT]
    whole = PathScorer(anchors, 1, calibration, scored).score(paths)
    lean = PathScorer(anchors, 1, calibration, scored, **allowed)
    for one, other in zip(lean.score(paths), whole, strict=True):
        assert one.divergence == pytest.approx(other.divergence, rel=1e-4, abs=1e-7)


def test_weights_that_are_not_finite_are_told() -> None:
    model = tiny_classifier("vit")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    batch = ImageBatch(images("vit", 8))
    with pytest.raises(ValueError, match="NaN or infinite"):
        PathScorer([VisionAnchor(model)], 0, [batch], [batch]).score([Path.parse("0[:1] 0[2:]")])


MERGED = ["0[:1] 0[2:]", "1[:1] 1[3:]", "1[:1] 1[2:3] 1[4:]", "1[:2] 1[5:]", "1[:1] 1[2:]", "1[:2] 1[3:]"]


@pytest.mark.parametrize("families", [("llama",) * 2, ("gpt_neox",) * 2, ("gpt_neox", "llama")])  # with a bias, without
def test_merged_joints_are_those_of_the_models_and_stand_beside_layers(families: tuple[str, str]) -> None:
    models = [
        tiny_model(families[0], seed=1, intermediate_size=64),
        tiny_model(families[1], large=True, seed=2, intermediate_size=96),
    ]
    for parameter in models[0].parameters():  # biases start at zero
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    anchors = [LanguageAnchor(model) for model in models]
    calibration, scored = text_batches(anchors[1])
    scorer = PathScorer(
        anchors, 1, calibration, scored, ridge=RIDGE, merged=lambda path: path.joints > 0 and len(path.anchors) == 1
    )
    paths = [Path.parse(text) for text in [*MERGED, *TEXT]]
    paths = list(dict.fromkeys(paths))
    found = scorer.score(paths)
    for path, score in zip(paths, found, strict=True):
        joint = "merged" if path.joints and len(path.anchors) == 1 else "least_squares"
        given = [batch.inputs for batch in calibration]
        model = StitchedModel.from_path(models, path, calibration=given, ridge=RIDGE, joint=joint)
        terms = divergences(model, models[1], scored, 1.0)
        assert score.divergence == pytest.approx(float(torch.cat(terms).mean()), rel=2e-3, abs=1e-7), path
    assert scorer.score(paths[:2]) == found[:2]


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_merged_joints_of_images_are_those_of_the_models(kind: str) -> None:
    models = tiny_pair(kind)
    anchors = [VisionAnchor(model) for model in models]
    calibration, scored = ([ImageBatch(images(kind, 8, seed=seed)) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    alone = [path for path in sample_paths(models, images(kind)) if len(path.anchors) == 1 and path.joints]
    found = PathScorer(anchors, 1, calibration, scored, ridge=RIDGE, merged=lambda _: True).score(alone)
    assert alone
    for path, score in zip(alone, found, strict=True):
        options = {"calibration": calibration, "ridge": RIDGE, "joint": "merged"}
        model = StitchedModel.from_path(models, path, **options, **sized(kind))
        terms = divergences(model, models[1], scored, 1.0)
        assert score.divergence == pytest.approx(float(torch.cat(terms).mean()), rel=2e-3, abs=1e-7), path
