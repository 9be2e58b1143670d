"""Scores of stitches between image classifiers: every statistic is what a loop over images and pairs gives."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_images import Batch, joined, labelled, pooled, split
from tiny_models import tiny_model
from tiny_vision import CLASSES, SIDE, as_rows, embedding, grid, outputs, possible, tiny_classifier, tiny_pair
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedModel

from klas_hf import (
    ImageProbeConfig,
    ImageProbeNet,
    ImageScoring,
    Stitch,
    StitchScores,
    measure_stitch_costs,
    score_stitches,
)
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.scores.values import NEEDED, SCORES, STITCHED

PAIRS = [("vit", "vit"), ("swin", "swin"), ("resnet", "resnet"), ("deit_teacher", "swin"), ("resnet", "swin")]
PROBED = tuple(name for name in SCORES if set(NEEDED[name]).isdisjoint(STITCHED))
Probes = tuple[ImageProbeNet, ImageProbeNet]
Pair = tuple[PreTrainedModel, PreTrainedModel]


def random_probes(model: PreTrainedModel, seed: int = 0) -> ImageProbeNet:
    """Probes that are not trained, but marked as this model's."""
    anchor = VisionAnchor(model)
    probes = ImageProbeNet(
        ImageProbeConfig(
            widths=[shape.channels for shape in anchor.shapes()[1:]],
            num_labels=model.config.num_labels,
            anchor_name=anchor.name,
            anchor_fingerprint=anchor.fingerprint,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in probes.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return probes


def probes_of(pair: Pair, seed: int = 0) -> Probes:
    return random_probes(pair[0], seed + 1), random_probes(pair[1], seed + 2)


@pytest.fixture(scope="module")
def vits() -> Pair:
    return tiny_pair("vit")


@pytest.fixture(scope="module")
def vit_probes(vits: Pair) -> Probes:
    return probes_of(vits)


@torch.no_grad()
def distributions(model: PreTrainedModel, probes: ImageProbeNet, batches: list[Batch]) -> list[Categorical]:
    """Of each block, the distributions of all images, in float64."""
    return [
        Categorical(logits=x.double() @ probe.weight.double().T + probe.bias.double())
        for x, probe in zip(pooled(model, joined(batches)[0]), probes.probes, strict=True)
    ]


class Naive:
    """Alg. 2 one pair of blocks and one image at a time, in float64."""

    def __init__(self, pair: Pair, probes: Probes, batches: list[Batch]):
        p, q = (distributions(model, probe, batches) for model, probe in zip(pair, probes, strict=True))
        cross = np.array([[kl_divergence(one, other).numpy() for other in q] for one in p])
        capacity = np.array([kl_divergence(q[j], q[j + 1]).numpy() for j in range(len(q) - 1)])
        self.images = cross.shape[-1]
        self.cross, self.capacity = cross.mean(-1), capacity.mean(-1)
        self.cross_error, self.capacity_error = (x.std(-1, ddof=1) / self.images**0.5 for x in (cross, capacity))
        self.gamma = self.cross[:, :-1] / self.capacity
        left = cross[:, :-1] - self.gamma[..., None] * capacity  # linearised: what the ratio does not explain
        variance = (left**2).sum(-1) * self.images / (self.images - 1)
        self.gamma_error = np.sqrt(variance) / capacity.sum(-1)
        self.theta_reversed = np.array([[kl_divergence(other, one).mean() for other in q] for one in p])
        self.mse = np.array([[((one.probs - other.probs) ** 2).mean() for other in q] for one in p])
        self.ce = np.array([[-(one.probs * other.logits).sum(-1).mean() for other in q] for one in p])


def block_rows(pair: Pair, batches: list[Batch]) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Rows of every block as a stitching layer sees them, and which pairs lie on equal grids."""
    pixels = joined(batches)[0].double()
    found = [outputs(model, pixels)[0][1:] for model in pair]
    bare = [model.config.model_type not in ("vit", "deit") for model in pair]
    rows = [
        [as_rows(model, hidden, bare=bare[1]).flatten(0, 1).numpy() for hidden in of_blocks]
        for model, of_blocks in zip(pair, found, strict=True)
    ]
    grids = [[grid(model, hidden) for hidden in of_blocks] for model, of_blocks in zip(pair, found, strict=True)]
    return rows[0], rows[1], np.array([[one == other for other in grids[1]] for one in grids[0]])


def naive_dm(x: np.ndarray, y: np.ndarray) -> float:
    x = np.c_[x, np.ones(len(x))]
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return (residual**2).sum() / ((y - y.mean(0)) ** 2).sum()


def naive_cka(x: np.ndarray, y: np.ndarray) -> float:
    """From the n × n Gram matrices of centred rows (Kornblith et al., Eq. 3 and 4)."""
    k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def naive_class_cka(x: np.ndarray, y: np.ndarray, labels: np.ndarray) -> float:
    classes = [number for number in range(CLASSES) if (labels == number).sum() > 1]
    return float(np.mean([naive_cka(x[labels == number], y[labels == number]) for number in classes]))


def over(mask: np.ndarray, function: Any, xs: list[np.ndarray], ys: list[np.ndarray]) -> np.ndarray:
    values = np.full(mask.shape, np.nan)
    for i, j in np.argwhere(mask):
        values[i, j] = function(xs[i], ys[j])
    return values


def assert_equal_scores(got: StitchScores, expected: StitchScores, rtol: float = 1e-5) -> None:
    for name in ("cross", "capacity", "cross_error", "capacity_error", "gamma_error"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=rtol, atol=1e-7, err_msg=name)
    assert got.statistics.keys() == expected.statistics.keys()
    for name, statistic in got.statistics.items():
        np.testing.assert_allclose(statistic, expected.statistics[name], rtol=rtol, atol=1e-7, err_msg=name)
    assert (got.sequences, got.tokens, got.score) == (expected.sequences, expected.tokens, expected.score)


def forwards(model: PreTrainedModel) -> list[int]:
    seen: list[int] = []
    embedding(model).register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_divergences_and_their_errors_are_those_of_the_naive_loop(source: str, target: str) -> None:
    pair, data = tiny_pair(source, target), labelled(target, 3, 8)
    probes, other = probes_of(pair), probes_of(pair, 10)
    got = score_stitches(*pair, data, probes=probes, images=ImageScoring(shuffled=other), score="klas")
    expected, shuffled = Naive(pair, probes, data), Naive(pair, other, data)
    assert (got.sequences, got.tokens, got.score) == (24, 24, "klas")
    for name in ("cross", "capacity", "gamma", "cross_error", "capacity_error", "gamma_error"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=2e-4, atol=2e-6, err_msg=name)
    for name in ("theta_reversed", "mse", "ce"):
        np.testing.assert_allclose(got.statistics[name], getattr(expected, name), rtol=2e-4, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(got.statistics["cross_shuffled"], shuffled.cross, rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(got.statistics["capacity_shuffled"], shuffled.capacity, rtol=2e-4, atol=2e-6)
    assert got.available == PROBED


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_measures_on_features_are_those_of_the_naive_loop(source: str, target: str) -> None:
    pair, data = tiny_pair(source, target), labelled(target, 2, 5)
    got = score_stitches(*pair, data, probes=probes_of(pair), score="klas").statistics
    xs, ys, equal = block_rows(pair, data)
    np.testing.assert_allclose(got["dm"], over(equal, naive_dm, xs, ys), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got["cka"], over(equal, naive_cka, xs, ys), rtol=1e-6)
    pixels, labels = joined(data)
    xs, ys = ([x.numpy() for x in pooled(model, pixels)] for model in pair)
    expected = over(equal, lambda x, y: naive_class_cka(x, y, labels.numpy()), xs, ys)
    np.testing.assert_allclose(got["class_cka"], expected, rtol=1e-4)
    assert not equal.all() or source == target == "vit" or source == "deit_teacher"


@pytest.mark.parametrize(("source", "target"), [*PAIRS, ("swin", "resnet")])
def test_only_stitches_between_equal_grids_have_a_value(source: str, target: str) -> None:
    pair, data = tiny_pair(source, target), labelled(target, 1, 8)
    scores = score_stitches(
        *pair, data, probes=probes_of(pair), images=ImageScoring(shuffled=probes_of(pair, 4)), score="klas"
    )
    can = possible(*pair, data[0]["pixel_values"].double())
    naive = Naive(pair, probes_of(pair), data)
    rows = {"klas": naive.gamma, "theta": naive.cross, "ce": naive.ce}
    for name in PROBED:
        values = scores.with_score(name).values
        finite = {(int(i) + 1, int(j)) for i, j in np.argwhere(np.isfinite(values))}
        assert finite == {(i, j) for i, j in can if j > 0}
        assert {(s.source_stop, s.target_start) for s in scores.with_score(name).stitches} == finite
        for i, j in finite if name in rows else ():
            assert values[i - 1, j] == pytest.approx(rows[name][i - 1, j - 1], rel=1e-3)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_the_split_into_batches_changes_nothing(vits: Pair, vit_probes: Probes, size: int) -> None:
    data = labelled("vit", 3, 8)
    settings = ImageScoring(shuffled=probes_of(vits, 7), moment_images=14)  # amid a batch
    expected = score_stitches(*vits, data, probes=vit_probes, images=settings, score="klas")
    got = score_stitches(*vits, iter(split(data, size)), probes=vit_probes, images=settings, score="klas")
    assert_equal_scores(got, expected)


def test_each_anchor_runs_once_over_each_batch() -> None:
    pair = tiny_pair("vit")
    probes, seen = probes_of(pair), [forwards(model) for model in pair]
    score_stitches(*pair, labelled("vit", 3, 8), probes=probes, images=ImageScoring(shuffled=probes), score="klas")
    assert seen == [[8, 8, 8], [8, 8, 8]]


@pytest.mark.parametrize("count", [10, 16, 24, 1000])
def test_moments_are_taken_on_the_first_images(vits: Pair, vit_probes: Probes, count: int) -> None:
    data = labelled("vit", 3, 8)
    got = score_stitches(
        *vits, data, probes=vit_probes, images=ImageScoring(moment_images=count), score="klas"
    ).statistics
    xs, ys, equal = block_rows(vits, split(data, min(count, 24))[:1])
    np.testing.assert_allclose(got["cka"], over(equal, naive_cka, xs, ys), rtol=1e-6)
    np.testing.assert_allclose(got["dm"], over(equal, naive_dm, xs, ys), rtol=1e-3, atol=1e-5)


def test_without_moments_what_rests_on_features_is_missing(vits: Pair, vit_probes: Probes) -> None:
    data, without = labelled("vit", 2, 8), ImageScoring(moment_images=0)
    scores = score_stitches(*vits, data, probes=vit_probes, images=without, score="klas")
    assert set(PROBED) - set(scores.available) == {"cka", "dm", "class_cka", "klas_shuffled"}
    with pytest.raises(ValueError, match="got score='cka'; expected one of .*Gather them when scoring"):
        scores.with_score("cka")
    for score in ("cka", "dm", "class_cka", "klas_shuffled"):
        with pytest.raises(ValueError, match=f"got score='{score}'"):
            score_stitches(*vits, data, probes=vit_probes, score=score, images=without)


def test_what_cannot_be_scored_is_refused_before_an_anchor_runs() -> None:
    pair = tiny_pair("vit")
    probes, data, seen = probes_of(pair), labelled("vit", 2, 8), [forwards(model) for model in pair]
    bare = [batch["pixel_values"] for batch in data]
    with pytest.raises(ValueError, match=r"got 6 pairs of blocks whose second moments take .*Raise moment_bytes"):
        score_stitches(*pair, data, probes=probes, images=ImageScoring(moment_bytes=1000), score="klas")
    with pytest.raises(ValueError, match="got score='class_cka'"):
        score_stitches(*pair, bare, probes=probes, score="class_cka")
    with pytest.raises(ValueError, match="got score='klas_shuffled'"):
        score_stitches(*pair, data, probes=probes, score="klas_shuffled")
    with pytest.raises(ValueError, match="got score='best'; expected one of"):
        score_stitches(*pair, data, probes=probes, score="best")
    with pytest.raises(ValueError, match="reversed; expected the cheaper anchor as the source"):
        score_stitches(*pair[::-1], data, probes=probes[::-1], score="klas")
    with pytest.raises(ValueError, match="got no probes for two image classifiers"):
        score_stitches(*pair, data, score="klas")
    with pytest.raises(ValueError, match="got no images to score on"):
        score_stitches(*pair, [], probes=probes, score="klas")
    with pytest.raises(ValueError, match="other weights; expected the model they were trained on"):
        score_stitches(*pair, data, probes=probes[::-1], score="klas")
    with pytest.raises(ValueError, match="other weights; expected the model they were trained on"):
        score_stitches(*pair, data, probes=probes, images=ImageScoring(shuffled=probes[::-1]), score="klas")
    assert seen == [[], []]


def test_the_bytes_allowed_are_those_that_the_moments_take(vits: Pair, vit_probes: Probes) -> None:
    # Gram matrices and sums of 2 blocks of 16 and 3 of 24 channels, and the products of the 6 pairs, in float64.
    needed = 8 * (2 * (16 * 16 + 2 * 16) + 3 * (24 * 24 + 2 * 24) + 6 * 16 * 24)
    data = labelled("vit", 1, 8)
    score_stitches(*vits, data, probes=vit_probes, images=ImageScoring(moment_bytes=needed), score="klas")
    with pytest.raises(ValueError, match="second moments"):
        score_stitches(*vits, data, probes=vit_probes, images=ImageScoring(moment_bytes=needed - 1), score="klas")


def test_without_labels_class_conditional_cka_is_missing(vits: Pair, vit_probes: Probes) -> None:
    data = labelled("vit", 2, 8)
    with_labels = score_stitches(*vits, data, probes=vit_probes, score="klas")
    scores = score_stitches(*vits, [batch["pixel_values"] for batch in data], probes=vit_probes, score="klas")
    assert "class_cka" in with_labels.available and "class_cka" not in scores.available
    np.testing.assert_array_equal(scores.cross, with_labels.cross)
    with pytest.raises(ValueError, match="class_cka"):
        scores.with_score("class_cka")
    with pytest.raises(ValueError, match="got a batch of images without 'labels'"):
        score_stitches(*vits, [data[0], {"pixel_values": data[1]["pixel_values"]}], probes=vit_probes, score="klas")


def test_images_of_one_per_class_leave_class_conditional_cka_out(vits: Pair, vit_probes: Probes) -> None:
    data = labelled("vit", 1, CLASSES)
    data[0]["labels"] = torch.arange(CLASSES)
    scores = score_stitches(*vits, data, probes=vit_probes, score="klas")
    assert "class_cka" not in scores.available and "cka" in scores.available
    with pytest.raises(ValueError, match="got score='class_cka'"):
        score_stitches(*vits, data, probes=vit_probes, score="class_cka")


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_out_of_range_are_refused(vits: Pair, vit_probes: Probes, label: int) -> None:
    data = labelled("vit", 2, 8)
    data[1]["labels"][3] = label
    with pytest.raises(ValueError, match="got labels from .*; expected 0 to 4"):
        score_stitches(*vits, data, probes=vit_probes, score="klas")


def test_anchors_of_other_classes_are_refused(vits: Pair, vit_probes: Probes) -> None:
    data, (_, target) = labelled("vit", 1, 8), vits
    with pytest.raises(ValueError, match="got anchors of 7 and 5 classes"):
        score_stitches(tiny_classifier("vit", seed=1, num_labels=7), target, data, probes=vit_probes, score="klas")
    renamed = copy.deepcopy(vits[0])
    renamed.config.id2label = renamed.config.id2label | {1: "wasp"}
    with pytest.raises(ValueError, match="name 1 classes differently, class 1 as 'wasp' and as 'bee'"):
        score_stitches(renamed, target, data, probes=vit_probes, score="klas")


def test_values_that_are_not_finite_are_refused(vits: Pair, vit_probes: Probes) -> None:
    data = labelled("vit", 2, 8)
    data[1]["pixel_values"][2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        score_stitches(*vits, data, probes=vit_probes, score="klas")
    broken = copy.deepcopy(vit_probes)
    with torch.no_grad():
        broken[1].probes[2].bias[0] = torch.nan
    with pytest.raises(ValueError, match="got probe distributions with NaN or infinite divergences"):
        score_stitches(*vits, labelled("vit", 1, 8), probes=broken, score="klas")


def test_images_that_an_anchor_does_not_take_are_refused(vits: Pair, vit_probes: Probes) -> None:
    with pytest.raises(ValueError, match=r"got images of \(64, 64\) pixels"):
        score_stitches(*vits, [torch.zeros(2, 3, 64, 64)], probes=vit_probes, score="klas")


@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_costs_are_for_the_images_that_were_scored(size: tuple[int, int]) -> None:
    pair = tiny_pair("resnet")
    scores = score_stitches(*pair, [torch.randn(4, 3, *size)], probes=probes_of(pair), positions=(1, 3), score="klas")
    expected = measure_stitch_costs(*pair, image_size=size, positions=(1, 3))
    np.testing.assert_array_equal(scores.costs.macs, expected.macs)
    np.testing.assert_array_equal(scores.costs.parameters, expected.parameters)
    assert (scores.costs.image_height, scores.costs.image_width) == size
    assert scores.stitches and all((stitch.source, stitch.target) == (1, 3) for stitch in scores.stitches)
    assert scores.value_of(Stitch(1, 1, 1, 3)) == scores.values[0, 1]


def test_the_score_ranks_and_changes_no_statistic(vits: Pair, vit_probes: Probes) -> None:
    data = labelled("vit", 2, 8)
    klas, dm = (score_stitches(*vits, data, probes=vit_probes, score=score) for score in ("klas", "dm"))
    assert dm.score == "dm"
    np.testing.assert_array_equal(dm.values[:, 1:], dm.statistics["dm"][:, :-1])
    np.testing.assert_array_equal(klas.with_score("dm").values, dm.values)
    np.testing.assert_array_equal(klas.with_score("cka").values[:, 1:], 1 - klas.statistics["cka"][:, :-1])


def test_anchors_are_left_as_they_were() -> None:
    pair, data = tiny_pair("resnet"), labelled("resnet", 2, 8)
    probes = probes_of(pair)
    expected = score_stitches(*pair, data, probes=probes, score="klas")
    weights = [copy.deepcopy(model.state_dict()) for model in pair]
    for model in pair:
        model.train()
        model.resnet.embedder.eval()
    modes = [[module.training for module in model.modules()] for model in pair]
    assert_equal_scores(score_stitches(*pair, data, probes=probes, score="klas"), expected, rtol=0)
    assert [[module.training for module in model.modules()] for model in pair] == modes
    for model, before in zip(pair, weights, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_folders_are_loaded_and_scores_saved(tmp_path: Path, vits: Pair) -> None:
    data = labelled("vit", 2, 8)
    for name, model in zip(("small", "large"), vits, strict=True):
        copy.deepcopy(model).float().save_pretrained(tmp_path / name)
    folders = str(tmp_path / "small"), tmp_path / "large"
    probes = probes_of(tuple(copy.deepcopy(model).float() for model in vits))
    scores = score_stitches(*folders, data, probes=probes, score="klas")
    assert_equal_scores(scores, score_stitches(*vits, data, probes=probes_of(vits), score="klas"), rtol=1e-2)
    assert [scores.provenance[side]["name"] for side in ("source", "target")] == [str(folder) for folder in folders]
    assert scores.provenance["source"]["fingerprint"] == probes[0].config.anchor_fingerprint
    again = StitchScores.load(scores.save(tmp_path / "scores.safetensors"))
    assert_equal_scores(again, scores, rtol=0)
    np.testing.assert_array_equal(again.values, scores.values)


def test_one_image_has_scores_but_no_errors(vits: Pair, vit_probes: Probes) -> None:
    scores = score_stitches(
        *vits, [torch.randn(1, 3, 32, 32)], probes=vit_probes, images=ImageScoring(moment_images=0), score="klas"
    )
    assert np.isfinite(scores.cross).all() and np.isnan(scores.cross_error).all()


def test_a_classifier_and_a_language_model_are_refused(vits: Pair, vit_probes: Probes) -> None:
    with pytest.raises(ValueError, match="anchors for images and for text"):
        score_stitches(vits[0], tiny_model(), labelled("vit", 1, 8), probes=vit_probes, score="klas")


def test_few_images_warn_of_nothing(vits: Pair, vit_probes: Probes) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        score_stitches(*vits, [torch.randn(1, 3, SIDE["vit"], SIDE["vit"])], probes=vit_probes, score="klas")
    assert not seen
