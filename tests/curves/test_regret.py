"""What a score picks per cost bucket, against a loop over buckets."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klas_hf.curves.regret import bucket_picks
from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow
from klas_hf.scores.values import StitchScores
from klas_hf.stitch_costs import StitchCosts


def scores_of(values: np.ndarray, source: list[int], target: list[int], positions: tuple[int, int]) -> StitchScores:
    """Scores whose rule, Θ, takes these values: `(m, n)`, the last column without a stitch."""
    m, n = values.shape
    costs = StitchCosts(
        tokens=0,
        source_blocks=np.array(source),
        target_blocks=np.array(target),
        stitch=1,
        source_total=sum(source) + 4,
        target_total=sum(target) + 6,
        ends=5,
        source_parameters=np.ones(m, dtype=int),
        target_parameters=np.ones(n, dtype=int),
        stitch_parameters=1,
        ends_parameters=0,
        source=positions[0],
        target=positions[1],
    )
    zeros = np.zeros((m, n))
    return StitchScores("theta", values, np.ones(n - 1), zeros, np.zeros(n - 1), zeros[:, 1:], 1, 1, costs)


def row(pair: tuple[int, int], value: float, seed: int = 0, anchors: tuple[int, int] = (0, 1)) -> ResultRow:
    return ResultRow("rule", Stitch(*pair, *anchors), seed, 1, 1, {"accuracy": value, "other": -9.0})


def anchor(place: int, value: float) -> ResultRow:
    return ResultRow("rule", f"{place}[:]", 0, 1, 1, {"accuracy": value, "other": -9.0})


@st.composite
def problems(draw: st.DrawFn) -> tuple[StitchScores, list[ResultRow], int]:
    m, n = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    positions = draw(st.sampled_from([(0, 1), (1, 3)]))
    source, target = generator.integers(1, 9, m).tolist(), generator.integers(9, 30, n).tolist()
    scores = scores_of(generator.permutation(m * n).reshape(m, n).astype(float), source, target, positions)
    every = [(i, j) for i in range(1, m + 1) for j in range(n)]
    chosen = draw(st.lists(st.sampled_from([pair for pair in every if pair[1]]), min_size=1, unique=True))
    chosen += [pair for pair in every if not pair[1]]  # measured, but without a score
    rows = [
        row(pair, float(generator.normal()), seed, positions)
        for pair in chosen
        for seed in range(draw(st.integers(1, 2)))
    ]
    rows += [anchor(positions[0], 9.0), row(chosen[0], 99.0, 0, (2, 5))]  # an anchor; other anchors
    return scores, rows, draw(st.integers(1, 6))


@given(problems(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_picks_are_those_of_a_loop_over_buckets(
    problem: tuple[StitchScores, list[ResultRow], int], higher_is_better: bool
) -> None:
    scores, rows, buckets = problem
    costs = scores.costs
    low, high = costs.source_total, costs.target_total
    quality: dict[tuple[int, int], list[float]] = {}
    for one in rows:
        stitch = one.stitch
        if stitch and stitch.target_start and (stitch.source, stitch.target) == (costs.source, costs.target):
            quality.setdefault((stitch.source_stop, stitch.target_start), []).append(one.metrics["accuracy"])
    picked, oracle, chance = [], [], []
    for bucket in range(buckets):
        there = []
        for pair in quality:
            macs = min(max(costs.of(Stitch(*pair, costs.source, costs.target))[0], low), high)
            start, stop = (low + (high - low) * edge / buckets for edge in (bucket, bucket + 1))
            if start <= macs < stop or (bucket == buckets - 1 and macs == high):
                there.append(pair)
        if there:
            means = [float(np.mean(quality[pair])) for pair in there]
            best = min(range(len(there)), key=lambda place: scores.cross[there[place][0] - 1, there[place][1] - 1])
            picked.append(means[best])
            oracle.append(max(means) if higher_is_better else min(means))
            chance.append(float(np.mean(means)))
    got = bucket_picks(scores, rows, "accuracy", buckets=buckets, higher_is_better=higher_is_better)
    assert got.buckets == len(picked)
    assert got.picked == pytest.approx(np.mean(picked))
    assert got.oracle == pytest.approx(np.mean(oracle))
    assert got.chance == pytest.approx(np.mean(chance))
    assert got.regret == pytest.approx(abs(np.mean(oracle) - np.mean(picked))) and got.regret >= 0


def test_picks_by_hand() -> None:
    # Costs of (1, 1), (2, 1), (1, 2), (2, 2): 6 + 1 + (4 + 4, 2 + …), between 10 and 26.
    scores = scores_of(np.array([[1.0, 2.0, 0.0], [3.0, 0.5, 0.0]]), [3, 3], [6, 6, 8], (0, 1))
    assert [scores.costs.of(Stitch(*pair))[0] for pair in ((1, 1), (2, 1), (1, 2), (2, 2))] == [23, 26, 17, 20]
    rows = [row((1, 1), 0.7), row((2, 1), 0.9), row((1, 2), 0.6), row((2, 2), 0.5), row((2, 2), 0.7, seed=1)]
    got = bucket_picks(scores, rows, "accuracy", buckets=2)  # from 10 to 18, and from 18 to 26
    assert (got.picked, got.oracle, got.buckets) == (pytest.approx((0.6 + 0.6) / 2), pytest.approx((0.6 + 0.9) / 2), 2)
    assert got.chance == pytest.approx((0.6 + (0.7 + 0.9 + 0.6) / 3) / 2)
    assert got.regret == pytest.approx(0.15)
    # The same of a loss: (2, 2) and (1, 2) are best.
    assert bucket_picks(scores, rows, "accuracy", buckets=2, higher_is_better=False).regret == pytest.approx(0)
    assert bucket_picks(scores, rows, "accuracy", buckets=1).picked == pytest.approx(0.6)
    assert bucket_picks(scores, rows, "accuracy").buckets == 4  # ten buckets, no two stitches in one


def test_stitches_without_a_score_are_left_out() -> None:
    scores = scores_of(np.array([[1.0, 2.0, 0.0], [3.0, 0.5, 0.0]]), [3, 3], [6, 6, 8], (0, 1))
    forbidden = np.array([[True, False, True], [True, True, True]])
    scores = dataclasses.replace(scores, costs=dataclasses.replace(scores.costs, allowed=forbidden))
    got = bucket_picks(scores, [row((1, 1), 0.9), row((2, 1), 0.4)], "accuracy", buckets=1)
    assert (got.picked, got.oracle, got.chance) == (0.4, 0.4, 0.4)


@pytest.mark.parametrize("rows", [[], [anchor(0, 0.5)], [row((1, 1), 0.5, anchors=(0, 2))]])
def test_nothing_to_pick_from_is_refused(rows: list[ResultRow]) -> None:
    scores = scores_of(np.ones((1, 2)), [3], [6, 6], (0, 1))
    with pytest.raises(ValueError, match="got no measured stitch with a score"):
        bucket_picks(scores, rows, "accuracy")
    with pytest.raises(ValueError, match="got no measured stitch with a score"):
        bucket_picks(scores, [row((1, 0), 0.5)], "accuracy")
