"""Cascades against a loop over images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klas_hf.curves.cascades import CascadeMember, CascadePoint, best_per_bucket, cascade_curve, to_rows
from klas_hf.curves.tradeoff import TradeoffCurve
from klas_hf.rows import ResultRow

THRESHOLDS = [0.0, 0.3, 0.5, 0.7, 0.9, 1.01]


def member(images: int, seed: int, macs: int = 100, sharpness: float = 2.0) -> CascadeMember:
    logits = sharpness * np.random.default_rng(seed).normal(size=(images, 4))
    odds = np.exp(logits)
    return CascadeMember(odds / odds.sum(1, keepdims=True), macs, parameters=7 * macs)


@given(st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_every_point_is_what_running_image_by_image_gives(images: int, seed: int) -> None:
    first, second = member(images, seed, 100), member(images, seed + 1, 1_000)
    labels = np.random.default_rng(seed + 2).integers(0, 4, images)
    for point, threshold in zip(cascade_curve(first, second, labels, THRESHOLDS), THRESHOLDS, strict=True):
        macs = correct = sent = 0
        for image in range(images):
            answer, cost = first.probabilities[image], 100
            if max(answer) < threshold:
                answer, cost = second.probabilities[image], 1_100
                sent += 1
            macs += cost
            correct += int(np.argmax(answer)) == labels[image]
        assert point.macs == pytest.approx(macs / images)
        assert (point.threshold, point.accuracy, point.sent) == (threshold, correct / images, sent / images)
        assert point.parameters == 7_700


def test_the_threshold_runs_from_the_first_model_alone_to_both_on_every_image() -> None:
    first, second = member(60, 0, 100), member(60, 1, 1_000)
    labels = second.probabilities.argmax(1)
    points = cascade_curve(first, second, labels, THRESHOLDS)
    assert (points[0].macs, points[0].sent) == (100, 0.0)
    assert (points[-1].macs, points[-1].sent, points[-1].accuracy) == (1_100, 1.0, 1.0)
    assert [point.macs for point in points] == sorted(point.macs for point in points)
    assert 0 < points[3].sent < 1


def test_an_image_at_the_threshold_is_not_sent_on() -> None:
    one = CascadeMember(np.array([[0.75, 0.25]]), 1)
    other = CascadeMember(np.array([[0.25, 0.75]]), 10)
    points = cascade_curve(one, other, np.array([1]), [0.75, 0.76])
    assert [(point.macs, point.accuracy) for point in points] == [(1, 0.0), (11, 1.0)]


def test_the_best_of_each_bucket() -> None:
    def point(macs: float, accuracy: float) -> CascadePoint:
        return CascadePoint(0.5, macs, accuracy, 0.1, 3)

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
    points = cascade_curve(member(60, 0, 100), member(60, 1, 1_000), labels, [0.0, 0.55])
    rows = to_rows(points, metric="top1", seed=4)
    assert rows[1] == ResultRow(
        "cascade",
        None,
        4,
        round(points[1].macs),
        7_700,
        {"top1": points[1].accuracy},
        {"sent": points[1].sent},
        setting={"threshold": 0.55},
    )
    assert TradeoffCurve(rows, "top1").macs.tolist() == [100, round(points[1].macs)]
    usual = to_rows(points)[0]
    assert (usual.seed, list(usual.metrics)) == (0, ["accuracy"])


def test_what_is_no_cascade_is_refused() -> None:
    good, labels = member(9, 0), np.zeros(9, dtype=int)
    for first, second, given_labels, message in (
        (good, member(8, 1), labels, r"shapes \(9, 4\) and \(8, 4\) and labels of shape \(9,\)"),
        (good, good, labels[:8], r"labels of shape \(8,\)"),
        (good, good, labels + 4, "got labels from 4 to 4; expected 0 to 3"),
        (good, good, labels - 1, "got labels from -1 to -1"),
        (member(9, 0, 101), good, labels, "first model of 101 MACs and a second of 100; swap"),
    ):
        with pytest.raises(ValueError, match=message):
            cascade_curve(first, second, given_labels, [0.5])
    logits = np.array([[2.0, -1.0], [0.5, 0.5]])
    for wrong in (logits, np.array([[0.5, 0.6]]), np.array([[np.nan, 1.0]])):
        with pytest.raises(ValueError, match="expected probabilities. Pass the softmax"):
            CascadeMember(wrong, 1)
    for wrong in (np.ones(3) / 3, np.ones((0, 3))):
        with pytest.raises(ValueError, match=r"expected \(images, classes\)"):
            CascadeMember(wrong, 1)
