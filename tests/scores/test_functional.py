"""Functional KL against a stitched model per pair, made by hand; groups and halving change nothing but cost."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_vision
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf import (
    FunctionalScoring,
    Stitch,
    StitchedModel,
    StitchScores,
    measure_stitch_costs,
    score_stitches,
    select_stitches,
    shortlist_stitches,
    train_probes,
)
from klas_hf.maths.least_squares import RIDGE

IMAGES = ["vit", "swin", "resnet", "levit_teacher", "convnext"]
DECODERS = ["llama", "gemma2", "granite", "qwen2", "gpt_neox"]


def pixels(kind: str, count: int, seed: int) -> Tensor:
    side = tiny_vision.SIDE[kind]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def image_batches(kind: str, count: int, seed: int, labels: bool = True) -> list[dict[str, Tensor]]:
    found = []
    for number in range(count):
        batch = {"pixel_values": pixels(kind, 9, seed + number)}
        if labels:
            batch["labels"] = torch.randint(0, 5, (9,), generator=torch.Generator().manual_seed(seed + number))
        found.append(batch)
    return found


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few rows do not determine the maps; the ridge is the same on both sides
        yield


def naive(stitched: PreTrainedModel, target: PreTrainedModel, batches: list[dict], temperature: float = 1.0) -> tuple:
    """KL and loss per image, from two ordinary forwards in float64."""
    kl, loss = [], []
    with torch.no_grad():
        for batch in batches:
            images = batch["pixel_values"].double()
            p = (target(images).logits / temperature).log_softmax(-1)
            logits = stitched(images).logits
            q = (logits / temperature).log_softmax(-1)
            kl.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
            loss.append(F.cross_entropy(logits, batch["labels"], reduction="none"))
    return torch.cat(kl).numpy(), torch.cat(loss).numpy()


@pytest.mark.parametrize("kind", IMAGES)
def test_images_equal_a_stitched_model_per_pair(kind: str) -> None:
    source, target = tiny_vision.tiny_classifier(kind, seed=1), tiny_vision.tiny_classifier(kind, large=True, seed=2)
    calibration, data = image_batches(kind, 3, seed=10), image_batches(kind, 2, seed=20)
    costs = measure_stitch_costs(source, target, image_size=tiny_vision.SIDE[kind])
    every = [Stitch(i + 1, j) for i, j in np.argwhere(costs.possible).tolist() if j > 0]
    settings = FunctionalScoring(calibration=calibration, temperature=1.7, candidates=every)
    scores = score_stitches(source, target, data, score="functional", functional=settings)
    measured = np.isfinite(scores.statistics["functional"])
    possible = costs.possible[:, 1:]
    assert np.array_equal(measured[:, :-1], possible) and possible.any()
    for i, j in np.argwhere(measured):
        stitched = StitchedModel.from_anchors(
            source, target, (int(i) + 1, int(j) + 1), calibration=calibration, ridge=RIDGE,
            image_size=tiny_vision.SIDE[kind],
        )  # fmt: skip
        kl, loss = naive(stitched, target, data, temperature=1.7)
        assert scores.statistics["functional"][i, j] == pytest.approx(kl.mean(), rel=1e-4, abs=1e-7)
        assert scores.statistics["functional_error"][i, j] == pytest.approx(
            kl.std(ddof=1) / len(kl) ** 0.5, rel=1e-4, abs=1e-7
        )
        assert scores.statistics["stitched_loss"][i, j] == pytest.approx(loss.mean(), rel=1e-4)
        assert scores.statistics["dm"][i, j] == pytest.approx(1 - stitched.config.joint_fits[0]["r2"], abs=1e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_text_equals_a_stitched_model_per_pair(family: str) -> None:
    source, target = tiny_models.tiny_model(family, seed=1), tiny_models.tiny_model(family, large=True, seed=2)
    calibration = [{"input_ids": tiny_models.token_ids(8, 24, seed=3)}]
    padded = tiny_models.left_padded(tiny_models.token_ids(4, 20, seed=5), [20, 13, 7, 18])
    scores = score_stitches(
        source, target, [padded], functional=FunctionalScoring(calibration=calibration, temperature=1.0)
    )
    counted = padded["attention_mask"].bool() & (padded["attention_mask"].cumsum(1) > 1)
    assert (scores.sequences, scores.tokens) == (4, int(counted.sum()))
    following = torch.roll(padded["input_ids"], -1, 1)[:, :-1]
    with torch.no_grad():
        p = target(**padded).logits.double().log_softmax(-1)
    for i in range(1, 4):
        for j in range(1, 5):
            stitched = StitchedModel.from_anchors(source, target, (i, j), calibration=calibration, ridge=RIDGE)
            with torch.no_grad():
                q = stitched(**padded).logits.double().log_softmax(-1)
            kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)[counted].mean()
            next_loss = -q[:, :-1].gather(-1, following[..., None])[..., 0][counted[:, :-1]].mean()
            assert scores.statistics["functional"][i - 1, j - 1] == pytest.approx(float(kl), rel=1e-4)
            assert scores.statistics["stitched_loss"][i - 1, j - 1] == pytest.approx(float(next_loss), rel=1e-4)


def with_another_head(anchor: PreTrainedModel) -> PreTrainedModel:
    """The same blocks, as an anchor of other weights."""
    twin = copy.deepcopy(anchor)
    with torch.no_grad():
        list(twin.classifier.parameters())[-1].add_(1)
    return twin


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_an_anchor_stitched_to_its_own_blocks_at_equal_depth_scores_zero(kind: str) -> None:
    anchor = tiny_vision.tiny_classifier(kind, seed=1)
    calibration = [{"pixel_values": pixels(kind, 60, seed)} for seed in (1, 2, 3)]
    data = image_batches(kind, 1, seed=9, labels=False)
    costs = measure_stitch_costs(anchor, anchor, image_size=tiny_vision.SIDE[kind])
    every = [Stitch(i + 1, j) for i, j in np.argwhere(costs.possible).tolist() if j > 0]
    settings = FunctionalScoring(calibration=calibration, ridge=0.0, candidates=every)
    scores = score_stitches(with_another_head(anchor), anchor, data, score="functional", functional=settings)
    functional = scores.statistics["functional"]
    diagonal = [functional[i, i] for i in range(len(functional) - 1)]
    assert min(diagonal) >= 0 and max(diagonal) < 1e-6 < np.nanmin(functional[~np.eye(len(functional), dtype=bool)])


def test_rounding_makes_no_score_negative_and_none_of_its_root_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A perfect joint, of which fp32 sums may say slightly less than nothing."""
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=6) for large in (False, True))
    data = image_batches("vit", 6, seed=7)
    probes = train_probes(source, data), train_probes(target, data)
    monkeypatch.setattr("klas_hf.scores.answers.kl_to_logits", lambda log_p, *_: torch.full(log_p.shape[:1], -1e-9))
    found = score_stitches(source, target, data, probes=probes, score="functional_theta")
    assert found.stitches and all(found.value_of(stitch) == 0 for stitch in found.stitches)


