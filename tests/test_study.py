"""The study's figures against scipy and plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from klas_hf.rows import ResultRow
from klas_hf.stitches import Stitch
from klas_hf.study import (
    MeasuredStitch,
    combined_values,
    format_outcomes,
    measured_stitches,
    score_outcomes,
    with_score,
)


def stitches(seed: int, count: int = 30, noise: float = 0.3) -> list[MeasuredStitch]:
    """Stitches whose quality falls with "good", and has nothing to do with "bad"."""
    generator = np.random.default_rng(seed)
    good, bad = generator.random(count), generator.random(count)
    quality = 1 - 0.5 * good + noise * 0.1 * generator.standard_normal(count)
    macs = generator.integers(100, 1000, count)
    return [
        MeasuredStitch(Stitch(n + 1, 1), int(macs[n]), float(quality[n]), {"good": good[n], "bad": bad[n]})
        for n in range(count)
    ]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(4, 40), buckets=st.integers(1, 8))
def test_correlation_and_regret_equal_plain_ones(seed: int, count: int, buckets: int) -> None:
    given_stitches = stitches(seed, count)
    found = {one.score: one for one in score_outcomes(given_stitches, buckets=buckets, resamples=3)}
    macs = [one.macs for one in given_stitches]
    low, width = min(macs), (max(macs) - min(macs)) / buckets
    by_bucket: dict[int, list[MeasuredStitch]] = {}
    for one in given_stitches:
        number = min(int((one.macs - low) / width), buckets - 1) if width else 0
        by_bucket.setdefault(number, []).append(one)
    for name, outcome in found.items():
        values = [one.values[name] for one in given_stitches]
        expected = spearmanr(values, [-one.quality for one in given_stitches]).statistic
        assert outcome.spearman == pytest.approx(expected, abs=1e-9)
        losses = [
            max(one.quality for one in bucket) - min(bucket, key=lambda one: one.values[name]).quality
            for bucket in by_bucket.values()
        ]
        assert outcome.regret == pytest.approx(np.mean(losses), abs=1e-9)
        assert outcome.stitches == count


def test_a_perfect_score_has_no_regret_and_keeps_the_whole_area() -> None:
    given_stitches = stitches(1)
    perfect = with_score(given_stitches, "perfect", {one.stitch: -one.quality for one in given_stitches})
    outcome = next(one for one in score_outcomes(perfect, resamples=50) if one.score == "perfect")
    assert outcome.spearman == pytest.approx(1) and outcome.regret == 0
    assert outcome.area == outcome.oracle_area
    assert outcome.spearman_interval == pytest.approx((1, 1)) and outcome.regret_interval == (0, 0)
    first = format_outcomes(score_outcomes(perfect, resamples=5)).splitlines()[2]
    assert first.startswith("| perfect")


def test_the_area_is_that_of_the_curve_through_the_picks() -> None:
    given_stitches = [
        MeasuredStitch(Stitch(1, 1), 100, 0.4, {"s": 1.0}),
        MeasuredStitch(Stitch(2, 1), 140, 0.9, {"s": 2.0}),
        MeasuredStitch(Stitch(3, 1), 200, 0.8, {"s": 1.0}),
    ]
    (outcome,) = score_outcomes(given_stitches, buckets=2, resamples=2)
    assert outcome.area == pytest.approx((0.4 + 0.8) / 2)  # picks at 100 and 200, a straight line between them
    assert outcome.oracle_area == pytest.approx((0.9 * 40 + (0.9 + 0.8) / 2 * 60) / 100)  # level up to 140


def test_intervals_hold_what_was_found_and_a_seed_repeats_them() -> None:
    one, other = (score_outcomes(stitches(3), resamples=200, seed=5) for _ in range(2))
    assert one == other
    for outcome in one:
        low, high = outcome.spearman_interval
        assert low < outcome.spearman < high


def test_a_combination_learns_from_other_families_only() -> None:
    families = {name: stitches(number) for number, name in enumerate("abc")}
    combined = combined_values(families, "a", ["good", "bad"])
    values = [combined[one.stitch] for one in families["a"]]
    assert spearmanr(values, [-one.quality for one in families["a"]]).statistic > 0.9
    # What happened in the family itself cannot matter: turn its qualities round.
    turned = [MeasuredStitch(one.stitch, one.macs, -one.quality, one.values) for one in families["a"]]
    assert combined_values(families | {"a": turned}, "a", ["good", "bad"]) == combined
    with pytest.raises(ValueError, match="at least one other"):
        combined_values({"a": families["a"]}, "a", ["good"])


def test_rows_count_with_their_mean_over_seeds_and_unscored_stitches_are_out() -> None:
    rows = [
        ResultRow("every", (i, 1), seed, 100 * i, 0, {"accuracy": i + seed}) for i in (1, 2, 3, 4) for seed in (0, 1)
    ]
    rows.append(ResultRow("every", None, 0, 50, 0, {"accuracy": 9.0}, anchors=(0, 0)))
    values = {"a": {Stitch(i, 1): float(i) for i in (1, 2, 3)}, "b": {Stitch(i, 1): 1.0 for i in (1, 2, 3, 4)}}
    found = measured_stitches(rows, "accuracy", values)
    assert [(one.stitch.source_stop, one.quality) for one in found] == [(1, 1.5), (2, 2.5), (3, 3.5)]
    with pytest.raises(ValueError, match="at least three"):
        measured_stitches(rows[:4], "accuracy", values)
