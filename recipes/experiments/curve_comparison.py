"""Curves against each other: the gain at equal cost, the cost at equal quality, and sweeps of the selection's settings.

"+1.21 % top-1 at equal FLOPs" and "1.33× fewer FLOPs" of the KLAS paper are `gain_at_equal_cost` and
`cost_at_equal_quality`; Tab. 7 and 8 are `sweep`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from klas_hf.curves.tradeoff import MeasuredModel, TradeoffCurve, common_interval, measured_models
from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow
from klas_hf.scores.values import StitchScores
from klas_hf.selection.choice import StitchSelection
from klas_hf.selection.klas import select_stitches
from klas_hf.tables import markdown_table


@dataclass(frozen=True)
class Gain:
    """Quality of a curve above a baseline's at equal cost, in the metric's unit; positive is better.

    Attributes:
        largest, mean: over the common costs.
        macs: cost at which the largest gain occurs.

    Example:
        >>> Gain(largest=0.04, mean=0.01, macs=2_500_000.0).largest
        0.04
    """

    largest: float
    mean: float
    macs: float


def gain_at_equal_cost(
    curve: TradeoffCurve, baseline: TradeoffCurve, interval: tuple[float, float] | None = None
) -> Gain:
    """How much better a curve is than another that costs the same.

    Both count with their Pareto fronts, joined by straight lines. Past its last point a front stays level: a cheaper
    model serves there too.

    Args:
        curve, baseline: of one metric.
        interval: MACs from and to; None takes all common costs.

    Returns:
        The largest and the mean gain (KLAS's "+1.21 % top-1 at equal FLOPs" is a largest one).

    Raises:
        ValueError: other metrics, no common costs, or an interval that reaches outside them.

    Example:
        >>> def curve(*points):
        ...     rows = [ResultRow("", None, 0, macs, 1, {"top1": value}) for macs, value in points]
        ...     return TradeoffCurve(rows, "top1")
        >>> gain_at_equal_cost(curve((10, 0.5), (20, 0.75), (30, 1.0)), curve((10, 0.5), (20, 0.625), (30, 1.0)))
        Gain(largest=0.125, mean=0.0625, macs=20.0)
    """
    _check_comparable(curve, baseline)
    common = common_interval([curve, baseline])
    low, high = interval or common
    if not common[0] <= low < high <= common[1]:
        raise ValueError(
            f"got the interval {low:,} to {high:,} MACs; expected a non-empty one within the common costs "
            f"{common[0]:,.0f} to {common[1]:,.0f}"
        )
    fronts = curve.pareto(), baseline.pareto()
    points = np.unique(np.concatenate([[low, high], *(front.macs for front in fronts)]))
    points = points[(points >= low) & (points <= high)]
    ours, theirs = (np.interp(points, front.macs, _signed(front)) for front in fronts)
    difference = ours - theirs
    best = int(np.argmax(difference))
    mean = float(np.trapezoid(difference, points) / (high - low))
    return Gain(float(difference[best]), mean, float(points[best]))


@dataclass(frozen=True)
class Saving:
    """Cost of a curve below a baseline's at equal quality.

    Attributes:
        ratio: the baseline's MACs by the curve's, the largest over the common qualities; above 1 is cheaper.
        quality: where it occurs.
        macs, baseline_macs: the two costs there.

    Example:
        >>> Saving(ratio=1.25, quality=0.75, macs=20.0, baseline_macs=25.0).ratio
        1.25
    """

    ratio: float
    quality: float
    macs: float
    baseline_macs: float


def common_quality(curves: Sequence[TradeoffCurve]) -> tuple[float, float]:
    """The worst and the best quality that the Pareto fronts of all curves reach.

    Args:
        curves: at least one, of one metric.

    Returns:
        The two, in the metric's unit.

    Raises:
        ValueError: other metrics, or no common quality.

    Example:
        >>> best = ResultRow("", None, 0, 9_000_000, 1, {"loss": 1.0})
        >>> both = [TradeoffCurve(some, "loss", higher_is_better=False) for some in (rows, [*rows, best])]
        >>> common_quality(both) == (rows[0].metrics["loss"], 3.0)
        True
    """
    for curve in curves:
        _check_comparable(curves[0], curve)
    ends = np.array([_signed(curve.pareto())[[0, -1]] for curve in curves])
    low, high = ends[:, 0].max(), ends[:, 1].min()
    sign = _sign(curves[0])
    if low > high:
        raise ValueError(
            f"got curves with no common {curves[0].metric}: one begins at {sign * low:g}, another ends at "
            f"{sign * high:g}; expected an overlap"
        )
    return float(sign * low), float(sign * high)


def cost_at_equal_quality(curve: TradeoffCurve, baseline: TradeoffCurve) -> Saving:
    """How much cheaper a curve is than another that is as good.

    Both count with their Pareto fronts, joined by straight lines.

    Args:
        curve, baseline: of one metric.

    Returns:
        The largest saving (KLAS's "1.33× fewer FLOPs").

    Raises:
        ValueError: other metrics, or no common quality.

    Example:
        >>> def curve(*points):
        ...     rows = [ResultRow("", None, 0, macs, 1, {"top1": value}) for macs, value in points]
        ...     return TradeoffCurve(rows, "top1")
        >>> cost_at_equal_quality(curve((10, 0.5), (20, 0.75), (30, 1.0)), curve((10, 0.5), (25, 0.75), (30, 1.0)))
        Saving(ratio=1.25, quality=0.75, macs=20.0, baseline_macs=25.0)
    """
    low, high = sorted(_sign(curve) * end for end in common_quality([curve, baseline]))
    fronts = curve.pareto(), baseline.pareto()
    qualities = np.unique(np.concatenate([[low, high], *(_signed(front) for front in fronts)]))
    # Between two of these both costs are straight lines, whose ratio has its largest value at an end.
    qualities = qualities[(qualities >= low) & (qualities <= high)]
    ours, theirs = (np.interp(qualities, _signed(front), front.macs) for front in fronts)
    best = int(np.argmax(theirs / ours))
    quality = float(_sign(curve) * qualities[best])
    return Saving(float(theirs[best] / ours[best]), quality, float(ours[best]), float(theirs[best]))


def viable_stitches(rows: Iterable[ResultRow], metric: str, *, higher_is_better: bool = True) -> set[Stitch]:
    """The stitches that are worth their cost: no worse than the straight line between their two anchors.

    KLAS recovers "viable" stitches (Tab. 1) without saying what they are: this is our reading. Seeds count by mean.

    Args:
        rows: of stitches, and of their anchors (paths such as "0[:]"), measured alike.
        metric: key of `ResultRow.metrics`.
        higher_is_better: False for losses.

    Returns:
        The stitches.

    Raises:
        ValueError: a stitch without the rows of its anchors, or a row without the metric.

    Example:
        >>> ends = [ResultRow("", "0[:]", 0, 10, 1, {"top1": 0.5}),
        ...         ResultRow("", "1[:]", 0, 30, 1, {"top1": 0.7})]
        >>> between = [ResultRow("", (1, 2), 0, 20, 1, {"top1": 0.65}), ResultRow("", (1, 1), 0, 20, 1, {"top1": 0.55})]
        >>> viable_stitches([*ends, *between], "top1") == {Stitch(1, 2)}
        True
    """
    sign = 1 if higher_is_better else -1
    models = {str(model.rows[0].path): model for model in measured_models(rows, metric)}
    found = set()
    for model in models.values():
        stitch = model.rows[0].stitch
        if stitch is None:
            continue
        places = stitch.source, stitch.target
        if missing := [place for place in places if f"{place}[:]" not in models]:
            raise ValueError(f"got a stitch between the anchors {places} without rows of {missing}; expected both ends")
        ends = [models[f"{place}[:]"] for place in places]
        line = np.interp(model.macs, [end.macs for end in ends], [sign * end.value for end in ends])
        if sign * model.value >= line:
            found.add(stitch)
    return found


@dataclass(frozen=True)
class SweepRow:
    """What one threshold and bucket count select.

    Attributes:
        threshold: τ of Eq. 3.
        buckets: number of cost buckets.
        stitches: number of stitches selected.
        mean: mean quality of these.
        auc: area under their curve, with the anchors as its ends.

    Example:
        >>> SweepRow(threshold=0.05, buckets=20, stitches=31, mean=0.8, auc=0.81).stitches
        31
    """

    threshold: float
    buckets: int
    stitches: int
    mean: float
    auc: float


def sweep(
    scores: StitchScores | Sequence[StitchScores],
    rows: Iterable[ResultRow],
    metric: str,
    *,
    anchors: Sequence[ResultRow],
    thresholds: Sequence[float] = (0.01, 0.03, 0.05, 0.10),
    buckets: Sequence[int] = (10, 15, 20),
    interval: tuple[float, float] | None = None,
) -> list[SweepRow]:
    """Select with every threshold and bucket count (KLAS Tab. 7 and 8), without measuring anything again.

    Args:
        scores: of one pair of anchors, or of several.
        rows: measurements of all stitches that may be selected, by whatever rule; several seeds count with their mean.
        metric: key of `ResultRow.metrics`.
        anchors: measurements of the anchors, which end every curve.
        thresholds: values of τ (Eq. 3).
        buckets: numbers of cost buckets.
        interval: MACs over which areas are taken; None: from the cheapest to the dearest anchor.

    Returns:
        A row per bucket count and threshold.

    Raises:
        ValueError: no anchors, a selected stitch without a row, or an interval outside the anchors' costs.

    Example:
        >>> anchors = [row for row in rows if not row.joints]
        >>> found = sweep(scores, rows, "loss", anchors=anchors, thresholds=(0.01, 0.10), buckets=(2,))
        >>> [(one.threshold, one.buckets, one.stitches) for one in found]
        [(0.01, 2, 2), (0.1, 2, 4)]
    """
    if not anchors:
        raise ValueError(
            "got no rows of anchors; expected those of the cheapest and the dearest, the ends of the curves"
        )
    models = measured_models((row for row in rows if row.joints), metric)
    measured = {stitch: model for model in models if (stitch := model.rows[0].stitch) is not None}
    return [
        _sweep_row(select_stitches(scores, threshold=threshold, buckets=count), measured, metric, anchors, interval,
                   threshold, count)
        for count in buckets
        for threshold in thresholds
    ]  # fmt: skip


def _sweep_row(
    selection: StitchSelection,
    measured: Mapping[Stitch, MeasuredModel],
    metric: str,
    anchors: Sequence[ResultRow],
    interval: tuple[float, float] | None,
    threshold: float,
    buckets: int,
) -> SweepRow:
    if missing := [str(stitch) for stitch in selection if stitch not in measured]:
        raise ValueError(
            f"got no rows of {len(missing)} selected stitches, {', '.join(missing[:5])} among them; expected "
            "measurements of every stitch that may be selected"
        )
    chosen = [measured[stitch] for stitch in selection]
    curve = TradeoffCurve([*anchors, *(row for model in chosen for row in model.rows)], metric)
    mean = fmean(model.value for model in chosen)
    costs = [row.macs for row in anchors]
    return SweepRow(threshold, buckets, len(selection), mean, curve.auc(interval or (min(costs), max(costs))))


def format_sweep(rows: Iterable[SweepRow], metric: str = "mean quality") -> str:
    """The rows of a sweep as a Markdown table.

    Args:
        rows: as `sweep` gives them.
        metric: heads the column of means.

    Returns:
        The table.

    Example:
        >>> print(format_sweep([SweepRow(threshold=0.05, buckets=20, stitches=31, mean=0.8, auc=0.81)], "top-1"))
        | τ  | buckets | stitches | top-1  | AUC    |
        |----|---------|----------|--------|--------|
        | 5% | 20      | 31       | 0.8000 | 0.8100 |
    """
    cells = [["τ", "buckets", "stitches", metric, "AUC"]]
    for row in rows:
        cells.append([f"{row.threshold:.0%}", str(row.buckets), str(row.stitches), f"{row.mean:.4f}", f"{row.auc:.4f}"])
    return markdown_table(cells)


def _sign(curve: TradeoffCurve) -> int:
    return 1 if curve.higher_is_better else -1


def _signed(curve: TradeoffCurve) -> NDArray[np.float64]:
    """Values of which higher is better."""
    return _sign(curve) * curve.values


def _check_comparable(curve: TradeoffCurve, baseline: TradeoffCurve) -> None:
    ours, theirs = ((one.metric, one.higher_is_better) for one in (curve, baseline))
    if ours != theirs:
        raise ValueError(f"got curves of (metric, higher_is_better) = {ours} and {theirs}; expected the same of both")