@pytest.mark.parametrize("text", [False, True])
def test_by_default_stitches_between_the_anchors_costs_are_scored(text: bool) -> None:
    """On anchors of which some stitches cost more than the target, or less than the source."""
    if text:
        source = tiny_models.tiny_model("llama", seed=1, intermediate_size=90)
        target = tiny_models.tiny_model("llama", large=True, seed=2)
        data: list = [{"input_ids": tiny_models.token_ids(8, 24, seed=seed)} for seed in (3, 4)]
    else:
        source, target = (tiny_vision.tiny_classifier("resnet", large=large, seed=1) for large in (False, True))
        data = image_batches("resnet", 2, seed=1)
    scores = score_stitches(source, target, data, tokens=24)
    costs = scores.costs
    inside = costs.possible & (costs.macs >= costs.source_total) & (costs.macs <= costs.target_total)
    assert inside[:, 1:].any() and (costs.possible & ~inside)[:, 1:].any()
    np.testing.assert_array_equal(np.isfinite(scores.values[:, 1:]), inside[:, 1:])
    row, column = np.argwhere(costs.possible & ~inside & (np.arange(inside.shape[1]) > 0))[0]
    named = FunctionalScoring(candidates=(Stitch(int(row) + 1, int(column)),))
    assert score_stitches(source, target, data, tokens=24, functional=named).stitches == named.candidates
    other = copy.deepcopy(source)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    with pytest.raises(ValueError, match="got no stitch between the anchors' costs"):
        score_stitches(source, other, data)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16)])
