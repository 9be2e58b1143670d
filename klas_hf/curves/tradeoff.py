"""Trade-off curves: quality against cost, its area, its Pareto front, and how well a score foretells it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from klas_hf import plotting
from klas_hf.maths.correlations import pearson, spearman
from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow, by_model, untuned_beside_tuned
from klas_hf.scores.values import StitchScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class MeasuredModel:
    """One model with its mean over seeds.

    Attributes:
        value: mean of the metric.
        rows: one per seed, of one path, cost and training.
    """

    value: float
    rows: tuple[ResultRow, ...]

    @property
    def macs(self) -> int:
        """MACs, the same for all seeds."""
        return self.rows[0].macs


def measured_models(rows: Iterable[ResultRow], metric: str) -> list[MeasuredModel]:
    """Every model among rows, with its mean over seeds; a row that several rules share counts once.

    Raises:
        ValueError: a row that lacks the metric.

    Example:
        >>> seeds = [ResultRow("klas", (8, 14), seed, 10, 1, {"loss": 2.0 + seed}) for seed in (0, 1)]
        >>> [(model.macs, model.value) for model in measured_models(seeds, "loss")]
        [(10, 2.5)]
    """
    return [MeasuredModel(fmean(row.value(metric) for row in group), tuple(group)) for group in by_model(rows)]


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better: of losses and perplexities it is not.

    Example:
        >>> higher_is_better("accuracy"), higher_is_better("loss")
        (True, False)
    """
    return not any(word in metric for word in ("loss", "perplexity"))


