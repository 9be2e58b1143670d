"""Trade-off curves: quality against cost, its area, its Pareto front, and how well a score foretells it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from klas_hf import plotting
from klas_hf.budgets import COSTS
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

    def cost(self, name: str) -> float:
        """A cost by name (see `ResultRow.cost`); of seconds, the mean over seeds."""
        costs = [row.cost(name) for row in self.rows]
        return costs[0] if min(costs) == max(costs) else fmean(costs)


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
    """Whether more of a metric is better: of losses, perplexities, divergences and errors it is not.

    Example:
        >>> higher_is_better("accuracy"), higher_is_better("loss")
        (True, False)
    """
    return not any(word in metric for word in ("loss", "perplexity", "divergence", "error", "bits_per_byte"))


class TradeoffCurve:
    """Quality of several models against their MACs (the curves of KLAS and SN-Net, and their AUC), or another cost.

    Args:
        rows: measured models; a model counts with its mean over seeds, and of several models of one cost the best.
        metric: key of `ResultRow.metrics`.
        higher_is_better: False for losses.
        label: name in plots.
        cost: what models are compared over: "macs", "parameters", "kv_bytes_per_token", and where rows were measured
            with a usage "weight_bytes", "seconds", "latency" or "peak_bytes".

    Attributes:
        costs, values: cost and quality of the points, by cost.
        macs: MACs of the points.
        rows: all rows, by cost.

    Raises:
        ValueError: no rows, or a row that lacks the metric or the cost.

    Example:
        >>> points = [(10, 0.5), (20, 0.4), (30, 0.9)]
        >>> measured = [ResultRow("klas", None, 0, macs, 1, {"accuracy": value}) for macs, value in points]
        >>> curve = TradeoffCurve(measured, "accuracy")
        >>> round(curve.auc(), 3), round(curve.auc((10, 20)), 3), curve.pareto().macs.tolist()
        (0.55, 0.45, [10, 30])
    """

    def __init__(
        self,
        rows: Iterable[ResultRow],
        metric: str,
        *,
        higher_is_better: bool = True,
        label: str = "",
        cost: str = "macs",
    ):
        self.rows = tuple(sorted(rows, key=lambda row: row.cost(cost)))
        self.metric, self.higher_is_better, self.label, self.cost = metric, higher_is_better, label, cost
        if not self.rows:
            raise ValueError("got no rows; expected at least one measured model")
        best: dict[float, MeasuredModel] = {}
        for model in sorted(measured_models(self.rows, metric), key=lambda model: model.cost(cost)):
            there = best.setdefault(model.cost(cost), model)
            if (model.value > there.value) == higher_is_better and model.value != there.value:
                best[model.cost(cost)] = model
        self._best = list(best.values())
        self.macs = np.array([model.macs for model in self._best])
        self.costs = np.array(list(best))
        self.values = np.array([model.value for model in self._best])

    def auc(self, interval: tuple[float, float] | None = None) -> float:
        """Area under the curve over normalised costs, which is the mean quality over the interval of costs.

        Args:
            interval: costs from and to; None takes the curve's own span. Compare curves on a common interval
                (`common_interval`) only: the paper does not say which one its figures are over.

        Raises:
            ValueError: the interval reaches outside the measured costs, or is empty.
        """
        low, high = interval or (self.costs[0], self.costs[-1])
        if not self.costs[0] <= low < high <= self.costs[-1]:
            name = "MACs" if self.cost == "macs" else self.cost
            raise ValueError(
                f"got the interval {low:,} to {high:,} {name}; expected a non-empty one within the measured "
                f"costs {self.costs[0]:,} to {self.costs[-1]:,}"
            )
        inner = self.costs[(self.costs > low) & (self.costs < high)]
        x = np.concatenate([[low], inner, [high]]).astype(float)
        return float(np.trapezoid(np.interp(x, self.costs, self.values), x) / (high - low))

    def pareto(self) -> "TradeoffCurve":
        """The Pareto front: models whose mean quality over seeds nothing cheaper reaches; lucky rows do not count."""
        signed = self.values if self.higher_is_better else -self.values
        before = np.concatenate([[-np.inf], np.maximum.accumulate(signed)[:-1]])
        front = [row for model, is_on in zip(self._best, signed > before, strict=True) if is_on for row in model.rows]
        about: dict[str, Any] = {"higher_is_better": self.higher_is_better, "label": self.label, "cost": self.cost}
        return TradeoffCurve(front, self.metric, **about)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw the curve, quality against cost; writes PNG and SVG if `path` is given."""
        return plot_curves([self], path=path)


