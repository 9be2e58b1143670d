"""Comparisons of curves against dense grids, and cases done by hand."""

import dataclasses
import re
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from experiments.curve_comparison import (
    common_quality,
    cost_at_equal_quality,
    format_sweep,
    gain_at_equal_cost,
    sweep,
    viable_stitches,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from test_curves import row, scores

from klas_hf.curves.tradeoff import TradeoffCurve
from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow
from klas_hf.selection.klas import select_stitches

points = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20)), min_size=2, max_size=9)


def curve(*pairs: tuple[int, float], higher: bool = True) -> TradeoffCurve:
    rows = [row(*pair, seed=seed) for seed, pair in enumerate(pairs)]
    return TradeoffCurve(rows, "accuracy", higher_is_better=higher)


def test_gain_by_hand() -> None:
    """The baseline's point at 30 is beaten by a cheaper one, so its front stays level from 20 on."""
    ours, baseline = curve((10, 0.5), (40, 0.8)), curve((10, 0.5), (20, 0.6), (30, 0.4), (40, 0.6))
    gain = gain_at_equal_cost(ours, baseline)
    assert (gain.largest, gain.macs) == (pytest.approx(0.2), 40)
    assert gain.mean == pytest.approx(0.5 * 0.2 * 20 / 30)
    part = gain_at_equal_cost(ours, baseline, (15, 30))
    assert (part.largest, part.macs) == (pytest.approx(0.1), 30)
    assert part.mean == pytest.approx(0.5 * 0.1 * 10 / 15)
    other = gain_at_equal_cost(baseline, ours)
    assert other.largest == pytest.approx(0.0, abs=1e-12) and other.mean == pytest.approx(-gain.mean)


def test_losses_gain_by_being_lower() -> None:
    ours, baseline = curve((10, 5.0), (20, 3.0), higher=False), curve((10, 5.0), (20, 4.0), higher=False)
    gain = gain_at_equal_cost(ours, baseline)
    assert (gain.largest, gain.mean, gain.macs) == (pytest.approx(1.0), pytest.approx(0.5), 20)
    saving = cost_at_equal_quality(ours, baseline)
    assert (saving.ratio, saving.quality) == (pytest.approx(20 / 15), pytest.approx(4.0))
    assert (saving.macs, saving.baseline_macs) == (pytest.approx(15), pytest.approx(20))


def front_at(pairs: list[tuple[int, float]], macs: np.ndarray) -> np.ndarray:
    """Quality of the Pareto front at each cost: the points that no cheaper mean matches, joined by straight lines."""
    means = {c: fmean(v for other, v in pairs if other == c) for c, _ in pairs}
    kept = [(c, v) for c, v in sorted(means.items()) if all(w < v for d, w in means.items() if d < c)]
    return np.interp(macs, *zip(*kept, strict=True))


@given(points, points)
@settings(max_examples=150, deadline=None)
def test_gains_and_savings_are_those_of_a_dense_grid(one: list, other: list) -> None:
    ours, baseline = curve(*one), curve(*other)
    low, high = max(ours.macs[0], baseline.macs[0]), min(ours.macs[-1], baseline.macs[-1])
    if low >= high:
        with pytest.raises(ValueError, match="no common costs"):
            gain_at_equal_cost(ours, baseline)
    else:
        grid = np.linspace(low, high, int(high - low) * 40 + 1)  # holds every whole number
        difference = front_at(one, grid) - front_at(other, grid)
        gain = gain_at_equal_cost(ours, baseline)
        assert gain.largest == pytest.approx(difference.max(), abs=1e-9)
        assert gain.mean == pytest.approx(integrate.trapezoid(difference, grid) / (high - low), abs=1e-9)
        at = np.array([gain.macs])
        assert front_at(one, at)[0] - front_at(other, at)[0] == pytest.approx(gain.largest, abs=1e-9)
    worst = max(front_at(pairs, np.array([0]))[0] for pairs in (one, other))
    best = min(front_at(pairs, np.array([99]))[0] for pairs in (one, other))
    if worst > best:
        with pytest.raises(ValueError, match="got curves with no common accuracy"):
            cost_at_equal_quality(ours, baseline)
        return
    assert common_quality([ours, baseline]) == (worst, best)
    saving = cost_at_equal_quality(ours, baseline)
    costs = np.linspace(0.5, 31, 12_201)
    for quality in (worst, best, (2 * worst + best) / 3, saving.quality):
        # The least cost at which each front reaches this quality.
        cheapest = [costs[np.argmax(front_at(pairs, costs) >= quality - 1e-9)] for pairs in (one, other)]
        cheapest = [max(cost, min(c for c, _ in pairs)) for cost, pairs in zip(cheapest, (one, other), strict=True)]
        assert cheapest[1] / cheapest[0] <= saving.ratio * 1.01 + 0.01
        if quality == saving.quality:
            assert cheapest == pytest.approx([saving.macs, saving.baseline_macs], abs=0.01)
    assert saving.ratio == pytest.approx(saving.baseline_macs / saving.macs)


