"""Scores and search on dense anchors, against the stitched models that they foretell."""

import numpy as np
import pytest
import torch
from tiny_dense import CLASSES, dense_images, head_config, tiny_backbone, tiny_dense, tiny_dense_pair
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from klas_hf import FunctionalScoring, Path, SearchConfig, Stitch, StitchedModel, score_stitches, train_probes
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.evaluation.segmentation import segmentation_scores
from klas_hf.maths.least_squares import RIDGE
from klas_hf.scores.paths import PathScorer
from klas_hf.selection.plan import GROUP, SearchPlan

DATA = dense_images(6)
FITTED, SCORED = DATA[:4], DATA[4:]
SPLIT = FunctionalScoring(temperature=1.0)


def log_probabilities(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    return segmentation_scores(model, pixels, (16, 16)).log_softmax(1)


def divergence(reference: PreTrainedModel, model: PreTrainedModel, data: list[dict[str, Tensor]]) -> float:
    """Mean KL(reference ‖ model) per pixel, at a quarter of the images' size."""
    found = []
    for batch in data:
        p, q = (log_probabilities(one, batch["pixel_values"]) for one in (reference, model))
        found.append((p.exp() * (p - q)).sum(1).mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize(
    ("head", "kinds", "paths"),
    [
        pytest.param("mask2former", ("swin", "swin"), ["0[:2] 1[3:]", "1[:3] 1[4:]", "0[:]"], marks=pytest.mark.slow),
        ("upernet", ("resnet", "swin"), ["0[:4] 1[5:]", "1[:1] 1[2:]"]),
    ],
)
def test_paths_score_as_their_models_answer(head: str, kinds: tuple[str, str], paths: list[str]) -> None:
    anchors = tiny_dense_pair(head, *kinds)
    loaded = [VisionAnchor(anchor) for anchor in anchors]
    calibration, scored = (list(loaded[1].read(data)) for data in (FITTED, SCORED))
    found = PathScorer(loaded, 1, calibration, scored).score([Path.parse(path) for path in paths])
    for path, score in zip(paths, found, strict=True):
        model = StitchedModel.from_path(anchors, path, calibration=FITTED, calibration_items=99, ridge=RIDGE)
        assert score.divergence == pytest.approx(divergence(anchors[1], model, SCORED), rel=2e-3, abs=1e-7)
        assert score.items == 8


@pytest.mark.slow
def test_functional_kl_of_stitches_is_that_of_their_models() -> None:
    anchors = tiny_dense_pair("upernet")
    stitches = [Stitch(2, 3), Stitch(3, 3)]  # they run together, for they enter the target at one block
    settings = FunctionalScoring(calibration=FITTED, temperature=1.0, ridge=RIDGE, candidates=stitches)
    scores = score_stitches(*anchors, SCORED, functional=settings)
    for stitch in stitches:
        model = StitchedModel.from_path(anchors, stitch, calibration=FITTED, calibration_items=99, ridge=RIDGE)
        assert scores.value_of(stitch) == pytest.approx(divergence(anchors[1], model, SCORED), rel=2e-3)
    picked, known = [], []
    for batch in SCORED:
        masks = batch["labels"][:, ::4, ::4]
        log_p = log_probabilities(model, batch["pixel_values"]).movedim(1, -1)
        kept = masks != 255
        picked.append(-log_p[kept].gather(1, masks[kept][:, None]))
        known.append(kept.sum())
    loss = float(torch.cat(picked).sum() / sum(known))
    assert scores.statistics["stitched_loss"][2, 2] == pytest.approx(loss, rel=1e-3)


def test_pooled_probes_learn_the_classes_shares() -> None:
    anchor = VisionAnchor(tiny_dense("upernet"))
    masks = DATA[0]["labels"]
    shares = anchor.image_labels(masks)
    for mask, share in zip(masks.numpy(), shares.numpy(), strict=True):
        counts = np.bincount(mask[mask != 255], minlength=CLASSES)
        np.testing.assert_allclose(share, counts / counts.sum(), rtol=1e-6)
    with pytest.raises(ValueError, match="expected masks"):
        anchor.image_labels(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="or without one"):
        anchor.image_labels(torch.full((1, 4, 4), 255))


@pytest.mark.slow
def test_probes_of_dense_anchors_give_gamma_over_images() -> None:
    probes = [train_probes(one, FITTED, validation=SCORED) for one in tiny_dense_pair("upernet")]
    assert all(loss <= np.log(CLASSES) + 0.05 for probe in probes for loss in probe.config.validation_loss)
    scores = score_stitches(*tiny_dense_pair("upernet"), SCORED, probes=probes, score="klas")
    assert scores.sequences == 8  # images, not pixels
    assert np.isfinite(scores.with_score("klas").value_of(Stitch(2, 3)))


@pytest.mark.slow
def test_search_finds_paths_within_a_budget() -> None:
    search = SearchConfig(buckets=2, joints=1, forwards=1000, cheapest=0.5)  # heads count too
    model = StitchedModel.from_anchors(*tiny_dense_pair("upernet"), budget="85%", calibration=DATA, search=search)
    about = model.config.backbone_config.search
    assert 0.5 <= about["share"] <= 0.85
    assert about["budget"] == "85%"
    assert about["paths"] > 2


def test_runs_of_the_head_are_foretold() -> None:
    """Its MACs, counted by torch in the anchor itself, in those of a block; and one run of it for every path scored."""
    pair = tiny_dense_pair("upernet", "resnet")
    plan = SearchPlan([VisionAnchor(one) for one in pair], DATA, SearchConfig(buckets=2, scoring=SPLIT), 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pair[1](DATA[0]["pixel_values"][:1])
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    heads = [counts[f"UperNetForSemanticSegmentation.{name}"] for name in ("decode_head", "auxiliary_head")]
    blocks = [count for name, count in counts.items() if name.rpartition(".")[0].endswith(".layers")]
    assert len(blocks) == 7
    assert plan.head == pytest.approx(7 * sum(heads) / sum(blocks), abs=0.6) and plan.head > 3
    scored = sum(map(len, plan.scored))
    path, paid = Path.parse("0[:2] 1[3:]"), 4  # blocks of the target behind the stitch
    whole = 12 * (scored + sum(map(len, plan.calibration))) + plan.head * scored
    assert plan.price(path, None) == scored * (paid + plan.head) + whole // GROUP


def test_an_anchor_without_a_stride_that_the_head_takes_is_named() -> None:
    coarse = type(tiny_dense("upernet"))(
        head_config("upernet", backbone_config=tiny_backbone("convnext", patch_size=8))
    )
    anchor, calibration = VisionAnchor(tiny_dense("upernet")), []
    with pytest.raises(ValueError, match="without a map of stride 4, which the head"):
        anchor.meet([VisionAnchor(coarse)], calibration)


def test_the_anchor_is_read_as_it_is() -> None:
    for head in ("mask2former", "upernet"):
        model = tiny_dense(head)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        anchor = VisionAnchor(model)
        (batch,) = anchor.read(DATA[:1])
        found = anchor.answers(anchor.states(batch)[-1], batch)
        wanted = segmentation_scores(model, batch.pixel_values, (16, 16)).movedim(1, -1).flatten(0, 2)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert len(batch.unit_items) == len(found) == 4 * 16 * 16
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