def test_anchors_of_two_dtypes_are_stitched_in_the_targets(text: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    def score(*of: torch.dtype) -> StitchScores:
        if text:
            pair = [tiny_models.tiny_model("llama", large=large, seed=1) for large in (False, True)]
            data: list = [{"input_ids": tiny_models.token_ids(8, 24, seed=seed)} for seed in (3, 4)]
        else:
            pair = [tiny_vision.tiny_classifier("vit", large=large, seed=1) for large in (False, True)]
            data = image_batches("vit", 2, seed=1)
        return score_stitches(*(model.to(dtype) for model, dtype in zip(pair, of, strict=True)), data)

    mixed, exact = score(*dtypes), score(torch.float32, torch.float32)
    assert mixed.stitches == exact.stitches
    np.testing.assert_allclose(mixed.values, exact.values, rtol=0.1, atol=1e-3)


def test_few_calibration_rows_are_warned_of_once() -> None:
    source, target = (tiny_models.tiny_model("llama", large=large, seed=1) for large in (False, True))
    width = source.config.hidden_size
    data = [{"input_ids": tiny_models.token_ids(8, 24, seed=5)}]

    def heard(rows: int) -> list[str]:
        calibration = [{"input_ids": tiny_models.token_ids(rows, 2, seed=3)}]  # the first token of two does not count
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            score_stitches(source, target, data, functional=FunctionalScoring(calibration))
        return [str(warning.message) for warning in seen]

    assert heard(4 * width) == []
    (message,) = heard(2 * width)
    assert f"got {2 * width} calibration rows for linear maps of {width} features, 2.0 per feature" in message


@pytest.mark.parametrize("form", ["name", "model", "copy"])
def test_one_anchor_with_itself_is_refused_before_any_work(form: str) -> None:
    def unread() -> Iterator[dict]:
        raise AssertionError("data were read")
        yield {}

    anchor = tiny_vision.tiny_classifier("vit", seed=1)
    pair = {"name": ("no such folder", Path("no such folder/")), "model": (anchor, anchor)}
    with pytest.raises(ValueError, match="as source and as target; expected two different anchors"):
        score_stitches(*pair.get(form, (anchor, copy.deepcopy(anchor))), unread())


def test_groups_and_smaller_rears_change_nothing_but_passes() -> None:
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=3) for large in (False, True))
    calibration, data = image_batches("vit", 2, seed=1), image_batches("vit", 2, seed=5)
    found = {}
    for name, options in (
        ("whole", {}),
        ("groups", {"moment_bytes": 8 * (16 * 16 + 2 * 16 + 24 * 24 + 2 * 24 + 16 * 24)}),
        ("rears", {"rear_bytes": 1}),
        ("distributions", {"workspace_bytes": 1}),
    ):
        settings = FunctionalScoring(calibration=calibration, **options)
        found[name] = score_stitches(source, target, data, score="functional", functional=settings)
    passes = {name: one.provenance["functional"]["passes"] for name, one in found.items()}
    pairs = int(np.isfinite(found["whole"].statistics["functional"]).sum())
    assert passes == {"whole": 1, "groups": pairs, "rears": 1, "distributions": 1}
    for name in ("groups", "rears", "distributions"):
        for key, value in found["whole"].statistics.items():
            np.testing.assert_allclose(found[name].statistics[key], value, rtol=1e-5, atol=1e-9)
        assert found[name].sequences == found["whole"].sequences == found[name].tokens == 18


def test_halving_measures_the_shortlist_only_and_the_same() -> None:
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=4) for large in (False, True))
    calibration, data = image_batches("vit", 2, seed=1), image_batches("vit", 2, seed=5)
    every = score_stitches(source, target, data, score="functional", functional=FunctionalScoring(calibration))
    cheap = shortlist_stitches(every.with_score("dm"), per_bucket=1, buckets=3)
    settings = FunctionalScoring(calibration, candidates=cheap)
    halved = score_stitches(source, target, data, score="functional", functional=settings)
    assert set(halved.stitches) == set(cheap) and len(cheap) < len(every.stitches)
    for stitch in cheap:
        assert halved.value_of(stitch) == pytest.approx(every.value_of(stitch), rel=1e-6)
    assert set(select_stitches(halved, buckets=3)) <= set(cheap)