def test_saving_by_hand() -> None:
    """Equal at both ends; half way up ours costs 15, the baseline's 30."""
    ours, baseline = curve((10, 0.5), (15, 0.7), (40, 0.9)), curve((10, 0.5), (30, 0.7), (40, 0.9))
    saving = cost_at_equal_quality(ours, baseline)
    assert (saving.ratio, saving.quality, saving.macs, saving.baseline_macs) == (2.0, 0.7, 15, 30)
    assert cost_at_equal_quality(baseline, ours).ratio == 1.0


def test_what_cannot_be_compared_is_refused() -> None:
    ours = curve((10, 0.5), (20, 0.7))
    worse = curve((10, 0.1), (20, 0.2))
    with pytest.raises(ValueError, match="no common accuracy: one begins at 0.5, another ends at 0.2"):
        common_quality([ours, worse])
    loss = curve((10, 0.1), (20, 0.2), higher=False)
    named = TradeoffCurve([ResultRow("klas", None, 0, 9, 1, {"loss": 1.0})], "loss")
    for other in (loss, named):
        for compare in (gain_at_equal_cost, cost_at_equal_quality):
            with pytest.raises(ValueError, match=r"\(metric, higher_is_better\) = \('accuracy', True\) and"):
                compare(ours, other)
    for interval in ((9, 15), (15, 21), (15, 15)):
        with pytest.raises(ValueError, match="expected a non-empty one within the common costs 10 to 20"):
            gain_at_equal_cost(ours, worse, interval)


def elsewhere(one: ResultRow, **changes: Any) -> ResultRow:
    """A stitch's row between the anchors 1 and 2."""
    stitch = dataclasses.replace(one.stitch, source=1, target=2)
    return dataclasses.replace(one, path=stitch, **changes)


def measured() -> tuple[list[ResultRow], list[ResultRow]]:
    """Rows of all stitches, one of them with two seeds and by two rules, and of the anchors."""
    made, generator = scores(), np.random.default_rng(4)
    rows = []
    for stitch in made.stitches:
        macs, _ = made.costs.of(stitch)
        rows.append(row(macs, float(generator.random()), (stitch.source_stop, stitch.target_start)))
    chosen = select_stitches(made, buckets=2, threshold=0.1)[0]
    first = next(one for one in rows if one.is_of(chosen))
    rows += [
        dataclasses.replace(first, seed=1, metrics={"accuracy": 0.9}),
        dataclasses.replace(first, rule="random"),
        elsewhere(first, metrics={"accuracy": 99.0}),
    ]
    total = made.costs.source_total, made.costs.target_total
    return rows, [row(total[0], 0.1), row(total[1], 0.9)]


