"""The study's figures against scipy and plain loops."""

import numpy as np
import pytest
from experiments.study import (
    MeasuredStitch,
    combined_values,
    format_halving,
    format_outcomes,
    halving_outcome,
    measured_stitches,
    score_outcomes,
    with_score,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow


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
    assert outcome.area == outcome.oracle_area and outcome.relative_regret == 0
    assert outcome.spearman_interval == pytest.approx((1, 1)) and outcome.regret_interval == (0, 0)
    first = format_outcomes(score_outcomes(perfect, resamples=5)).splitlines()[2]
    assert first.startswith("| perfect")


def test_the_area_is_that_of_the_curves_through_the_picks_on_their_common_interval() -> None:
    given_stitches = [
        MeasuredStitch(Stitch(1, 1), 100, 0.4, {"s": 1.0, "t": 2.0}),
        MeasuredStitch(Stitch(2, 1), 140, 0.9, {"s": 2.0, "t": 1.0}),
        MeasuredStitch(Stitch(3, 1), 200, 0.8, {"s": 1.0, "t": 1.0}),
    ]
    first, second = score_outcomes(given_stitches, buckets=2, resamples=2)
    # "s" picks at 100 and 200, "t" and the oracle at 140 and 200: all three curves lie over 140 to 200.
    at_140 = 0.4 + 0.4 * 0.4
    assert first.area == pytest.approx((at_140 + 0.8) / 2)
    assert second.area == second.oracle_area == first.oracle_area == pytest.approx((0.9 + 0.8) / 2)
    # In a single bucket "s" picks at 100 and the oracle at 140: no cost is common to both.
    assert np.isnan(score_outcomes(given_stitches, buckets=1, resamples=2)[0].area)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(4, 40))
def test_relative_regret_is_a_share_of_what_chance_loses(seed: int, count: int) -> None:
    given_stitches = stitches(seed, count)
    perfect = with_score(given_stitches, "perfect", {one.stitch: -one.quality for one in given_stitches})
    worst = with_score(perfect, "worst", {one.stitch: one.quality for one in given_stitches})
    found = {one.score: one for one in score_outcomes(worst, buckets=4, resamples=2)}
    assert found["perfect"].relative_regret == 0
    macs = np.array([one.macs for one in worst])
    edges = np.linspace(macs.min(), macs.max(), 5)
    number = np.array([sum(one >= edge for edge in edges[1:-1]) for one in macs])
    quality = np.array([one.quality for one in worst])
    best, mean = (
        np.array([float(pick(quality[number == n])) for n in sorted(set(number))]) for pick in (np.max, np.mean)
    )
    for outcome in found.values():
        chance = float((best - mean).sum())
        expected = outcome.regret * len(best) / chance if chance > 0 else 0.0
        assert outcome.relative_regret == pytest.approx(expected, abs=1e-9)
        values = [one.values[outcome.score] for one in worst]
        assert outcome.pearson == pytest.approx(pearsonr(values, -quality).statistic, abs=1e-9)


def test_the_interval_of_the_regret_is_over_buckets() -> None:
    # Four buckets of two stitches; the score is right in three of them and loses .4 in the last.
    given_stitches = [
        MeasuredStitch(Stitch(2 * n + better + 1, 1), 100 * n + better, 0.4 * better, {"s": float(better == (n == 3))})
        for n in range(4)
        for better in (0, 1)
    ]
    (outcome,) = score_outcomes(given_stitches, buckets=4, resamples=4000)
    assert outcome.regret == pytest.approx(0.1)
    # The number of draws of the last bucket is binomial(4, 1/4): 2.5 % and 97.5 % lie at 0 and 3.
    assert outcome.regret_interval == pytest.approx((0.0, 0.3))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(4, 40), kept=st.integers(1, 4))
def test_halving_is_what_a_plain_loop_gives(seed: int, count: int, kept: int) -> None:
    given_stitches = stitches(seed, count)
    found = halving_outcome(given_stitches, "bad", "good", per_bucket=kept, buckets=3)
    macs = [one.macs for one in given_stitches]
    low, width = min(macs), (max(macs) - min(macs)) / 3
    by_bucket: dict[int, list[MeasuredStitch]] = {}
    for one in given_stitches:
        by_bucket.setdefault(min(int((one.macs - low) / width), 2) if width else 0, []).append(one)
    same, regrets, scored = [], [], 0
    for bucket in by_bucket.values():
        left = sorted(bucket, key=lambda one: one.values["bad"])[:kept]
        choice, full = (min(among, key=lambda one: one.values["good"]) for among in (left, bucket))
        same.append(choice is full)
        regrets.append(max(one.quality for one in bucket) - choice.quality)
        scored += len(left)
    assert found.share == pytest.approx(scored / count) and found.agreement == pytest.approx(np.mean(same))
    assert found.regret == pytest.approx(np.mean(regrets))
    everything = halving_outcome(given_stitches, "bad", "good", per_bucket=count, buckets=3)
    assert everything.agreement == everything.share == 1 and everything.regret == everything.full_regret
    assert "| bad" in format_halving([found])
    with pytest.raises(ValueError, match="at least 1"):
        halving_outcome(given_stitches, "bad", "good", per_bucket=0)


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
    rows.append(ResultRow("every", "0[:]", 0, 50, 0, {"accuracy": 9.0}))
    values = {"a": {Stitch(i, 1): float(i) for i in (1, 2, 3)}, "b": {Stitch(i, 1): 1.0 for i in (1, 2, 3, 4)}}
    found = measured_stitches(rows, "accuracy", values)
    assert [(one.stitch.source_stop, one.quality) for one in found] == [(1, 1.5), (2, 2.5), (3, 3.5)]
    losses = measured_stitches(rows, "accuracy", values, higher_is_better=False)
    assert [one.quality for one in losses] == [-1.5, -2.5, -3.5]
    with pytest.raises(ValueError, match="at least three"):
        measured_stitches(rows[:4], "accuracy", values)