def test_of_many_candidates_the_best_of_each_cost_on_a_quarter_are_measured_on_all() -> None:
    source = tiny_models.tiny_model("llama", seed=1, num_hidden_layers=5, intermediate_size=16)
    target = tiny_models.tiny_model("llama", large=True, seed=2, num_hidden_layers=6)
    calibration = [{"input_ids": tiny_models.token_ids(8, 24, seed=3)}]
    data = [{"input_ids": tiny_models.token_ids(2, 12, seed=seed)} for seed in range(4)]

    def score(data: list[dict[str, Tensor]], **options: Any) -> StitchScores:
        settings = FunctionalScoring(calibration, temperature=1.0, **options)
        return score_stitches(source, target, data, tokens=12, functional=settings)

    every, few, halved = score(data, survivors=None), score(data[:1], survivors=None), score(data, survivors=1)
    expected = set(shortlist_stitches(few, per_bucket=1, buckets=20))
    assert set(halved.stitches) == expected != set(shortlist_stitches(every, per_bucket=1, buckets=20))
    eliminated = halved.provenance["functional"]["eliminated"]
    assert len(every.stitches) - eliminated == len(expected) < 20 < len(every.stitches) < 60
    assert halved.sequences == every.sequences == 8
    for stitch in expected:
        assert halved.value_of(stitch) == pytest.approx(every.value_of(stitch), rel=1e-6)
    for whole in (score(data), score(data, survivors=1, scored_items=None)):
        assert whole.stitches == every.stitches and whole.provenance["functional"]["eliminated"] == 0
    named = every.stitches[:21]
    assert score(data, survivors=1, candidates=named).stitches == named


def test_the_shortlist_is_the_best_of_each_bucket() -> None:
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=4) for large in (False, True))
    data = image_batches("vit", 4, seed=5)
    scores = score_stitches(source, target, data, score="functional")
    low, high = scores.costs.source_total, scores.costs.target_total
    by_bucket: dict[int, list[tuple[float, Stitch]]] = {}
    for stitch in scores.stitches:
        macs = scores.costs.of(stitch)[0]
        if low <= macs <= high:
            by_bucket.setdefault(min((macs - low) * 2 // (high - low), 1), []).append((scores.value_of(stitch), stitch))
    expected = {stitch for bucket in by_bucket.values() for _, stitch in sorted(bucket)[:2]}
    assert set(shortlist_stitches(scores, per_bucket=2, buckets=2)) == expected
    with pytest.raises(ValueError, match="per_bucket=0"):
        shortlist_stitches(scores, per_bucket=0)


def test_without_calibration_the_first_half_calibrates() -> None:
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=5) for large in (False, True))
    data = image_batches("vit", 4, seed=7)
    halves = score_stitches(source, target, data, score="functional")
    named = score_stitches(source, target, data[2:], score="functional", functional=FunctionalScoring(data[:2]))
    np.testing.assert_array_equal(halves.statistics["functional"], named.statistics["functional"])


def test_no_more_batches_are_read_than_are_used() -> None:
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=5) for large in (False, True))
    data, read = image_batches("vit", 9, seed=7), []
    size = len(data[0]["pixel_values"])

    class Counting:
        def __iter__(self):
            for number, batch in enumerate(data):
                read.append(number)
                yield batch

    found = score_stitches(source, target, Counting(), functional=FunctionalScoring(scored_items=2 * size))
    assert max(read) == 3 and found.sequences == 2 * size
    expected = score_stitches(source, target, data[2:4], functional=FunctionalScoring(data[:2]))
    np.testing.assert_array_equal(found.values, expected.values)
    read.clear()
    score_stitches(source, target, Counting(), functional=FunctionalScoring(data[:2], scored_items=size))
    assert max(read) == 0
    whole = score_stitches(source, target, Counting(), functional=FunctionalScoring(data[:2], scored_items=None))
    assert whole.sequences == 9 * size
    once = score_stitches(source, target, iter(data), functional=FunctionalScoring(data[:2], scored_items=None))
    np.testing.assert_array_equal(whole.values, once.values)


