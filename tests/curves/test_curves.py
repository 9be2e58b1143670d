"""Trade-off curves against numpy, scipy and cases done by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import integrate, stats

from klas_hf.curves.tradeoff import (
    TradeoffCurve,
    common_interval,
    correlation_report,
    curves_by_rule,
    higher_is_better,
    plot_curves,
)
from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow
from klas_hf.scores.values import StitchScores
from klas_hf.stitch_costs import StitchCosts

points = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8)), min_size=1, max_size=15)


def row(macs: int, value: float, path: tuple[int, int] | str | None = None, seed: int = 0) -> ResultRow:
    return ResultRow("klas", path, seed, macs, 1, {"accuracy": value})


def curve(*pairs: tuple[int, float], higher_is_better: bool = True) -> TradeoffCurve:
    return TradeoffCurve([row(*pair) for pair in pairs], "accuracy", higher_is_better=higher_is_better)


def test_area_by_hand() -> None:
    assert curve((10, 0.5), (20, 0.7)).auc() == pytest.approx(0.6)
    bent = curve((10, 0.0), (20, 1.0), (40, 1.0))
    assert bent.auc() == pytest.approx((5 + 20) / 30)
    assert bent.auc((15, 20)) == pytest.approx(0.75)
    assert bent.auc((15, 30)) == pytest.approx((0.75 * 5 + 10) / 15)
    assert bent.auc((12, 14)) == pytest.approx(0.3)


def test_area_is_scipys_at_any_cost_and_order() -> None:
    generator = np.random.default_rng(0)
    macs, values = generator.choice(10**12, 20, replace=False), generator.random(20)
    order = np.argsort(macs)
    made = curve(*zip(macs.tolist(), values.tolist(), strict=True))
    span = macs.max() - macs.min()
    assert made.auc() == pytest.approx(integrate.trapezoid(values[order], macs[order]) / span, rel=1e-9)
    low, high = macs[order][3] + 5.5, macs[order][-4] - 7.25
    grid = np.union1d(np.linspace(low, high, 20_001), macs[(macs > low) & (macs < high)])
    expected = integrate.trapezoid(np.interp(grid, macs[order], values[order]), grid) / (high - low)
    assert made.auc((low, high)) == pytest.approx(expected, rel=1e-9)


def test_a_flat_curve_has_its_height_as_area_on_any_interval() -> None:
    flat = curve((1, 0.4), (5, 0.4), (9, 0.4))
    assert [flat.auc(interval) for interval in (None, (1, 9), (2.5, 3))] == pytest.approx([0.4] * 3)


def test_several_seeds_count_with_their_mean() -> None:
    made = TradeoffCurve([row(10, 0.2, seed=0), row(20, 0.8), row(10, 0.4, seed=1)], "accuracy")
    assert made.macs.tolist() == [10, 20] and made.values.tolist() == pytest.approx([0.3, 0.8])
    assert made.auc() == pytest.approx(0.55)


def test_of_different_models_of_one_cost_the_best_counts() -> None:
    """Seeds of one path are averaged, different paths never: of .9 and .1 the better is .9, of losses .1."""
    rows = [row(10, 0.9, (1, 2)), row(10, 0.1, (2, 3)), row(20, 0.95, (3, 3))]
    assert TradeoffCurve(rows, "accuracy").values.tolist() == [0.9, 0.95]
    assert TradeoffCurve(rows, "accuracy", higher_is_better=False).values.tolist() == [0.1, 0.95]
    # Paths of three slices, another length of training; the mean over seeds decides, not the luckiest seed.
    lucky = [row(10, value, "0[:1] 1[1:2] 0[2:]", seed) for seed, value in enumerate((1.0, 0.5, 0.6))]
    longer = dataclasses.replace(rows[0], training={"max_steps": 9, "seed": 0}, metrics={"accuracy": 0.8})
    front = TradeoffCurve([*lucky, longer, *rows], "accuracy").pareto()
    assert front.values.tolist() == [0.9, 0.95] and list(front.rows) == [rows[0], rows[2]]
    assert TradeoffCurve([*lucky, longer, rows[1]], "accuracy").values.tolist() == [0.8]


def test_a_row_that_two_rules_share_counts_once() -> None:
    rows = [row(10, 0.2, (1, 2), 0), row(10, 0.8, (1, 2), 1)]
    shared = dataclasses.replace(rows[1], rule="esta")
    assert TradeoffCurve([*rows, shared], "accuracy").values.tolist() == [0.5]


def test_one_curve_per_rule_between_all_anchors() -> None:
    ends = [dataclasses.replace(row(macs, value, path), rule="anchor") for macs, value, path in (
        (1, 0.1, "0[:]"), (99, 0.9, "1[:]"))]  # fmt: skip
    chosen = [row(50, 0.5, (1, 2)), row(50, 0.7, "1[:1] 1[2:]"), dataclasses.replace(row(60, 0.6, (2, 2)), rule="esta")]
    klas, esta = curves_by_rule([*ends, *chosen], "accuracy")
    assert (klas.label, klas.macs.tolist(), klas.values.tolist()) == ("klas", [1, 50, 99], [0.1, 0.7, 0.9])
    assert (esta.label, esta.macs.tolist()) == ("esta", [1, 60, 99])
    (alone,) = curves_by_rule(ends, "accuracy")
    assert (alone.label, alone.macs.tolist()) == ("anchors", [1, 99])
    losses = [dataclasses.replace(one, metrics={"loss": one.metrics["accuracy"]}) for one in [*ends, *chosen]]
    assert curves_by_rule(losses, "loss")[0].values.tolist() == [0.1, 0.5, 0.9]  # of losses the lower
    assert [higher_is_better(name) for name in ("best_rouge1", "perplexity", "loss")] == [True, False, False]


def test_untuned_anchors_beside_tuned_models_are_marked_in_plots() -> None:
    ends = [row(10_000_000, 0.1, "0[:]"), row(90_000_000, 0.9, "1[:]")]
    start = row(50_000_000, 0.5, (1, 2))
    tuned = dataclasses.replace(start, training={"max_steps": 3})

    def names(*rows: ResultRow) -> list[str]:
        figure = plot_curves([TradeoffCurve(rows, "accuracy", label="klas")])
        return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]

    assert names(*ends, tuned) == ["klas", "anchors, not tuned"]
    assert names(*ends, start) == ["klas"]
    assert names(*(dataclasses.replace(one, training={"max_steps": 3}) for one in ends), tuned) == ["klas"]
    figure = plot_curves([TradeoffCurve([*ends, tuned], "accuracy")])
    assert figure.axes[0].lines[-1].get_xdata().tolist() == [10.0, 90.0]


@pytest.mark.parametrize("interval", [(9, 20), (10, 21), (15, 15), (18, 12), (0, 0)])
def test_intervals_outside_the_measured_costs_are_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected a non-empty one within the measured costs 10 to 20"):
        curve((10, 0.5), (20, 0.7)).auc(interval)


def test_a_single_cost_has_no_area() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        curve((10, 0.5)).auc()


def test_common_interval() -> None:
    one, other = curve((10, 0.1), (30, 0.2)), curve((20, 0.1), (50, 0.2))
    assert common_interval([one, other]) == common_interval([other, one]) == (20.0, 30.0)
    assert common_interval([one]) == (10.0, 30.0)
    assert one.auc(common_interval([one, other])) == pytest.approx(0.175)
    with pytest.raises(ValueError, match="no common costs.*expected an overlap"):
        common_interval([one, curve((30, 0.1), (40, 0.2))])


@given(points, st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_pareto_front_is_what_no_cheaper_row_matches(pairs: list[tuple[int, int]], higher: bool) -> None:
    # Rows of one cost are seeds of one model: their mean counts, and they stay or go together.
    means = {macs: np.mean([value for other, value in pairs if other == macs]) for macs, _ in pairs}

    def is_beaten(macs: int) -> bool:
        cheaper = [value for other, value in means.items() if other < macs]
        return any(value >= means[macs] if higher else value <= means[macs] for value in cheaper)

    expected = sorted(pair for pair in pairs if not is_beaten(pair[0]))
    rows = [row(macs, value, seed=seed) for seed, (macs, value) in enumerate(pairs)]
    front = TradeoffCurve(rows, "accuracy", higher_is_better=higher).pareto()
    assert sorted((r.macs, r.metrics["accuracy"]) for r in front.rows) == expected
    assert (front.metric, front.higher_is_better) == ("accuracy", higher)


def test_rows_are_needed_and_must_have_the_metric() -> None:
    with pytest.raises(ValueError, match="got no rows"):
        TradeoffCurve([], "accuracy")
    with pytest.raises(ValueError, match=r"got a row without 'rouge1'; it has \['accuracy'\]"):
        TradeoffCurve([row(1, 0.5)], "rouge1")


def test_plots_are_drawn_and_written(tmp_path: Path) -> None:
    one = TradeoffCurve([row(10_000_000, 0.5), row(20_000_000, 0.7)], "accuracy", label="KLAS")
    other = TradeoffCurve([row(15_000_000, 0.4)], "accuracy", label="ESTA")
    figure = plot_curves([one, other], title="both", path=tmp_path / "folder" / "curve.png")
    assert isinstance(figure, Figure)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("MACs (millions)", "accuracy", "both")
    assert one.plot().axes[0].get_title() == "accuracy of models of every size"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["KLAS", "ESTA"]
    assert axes.lines[0].get_xdata().tolist() == [10.0, 20.0]
    png, svg = (tmp_path / "folder" / f"curve.{suffix}" for suffix in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG") and b"<svg" in svg.read_bytes()
    one.plot(tmp_path / "alone")
    assert (tmp_path / "alone.png").exists() and (tmp_path / "alone.svg").exists()


def scores(m: int = 4, n: int = 6) -> StitchScores:
    generator = np.random.default_rng(1)
    zeros = np.zeros((m, n))
    blocks = np.ones(m, dtype=int), np.ones(n, dtype=int)
    return StitchScores(
        score="klas",
        cross=generator.gamma(1.0, size=(m, n)),
        capacity=generator.gamma(2.0, size=n - 1),
        cross_error=zeros,
        capacity_error=zeros[0, 1:],
        gamma_error=zeros[:, 1:],
        sequences=1,
        tokens=1,
        costs=StitchCosts(1, blocks[0], blocks[1], 1, m, n, 0, blocks[0], blocks[1], 1, 0),
    )


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("levels", [1000, 3])  # 3: many ties
def test_correlations_are_scipys(higher: bool, levels: int) -> None:
    made, generator = scores(), np.random.default_rng(2)
    sign = 1 if higher else -1
    noisy = {stitch: made.value_of(stitch) * levels + generator.normal() for stitch in made.stitches}
    measured = {stitch: np.round(drop) / levels for stitch, drop in noisy.items()}
    rows = [row(1, -sign * float(drop), (s.source_stop, s.target_start)) for s, drop in measured.items()]
    rows += [row(1, 99.0), row(1, 98.0, (2, 0))]  # an anchor; a stitch that has no score
    got = correlation_report(made, rows, "accuracy", higher_is_better=higher)
    x, y = [made.value_of(stitch) for stitch in measured], list(measured.values())
    assert got.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert got.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert got.stitches == len(made.stitches) == 20
    assert got.pearson > 0.5  # a score that foretells the drop correlates positively


def test_too_few_stitches_are_refused() -> None:
    rows = [row(1, 0.1, (1, 1)), row(1, 0.2, (1, 2)), row(1, 0.3), row(1, 0.4, (1, 0))]
    with pytest.raises(ValueError, match="got 2 stitches with a finite score; expected at least three"):
        correlation_report(scores(), rows, "accuracy")
    with pytest.raises(ValueError, match="got 0 stitches"):
        correlation_report(scores(), [], "accuracy")
    with pytest.raises(ValueError, match=r"got a row without 'rouge1'; it has \['accuracy'\]"):
        correlation_report(scores(), rows, "rouge1")


def test_a_stitch_counts_once_in_correlations() -> None:
    """With its mean over seeds, however many rules chose it."""
    made = scores()
    values = {(1, 1): [0.1, 0.5], (1, 2): [0.8], (2, 3): [0.4, 0.4, 0.1], (3, 3): [0.7]}
    rows = [row(1, value, pair, seed) for pair, seeds in values.items() for seed, value in enumerate(seeds)]
    repeated = [dataclasses.replace(one, rule="esta") for one in rows if one.is_of((1, 1)) and one.seed == 0]
    got = correlation_report(made, rows + repeated, "accuracy")
    drops = [-np.mean(seeds) for seeds in values.values()]
    assert got.pearson == pytest.approx(
        stats.pearsonr([made.value_of(Stitch(*pair)) for pair in values], drops).statistic
    )
    assert got.stitches == 4


def test_correlations_are_over_the_rows_of_the_scored_anchors_only() -> None:
    made = scores()
    rows = [row(1, 1 / (i + j), (i, j)) for i in (1, 2, 3) for j in (1, 2)]
    expected = correlation_report(made, rows, "accuracy")
    others = [
        dataclasses.replace(one, path=(*pair, 1, 2), metrics={"accuracy": 7.0 * pair[0]})
        for one in rows
        if (pair := (one.stitch.source_stop, one.stitch.target_start))
    ]
    assert correlation_report(made, others + rows, "accuracy") == expected
    moved = dataclasses.replace(made, costs=dataclasses.replace(made.costs, source=1, target=2))
    of_others = [dataclasses.replace(row(1, 7.0 * i, (i, j))) for i in (1, 2, 3) for j in (1, 2)]
    assert (
        correlation_report(moved, others + rows, "accuracy")
        == correlation_report(made, of_others, "accuracy")
        != expected
    )


def test_no_curves_cannot_be_plotted() -> None:
    with pytest.raises(ValueError, match="no curves"):
        plot_curves([])


def test_curves_are_drawn_over_any_cost(tmp_path: Path) -> None:
    """The dearer by MACs is the quicker: over seconds the front is another."""
    timed = [
        ResultRow("klas", None, seed, macs, 10 * macs, {"accuracy": value}, {"latency": 1 / macs, "peak_bytes": 8e6})
        for macs, value in ((10, 0.5), (20, 0.4), (40, 0.9))
        for seed in (0, 1)
    ]
    over = {cost: TradeoffCurve(timed, "accuracy", cost=cost) for cost in ("macs", "parameters", "latency")}
    assert over["latency"].costs.tolist() == [1 / 40, 1 / 20, 1 / 10]
    assert over["latency"].macs.tolist() == [40, 20, 10]
    assert over["latency"].pareto().costs.tolist() == [1 / 40] and over["macs"].pareto().costs.tolist() == [10, 40]
    assert over["parameters"].auc() == pytest.approx(over["macs"].auc())
    assert over["latency"].auc() == pytest.approx((0.65 * (1 / 20 - 1 / 40) + 0.45 / 20) / (1 / 10 - 1 / 40))
    assert common_interval([over["latency"]]) == (1 / 40, 1 / 10)
    figure = plot_curves(curves_by_rule(timed, "accuracy", "latency"), path=tmp_path / "curve")
    assert figure.axes[0].get_xlabel().startswith("ms per token")
    assert figure.axes[0].lines[0].get_xdata().tolist() == pytest.approx([25, 50, 100])
    same = TradeoffCurve(timed, "accuracy", cost="peak_bytes")
    assert (same.costs.tolist(), same.values.tolist()) == ([8e6], [0.9])
    with pytest.raises(ValueError, match="got curves over latency and macs; expected one cost for all"):
        plot_curves([over["latency"], over["macs"]])
    with pytest.raises(
        ValueError, match=r"got cost='weight_bytes' and a row that has \['latency', 'macs', .*with usage"
    ):
        TradeoffCurve(timed, "accuracy", cost="weight_bytes")