class TradeoffCurve:
    """Quality of several models against their MACs (the curves of KLAS and SN-Net, and their AUC).

    Args:
        rows: measured models; a model counts with its mean over seeds, and of several models of one cost the best.
        metric: key of `ResultRow.metrics`.
        higher_is_better: False for losses.
        label: name in plots.

    Attributes:
        macs, values: cost and quality of the points, by cost.
        rows: all rows, by cost.

    Raises:
        ValueError: no rows, or a row that lacks the metric.

    Example:
        >>> points = [(10, 0.5), (20, 0.4), (30, 0.9)]
        >>> measured = [ResultRow("klas", None, 0, macs, 1, {"accuracy": value}) for macs, value in points]
        >>> curve = TradeoffCurve(measured, "accuracy")
        >>> round(curve.auc(), 3), round(curve.auc((10, 20)), 3), curve.pareto().macs.tolist()
        (0.55, 0.45, [10, 30])
    """

    def __init__(self, rows: Iterable[ResultRow], metric: str, *, higher_is_better: bool = True, label: str = ""):
        self.rows = tuple(sorted(rows, key=lambda row: row.macs))
        self.metric, self.higher_is_better, self.label = metric, higher_is_better, label
        if not self.rows:
            raise ValueError("got no rows; expected at least one measured model")
        best: dict[int, MeasuredModel] = {}
        for model in measured_models(self.rows, metric):
            there = best.setdefault(model.macs, model)
            if (model.value > there.value) == higher_is_better and model.value != there.value:
                best[model.macs] = model
        self._best = list(best.values())
        self.macs = np.array([model.macs for model in self._best])
        self.values = np.array([model.value for model in self._best])

    def auc(self, interval: tuple[float, float] | None = None) -> float:
        """Area under the curve over normalised MACs, which is the mean quality over the interval of costs.

        Args:
            interval: MACs from and to; None takes the curve's own span. Compare curves on a common interval
                (`common_interval`) only: the paper does not say which one its figures are over.

        Raises:
            ValueError: the interval reaches outside the measured costs, or is empty.
        """
        low, high = interval or (self.macs[0], self.macs[-1])
        if not self.macs[0] <= low < high <= self.macs[-1]:
            raise ValueError(
                f"got the interval {low:,} to {high:,} MACs; expected a non-empty one within the measured "
                f"costs {self.macs[0]:,} to {self.macs[-1]:,}"
            )
        inner = self.macs[(self.macs > low) & (self.macs < high)]
        x = np.concatenate([[low], inner, [high]]).astype(float)
        return float(np.trapezoid(np.interp(x, self.macs, self.values), x) / (high - low))

    def pareto(self) -> "TradeoffCurve":
        """The Pareto front: models whose mean quality over seeds nothing cheaper reaches; lucky rows do not count."""
        signed = self.values if self.higher_is_better else -self.values
        before = np.concatenate([[-np.inf], np.maximum.accumulate(signed)[:-1]])
        front = [row for model, is_on in zip(self._best, signed > before, strict=True) if is_on for row in model.rows]
        return TradeoffCurve(front, self.metric, higher_is_better=self.higher_is_better, label=self.label)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw the curve, quality against millions of MACs; writes PNG and SVG if `path` is given."""
        return plot_curves([self], path=path)


def common_interval(curves: Sequence[TradeoffCurve]) -> tuple[float, float]:
    """MACs over which all curves are measured: what areas that are compared must be taken over.

    Args:
        curves: at least one.

    Returns:
        The lowest and the highest common cost, in MACs.

    Raises:
        ValueError: there are none.

    Example:
        >>> whole, part = TradeoffCurve(rows, "loss"), TradeoffCurve(rows[1:], "loss")
        >>> common_interval([whole, part]) == (rows[1].macs, rows[-1].macs)
        True
    """
    low, high = max(float(c.macs[0]) for c in curves), min(float(c.macs[-1]) for c in curves)
    if low >= high:
        raise ValueError(f"got curves with no common costs (from {low:,.0f} to {high:,.0f} MACs); expected an overlap")
    return low, high


def plot_curves(
    curves: Sequence[TradeoffCurve],
    *,
    points: Mapping[str, Sequence[MeasuredModel]] | None = None,
    title: str = "",
    path: str | Path | None = None,
) -> "Figure":
    """Several curves in one figure, quality against millions of MACs.

    Anchors that were not fine-tuned are marked where other models were.

    Args:
        curves: at least one; each is named by its label, or else by its metric.
        points: name → models that are marked; None marks none.
        title: above the figure; "" names metric and models.
        path: where PNG and SVG are written, whatever its suffix; None writes nothing.

    Returns:
        The figure of matplotlib.

    Raises:
        ValueError: no curves.

    Example:
        >>> curve = TradeoffCurve(rows, "loss", higher_is_better=False, label="all")
        >>> figure = plot_curves([curve, curve.pareto()], path=folder / "curve")
        >>> sorted(path.name for path in folder.iterdir())
        ['curve.png', 'curve.svg']
    """
    if not curves:
        raise ValueError("got no curves to plot; expected at least one TradeoffCurve")
    series = [plotting.Series(c.label or c.metric, list(c.macs / 1e6), list(c.values)) for c in curves]
    untuned = untuned_beside_tuned(row for curve in curves for row in curve.rows)
    marked = dict(points or {})
    if untuned:
        marked["anchors, not tuned"] = measured_models(untuned, curves[0].metric)
    for name, models in marked.items():
        macs, values = [model.macs / 1e6 for model in models], [model.value for model in models]
        series.append(plotting.Series(name, macs, values, line=False))
    title = title or f"{curves[0].metric} of models of every size"
    return plotting.lines(series, "MACs (millions)", curves[0].metric, title, path)


def curves_by_rule(rows: Sequence[ResultRow], metric: str) -> list[TradeoffCurve]:
    """One curve per rule that chose stitched models, each with all anchors; of anchors alone, one.

    Raises:
        ValueError: no rows, or a row that lacks the metric.

    Example:
        >>> [(curve.label, len(curve.macs) == len(rows)) for curve in curves_by_rule(rows, "loss")]
        [('all', True)]
    """
    anchors = [row for row in rows if not row.joints]
    rules = dict.fromkeys(row.rule for row in rows if row.joints)
    chosen = {rule: [row for row in rows if row.rule == rule and row.joints] for rule in rules} or {"anchors": []}
    better = higher_is_better(metric)
    return [
        TradeoffCurve([*anchors, *of_rule], metric, higher_is_better=better, label=rule)
        for rule, of_rule in chosen.items()
    ]


@dataclass(frozen=True)
class CorrelationReport:
    """How well a score foretells the quality that a stitch reaches (KLAS App. D, Tab. 9).

    Attributes:
        pearson, spearman: correlation of the score (lower is better) with the drop below the best anchor.
        stitches: number of stitches compared.
    """

    pearson: float
    spearman: float
    stitches: int


def correlation_report(
    scores: StitchScores, rows: Iterable[ResultRow], metric: str, *, higher_is_better: bool = True
) -> CorrelationReport:
    """Correlate scores with measured quality over all stitches of their two anchors that have rows and a finite score.

    A model counts once, with its mean over seeds; a row that several rules share (`evaluate_stitches`) counts once.

    Args:
        scores: of the two anchors, lower being better.
        rows: measurements; rows of anchors, and of other pairs of anchors, do not count.
        metric: key of `ResultRow.metrics`.
        higher_is_better: False for losses.

    Returns:
        Pearson's and Spearman's correlation of the score with the loss of quality, -1 to 1: 1 foretells it best.

    Raises:
        ValueError: fewer than three such stitches, or a row that lacks the metric.

    Example:
        >>> report = correlation_report(scores, rows, "loss", higher_is_better=False)
        >>> report.stitches == sum(row.joints > 0 for row in rows), -1 <= report.spearman <= 1
        (True, True)
    """
    sign = -1.0 if higher_is_better else 1.0
    known = [(scores.value_of(stitch), sign * value) for stitch, value in scored_stitches(scores, rows, metric)]
    if len(known) < 3:
        raise ValueError(f"got {len(known)} stitches with a finite score; expected at least three to correlate")
    values, drops = zip(*known, strict=True)
    return CorrelationReport(pearson(values, drops), spearman(values, drops), len(known))


def scored_stitches(scores: StitchScores, rows: Iterable[ResultRow], metric: str) -> list[tuple[Stitch, float]]:
    """The measured stitches between the scores' anchors that have a finite score, with their mean over seeds."""
    anchors = scores.costs.source, scores.costs.target
    measured = measured_models((row for row in rows if row.joints), metric)
    stitches = [(model.rows[0].stitch, model.value) for model in measured]
    between = [(one, value) for one, value in stitches if one is not None and (one.source, one.target) == anchors]
    return [(stitch, value) for stitch, value in between if np.isfinite(scores.value_of(stitch))]