def test_so_many_items_are_scored_in_whole_batches() -> None:
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=5) for large in (False, True))
    data = image_batches("vit", 6, seed=7)
    size = len(data[0]["pixel_values"])
    for items, batches in ((1, 1), (size, 1), (size + 1, 2), (None, 4)):
        settings = FunctionalScoring(data[:2], scored_items=items)
        found = score_stitches(source, target, data[2:], score="functional", functional=settings)
        cut = FunctionalScoring(data[:2], scored_items=None)
        expected = score_stitches(source, target, data[2 : 2 + batches], score="functional", functional=cut)
        assert found.sequences == batches * size
        np.testing.assert_array_equal(found.values, expected.values)
    with pytest.raises(ValueError, match="scored_items=0"):
        FunctionalScoring(scored_items=0)


def test_the_product_with_theta_needs_probes_and_is_a_geometric_mean() -> None:
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=6) for large in (False, True))
    data = image_batches("vit", 6, seed=7)
    with pytest.raises(ValueError, match="no probes"):
        score_stitches(source, target, data, score="functional_theta")
    probes = train_probes(source, data), train_probes(target, data)
    found = score_stitches(source, target, data, probes=probes, score="functional_theta")
    theta, functional = (found.with_score(name).values for name in ("theta", "functional"))
    np.testing.assert_allclose(found.values**2, theta * functional)


def test_by_default_stitches_are_ranked_by_functional_kl_at_a_temperature_of_four() -> None:
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=6) for large in (False, True))
    data = image_batches("vit", 6, seed=7)
    found = score_stitches(source, target, data)
    named = FunctionalScoring(data[:3], temperature=4.0)
    expected = score_stitches(source, target, data[3:], score="functional", functional=named)
    assert found.score == "functional"
    np.testing.assert_array_equal(found.values, expected.values)
    probes = train_probes(source, data), train_probes(target, data)
    both = score_stitches(source, target, data, probes=probes)
    np.testing.assert_array_equal(both.values, found.values)
    assert {"klas", "theta", "functional_theta"} <= set(both.available)


def test_beside_probes_all_scores_are_there_and_alone_the_probed_ones_are_not(tmp_path) -> None:
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=6) for large in (False, True))
    data = image_batches("vit", 6, seed=7)
    probes = train_probes(source, data), train_probes(target, data)
    both = score_stitches(source, target, data, probes=probes, functional=FunctionalScoring(), score="klas")
    assert {"klas", "theta", "functional", "stitched_loss", "cka"} <= set(both.available) and both.score == "klas"
    alone = score_stitches(source, target, data, score="functional")
    assert set(alone.available) == {"functional", "stitched_loss", "dm"}
    np.testing.assert_array_equal(both.with_score("functional").values, alone.values)
    with pytest.raises(ValueError, match="cross"):
        alone.with_score("klas")
    alone.save(tmp_path / "scores.safetensors")
    again = StitchScores.load(tmp_path / "scores.safetensors")
    np.testing.assert_array_equal(again.values, alone.values)


def test_bad_input_is_refused() -> None:
    source, target = (tiny_vision.tiny_classifier("vit", large=large, seed=6) for large in (False, True))
    data = image_batches("vit", 2, seed=7)

    def score(data=data, **settings) -> StitchScores:
        return score_stitches(source, target, data, score="functional", functional=FunctionalScoring(**settings))

    with pytest.raises(ValueError, match="at least two"):
        score(data[:1])
    with pytest.raises(ValueError, match="moment_bytes=10"):
        score(moment_bytes=10)
    with pytest.raises(ValueError, match="target_start >= 1"):
        score(candidates=[Stitch(1, 0)])
    with pytest.raises(ValueError, match="no candidates"):
        score(candidates=[])
    with pytest.raises(ValueError, match="got survivors=0; expected at least 1, or None to keep all"):
        FunctionalScoring(survivors=0)
    with pytest.raises(ValueError, match="temperature=0"):
        FunctionalScoring(temperature=0)
    with pytest.raises(ValueError, match="reversed"):
        score_stitches(target, source, data, score="functional")
    assert measure_stitch_costs(source, target).possible.all()  # so that what is refused is not refused for its grid