def test_a_sweep_is_every_selection_in_turn() -> None:
    rows, anchors = measured()
    thresholds, counts = (0.1, 2.0), (2, 5)
    got = sweep(scores(), rows, "accuracy", anchors=anchors, thresholds=thresholds, buckets=counts)
    assert [(one.threshold, one.buckets) for one in got] == [(0.1, 2), (2.0, 2), (0.1, 5), (2.0, 5)]
    for one in got:
        selection = select_stitches(scores(), threshold=one.threshold, buckets=one.buckets)
        values, all_rows = [], list(anchors)
        for stitch in selection:
            by_seed = {r.seed: r for r in rows if r.is_of(stitch)}
            values.append(fmean(r.metrics["accuracy"] for r in by_seed.values()))
            all_rows += by_seed.values()
        assert one.stitches == len(selection) and one.mean == pytest.approx(fmean(values))
        assert one.auc == pytest.approx(TradeoffCurve(all_rows, "accuracy").auc())
    assert len({one.stitches for one in got}) > 1
    narrow = sweep(scores(), rows, "accuracy", anchors=anchors, thresholds=[2.0], buckets=[2], interval=(4, 5))[0]
    assert (narrow.mean, narrow.stitches) == (got[1].mean, got[1].stitches) and narrow.auc != got[1].auc


def test_a_sweep_covers_the_papers_settings_and_several_pairs() -> None:
    rows, anchors = measured()
    usual = sweep(scores(), rows, "accuracy", anchors=anchors)
    assert {one.threshold for one in usual} == {0.01, 0.03, 0.05, 0.10} and len(usual) == 12
    assert {one.buckets for one in usual} == {10, 15, 20}
    moved = dataclasses.replace(scores(), costs=dataclasses.replace(scores().costs, source=1, target=2))
    others = [elsewhere(one) for one in rows if one.stitch and one.stitch.source == 0]
    both = sweep([scores(), moved], rows[:-1] + others, "accuracy", anchors=anchors)
    assert [one.stitches for one in both] == [2 * one.stitches for one in usual]
    assert [one.mean for one in both] == pytest.approx([one.mean for one in usual])


def test_a_sweep_needs_rows_of_whatever_it_may_select_and_of_the_anchors() -> None:
    rows, anchors = measured()
    chosen = select_stitches(scores(), threshold=0.05, buckets=10)[0]
    without = [one for one in rows if not one.is_of(chosen)]
    with pytest.raises(ValueError, match=re.escape(f"got no rows of 1 selected stitches, {chosen} among")):
        sweep(scores(), without, "accuracy", anchors=anchors)
    with pytest.raises(ValueError, match="got no rows of anchors"):
        sweep(scores(), rows, "accuracy", anchors=[])


def test_sweeps_are_shown_as_a_table() -> None:
    rows, anchors = measured()
    got = sweep(scores(), rows, "accuracy", anchors=anchors, thresholds=[0.05], buckets=[10])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in format_sweep(got, "top-1").splitlines()]
    assert cells[0] == ["τ", "buckets", "stitches", "top-1", "AUC"]
    assert cells[2] == ["5%", "10", str(got[0].stitches), f"{got[0].mean:.4f}", f"{got[0].auc:.4f}"]
    assert "mean quality" in format_sweep(got)


def test_viable_stitches_lie_on_or_above_the_line_between_their_anchors() -> None:
    def measured(path: tuple[int, ...] | str, macs: int, values: list[float]) -> list[ResultRow]:
        return [ResultRow("every", path, seed, macs, 0, {"q": value}) for seed, value in enumerate(values)]

    ends = [
        measured(f"{k}[:]", macs, [quality]) for k, (macs, quality) in enumerate([(100, 0.2), (200, 0.6), (400, 0.8)])
    ]
    stitches = [
        measured((1, 1), 150, [0.4]),  # on the line
        measured((1, 2), 150, [0.39]),
        measured((2, 1, 1, 2), 300, [0.9, 0.5]),  # its mean is on the line
        measured((2, 2, 0, 2), 250, [0.9, 0.2]),  # .55, above .5
        measured((3, 3, 1, 2), 500, [0.79]),  # dearer than the target: it must be as good
    ]
    rows = [one for group in ends + stitches for one in group]
    assert viable_stitches(rows, "q") == {Stitch(1, 1, 0, 1), Stitch(2, 1, 1, 2), Stitch(2, 2, 0, 2)}
    assert Stitch(1, 2, 0, 1) in viable_stitches(rows, "q", higher_is_better=False)
    with pytest.raises(ValueError, match=r"without rows of \[2\]"):
        viable_stitches([one for group in ends[:2] + stitches for one in group], "q")
