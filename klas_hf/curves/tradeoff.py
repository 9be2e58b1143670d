"""Trade-off curves: quality against cost, its area, its Pareto front, and how well a score foretells it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from klas_hf import plotting
from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow
from klas_hf.scores.values import StitchScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TradeoffCurve:
    """Quality of several models against their MACs (the curves of KLAS and SN-Net, and their AUC).

    Args:
        rows: measured models; several rows of one cost (several seeds, say) count with their mean.
        metric: key of `ResultRow.metrics`.
        higher_is_better: False for losses.
        label: name in plots.

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
        for row in self.rows:
            row.value(metric)
        self.macs = np.unique([row.macs for row in self.rows])
        self.values = np.array([self._mean_at(macs) for macs in self.macs])

    def _mean_at(self, macs: float) -> float:
        return float(np.mean([row.metrics[self.metric] for row in self.rows if row.macs == macs]))

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
        """The Pareto front: costs whose mean quality no lower cost reaches. Means over seeds count, not lucky rows."""
        signed = self.values if self.higher_is_better else -self.values
        before = np.concatenate([[-np.inf], np.maximum.accumulate(signed)[:-1]])
        kept = set(self.macs[signed > before].tolist())
        front = [row for row in self.rows if row.macs in kept]
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


def plot_curves(curves: Sequence[TradeoffCurve], *, title: str = "", path: str | Path | None = None) -> "Figure":
    """Several curves in one figure, quality against millions of MACs.

    Args:
        curves: at least one; each is named by its label, or else by its metric.
        title: above the figure.
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
    return plotting.lines(series, "MACs (millions)", curves[0].metric, title, path)


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

    A stitch counts once, with its mean over seeds; a row that several rules share (`evaluate_stitches`) counts once.

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
        >>> report.stitches == len(scores.stitches), -1 <= report.spearman <= 1
        (True, True)
    """
    sign = -1.0 if higher_is_better else 1.0
    anchors = scores.costs.source, scores.costs.target
    measured: dict[tuple[int, int], dict[int, float]] = {}
    for row in rows:
        if row.stitch is not None and row.anchors == anchors:
            measured.setdefault(row.stitch, {})[row.seed] = row.value(metric)
    pairs = [(scores.value_of(Stitch(*pair)), sign * fmean(seeds.values())) for pair, seeds in measured.items()]
    table = np.array([pair for pair in pairs if np.isfinite(pair[0])]).reshape(-1, 2)
    if len(table) < 3:
        raise ValueError(f"got {len(table)} stitches with a finite score; expected at least three to correlate")
    return CorrelationReport(_pearson(table), _pearson(np.apply_along_axis(_ranks, 0, table)), len(table))


def spearman(values: NDArray, drops: NDArray) -> float:
    """Rank correlation of two series; ties share their mean rank, and a constant series gives nan."""
    return _pearson(np.stack([_ranks(values), _ranks(drops)], axis=1))


def _pearson(table: NDArray) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(table[:, 0], table[:, 1])[0, 1])


def _ranks(values: NDArray) -> NDArray:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