def common_interval(curves: Sequence[TradeoffCurve]) -> tuple[float, float]:
    """Costs over which all curves are measured: what areas that are compared must be taken over.

    Args:
        curves: at least one, all over one cost.

    Returns:
        The lowest and the highest common cost, in MACs or what the curves are over.

    Raises:
        ValueError: there are none, or curves over different costs.

    Example:
        >>> whole, part = TradeoffCurve(rows, "loss"), TradeoffCurve(rows[1:], "loss")
        >>> common_interval([whole, part]) == (rows[1].macs, rows[-1].macs)
        True
    """
    _check_costs(curves)
    low, high = max(float(c.costs[0]) for c in curves), min(float(c.costs[-1]) for c in curves)
    if low >= high:
        name = "MACs" if curves[0].cost == "macs" else curves[0].cost
        raise ValueError(
            f"got curves with no common costs (from {low:,.6g} to {high:,.6g} {name}); expected an overlap"
        )
    return low, high


def plot_curves(
    curves: Sequence[TradeoffCurve],
    *,
    points: Mapping[str, Sequence[MeasuredModel]] | None = None,
    title: str = "",
    path: str | Path | None = None,
) -> "Figure":
    """Several curves in one figure, quality against millions of MACs, or what else they are over.

    Anchors that were not fine-tuned are marked where other models were.

    Args:
        curves: at least one; each is named by its label, or else by its metric.
        points: name → models that are marked; None marks none.
        title: above the figure; "" names metric and models.
        path: where PNG and SVG are written, whatever its suffix; None writes nothing.

    Returns:
        The figure of matplotlib.

    Raises:
        ValueError: no curves, or curves over different costs.

    Example:
        >>> curve = TradeoffCurve(rows, "loss", higher_is_better=False, label="all")
        >>> figure = plot_curves([curve, curve.pareto()], path=folder / "curve")
        >>> sorted(path.name for path in folder.iterdir())
        ['curve.png', 'curve.svg']
    """
    if not curves:
        raise ValueError("got no curves to plot; expected at least one TradeoffCurve")
    cost = _check_costs(curves)
    axis, unit = COSTS[cost]
    series = [plotting.Series(c.label or c.metric, list(c.costs / unit), list(c.values)) for c in curves]
    untuned = untuned_beside_tuned(row for curve in curves for row in curve.rows)
    marked = dict(points or {})
    if untuned:
        marked["anchors, not tuned"] = measured_models(untuned, curves[0].metric)
    for name, models in marked.items():
        places, values = [model.cost(cost) / unit for model in models], [model.value for model in models]
        series.append(plotting.Series(name, places, values, line=False))
    title = title or f"{curves[0].metric} of models of every size"
    return plotting.lines(series, axis, curves[0].metric, title, path)


def _check_costs(curves: Sequence[TradeoffCurve]) -> str:
    """The one cost that all curves are over; ValueError where there are several."""
    found = sorted({curve.cost for curve in curves})
    if len(found) > 1:
        raise ValueError(f"got curves over {' and '.join(found)}; expected one cost for all")
    return found[0]


def curves_by_rule(rows: Sequence[ResultRow], metric: str, cost: str = "macs") -> list[TradeoffCurve]:
    """One curve per rule that chose stitched models, each with all anchors; of anchors alone, one.

    Args:
        rows: measured models.
        metric, cost: as for `TradeoffCurve`.

    Raises:
        ValueError: no rows, or a row that lacks the metric or the cost.

    Example:
        >>> [(curve.label, len(curve.macs) == len(rows)) for curve in curves_by_rule(rows, "loss")]
        [('all', True)]
    """
    anchors = [row for row in rows if not row.joints]
    rules = dict.fromkeys(row.rule for row in rows if row.joints)
    chosen = {rule: [row for row in rows if row.rule == rule and row.joints] for rule in rules} or {"anchors": []}
    better = higher_is_better(metric)
    return [
        TradeoffCurve([*anchors, *of_rule], metric, higher_is_better=better, label=rule, cost=cost)
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
