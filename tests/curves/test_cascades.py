"""Cascades against a loop over images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klas_hf.curves.cascades import CascadeMember, CascadePoint, best_per_bucket, cascade_curve, to_rows
from klas_hf.curves.tradeoff import TradeoffCurve
from klas_hf.rows import ResultRow

THRESHOLDS = [0.0, 0.3, 0.5, 0.7, 0.9, 1.01]


def predicted(images: int, seed: int, sharpness: float = 2.0) -> np.ndarray:
    odds = np.exp(sharpness * np.random.default_rng(seed).normal(size=(images, 4)))
    return odds / odds.sum(1, keepdims=True)


def member(images: int, seed: int, labels: np.ndarray, macs: int = 100) -> CascadeMember:
    return CascadeMember.of_probabilities(predicted(images, seed), labels, macs, parameters=7 * macs)


@given(st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_every_point_is_what_running_image_by_image_gives(images: int, seed: int) -> None:
    labels = np.random.default_rng(seed + 2).integers(0, 4, images)
    one, other = predicted(images, seed), predicted(images, seed + 1)
    first, second = member(images, seed, labels, 100), member(images, seed + 1, labels, 1_000)
    for point, threshold in zip(cascade_curve(first, second, THRESHOLDS), THRESHOLDS, strict=True):
        macs = correct = sent = 0
        for image in range(images):
            answer, cost = one[image], 100
            if max(answer) < threshold:
                answer, cost = other[image], 1_100
                sent += 1
            macs += cost
            correct += int(np.argmax(answer)) == labels[image]
        assert point.macs == pytest.approx(macs / images)
        assert (point.threshold, point.quality, point.sent) == (threshold, correct / images, sent / images)
        assert point.parameters == 7_700


def test_the_threshold_runs_from_the_first_model_alone_to_both_on_every_image() -> None:
    labels = predicted(60, 1).argmax(1)
    points = cascade_curve(member(60, 0, labels, 100), member(60, 1, labels, 1_000), THRESHOLDS)
    assert (points[0].macs, points[0].sent) == (100, 0.0)
    assert (points[-1].macs, points[-1].sent, points[-1].quality) == (1_100, 1.0, 1.0)
    assert [point.macs for point in points] == sorted(point.macs for point in points)
    assert 0 < points[3].sent < 1


def test_an_image_at_the_threshold_is_not_sent_on() -> None:
    one, other = CascadeMember(np.zeros(1), np.array([0.75]), 1), CascadeMember(np.ones(1), np.array([0.75]), 10)
    points = cascade_curve(one, other, [0.75, 0.76])
    assert [(point.macs, point.quality) for point in points] == [(1, 0.0), (11, 1.0)]


def test_sequences_count_by_their_tokens() -> None:
    tokens, confidence = np.array([10.0, 30.0, 60.0]), np.array([0.2, 0.9, 0.4])
    small = CascadeMember(np.array([4.0, 3.0, 5.0]), confidence, 100, weights=tokens)
    large = CascadeMember(np.array([2.0, 1.0, 3.0]), confidence, 1_000, weights=tokens)
    (point,) = cascade_curve(small, large, [0.5])
    assert point.quality == pytest.approx((10 * 2 + 30 * 3 + 60 * 3) / 100) and point.sent == pytest.approx(0.7)
    assert point.macs == pytest.approx(100 + 0.7 * 1_000)


def test_the_best_of_each_bucket() -> None:
    def point(macs: float, quality: float) -> CascadePoint:
        return CascadePoint(0.5, macs, quality, 0.1, 3)

    points = [point(10, 0.1), point(19.4, 0.3), point(14, 0.3), point(55, 0.2), point(110, 0.9), point(100, 0.8)]
    assert best_per_bucket(points, buckets=10) == [points[2], points[3], points[4]]  # 10–20, 50–60, 100–110
    assert best_per_bucket(points, buckets=1) == [points[4]]
    assert best_per_bucket([points[2], points[1]], buckets=1) == [points[2]]
    with pytest.raises(ValueError, match="got no points"):
        best_per_bucket([])
    with pytest.raises(ValueError, match="got buckets=0"):
        best_per_bucket(points, buckets=0)


def test_rows_make_a_curve() -> None:
    labels = np.zeros(60, dtype=int)
    points = cascade_curve(member(60, 0, labels, 100), member(60, 1, labels, 1_000), [0.0, 0.55])
    rows = to_rows(points, metric="top1", seed=4)
    assert rows[1] == ResultRow(
        "cascade",
        None,
        4,
        round(points[1].macs),
        7_700,
        {"top1": points[1].quality},
        {"sent": points[1].sent},
        setting={"threshold": 0.55},
    )
    assert TradeoffCurve(rows, "top1").macs.tolist() == [100, round(points[1].macs)]
    usual = to_rows(points)[0]
    assert (usual.seed, list(usual.metrics)) == (0, ["accuracy"])


def test_what_is_no_cascade_is_refused() -> None:
    labels = np.zeros(9, dtype=int)
    good = member(9, 0, labels)
    with pytest.raises(ValueError, match="got 9 and 8 items"):
        cascade_curve(good, member(8, 1, labels[:8]), [0.5])
    with pytest.raises(ValueError, match="first model of 101 MACs and a second of 100; swap"):
        cascade_curve(member(9, 0, labels, 101), good, [0.5])
    for wrong, message in (
        (labels[:8], r"labels of shape \(8,\) from 0 to 0; expected \(9,\)"),
        (labels + 4, "from 4 to 4; expected .*from 0 to 3"),
        (labels - 1, "from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=message):
            member(9, 0, wrong)
    logits = np.array([[2.0, -1.0], [0.5, 0.5]])
    for wrong in (logits, np.array([[0.5, 0.6]]), np.array([[np.nan, 1.0]])):
        with pytest.raises(ValueError, match="expected probabilities. Pass the softmax"):
            CascadeMember.of_probabilities(wrong, labels[: len(wrong)], 1)
    for wrong in (np.ones(3) / 3, np.ones((0, 3))):
        with pytest.raises(ValueError, match=r"expected \(images, classes\)"):
            CascadeMember.of_probabilities(wrong, labels[:0], 1)
    for quality, confidence, message in (
        (np.ones(3), np.ones(2), r"shapes \[\(3,\), \(2,\)\]; expected \(items,\)"),
        (np.ones(0), np.ones(0), "at least one"),
        (np.ones(2), np.array([0.5, np.nan]), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            CascadeMember(quality, confidence, 1)


def test_what_both_models_do_alike_is_done_once() -> None:
    one, other = (
        CascadeMember(np.zeros(4), np.array([0.1, 0.2, 0.8, 0.9]), 100),
        CascadeMember(np.ones(4), np.ones(4), 150),
    )
    points = cascade_curve(one, other, [0.0, 0.5, 2.0], shared=60)
    assert [point.macs for point in points] == [100, 100 + 2 * 90 / 4, 190]
    with pytest.raises(ValueError, match="got shared=101 of 100 MACs"):
        cascade_curve(one, other, [0.5], shared=101)
