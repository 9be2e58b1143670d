"""When does a score hold? Scores against measured quality: rank correlation, regret per cost bucket, and the area kept.

Intervals are percentile bootstrap intervals: of correlations over stitches, of regrets over cost buckets. (Resampling
stitches would leave each bucket fewer to choose from, and regrets too small.)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from klas_hf.curves.regret import lowest_per_bucket
from klas_hf.curves.tradeoff import measured_models
from klas_hf.maths.correlations import pearson, spearman
from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow
from klas_hf.tables import markdown_table

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredStitch:
    """One stitch of a study.

    Attributes:
        stitch: which one.
        macs: its cost.
        quality: mean over seeds; higher is better, so a loss counts negatively.
        values: score → value, lower is better.
    """

    stitch: Stitch
    macs: int
    quality: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class ScoreOutcome:
    """How well one score foretold what stitches reached.

    Attributes:
        score: its name.
        spearman, pearson: rank and linear correlation with the drop in quality.
        spearman_interval: of the rank correlation.
        regret: mean over cost buckets of the best stitch's quality less that of the score's pick, with its interval.
        relative_regret: the same as a share of what a random pick in each bucket loses: 0 is the oracle, 1 is chance.
        area: mean quality over cost of the curve through the picks, on the costs that the picks of all scores span.
        oracle_area: the same through the best stitch of each bucket.
        stitches: number of stitches.
    """

    score: str
    spearman: float
    spearman_interval: tuple[float, float]
    pearson: float
    regret: float
    regret_interval: tuple[float, float]
    relative_regret: float
    area: float
    oracle_area: float
    stitches: int


@dataclass(frozen=True)
class HalvingOutcome:
    """What is lost when a cheap score leaves only some stitches for a dear one to decide between.

    Attributes:
        cheap, dear: the scores.
        per_bucket: stitches that the cheap one leaves in each cost bucket.
        share: of all stitches, how many the dear one still has to score.
        agreement: share of the buckets in which the choice is the one that the dear score makes among all.
        regret: as of `ScoreOutcome`.
        full_regret: of the dear score among all stitches.
    """

    cheap: str
    dear: str
    per_bucket: int
    share: float
    agreement: float
    regret: float
    full_regret: float


def measured_stitches(
    rows: Iterable[ResultRow],
    metric: str,
    values: Mapping[str, Mapping[Stitch, float]],
    *,
    higher_is_better: bool = True,
) -> list[MeasuredStitch]:
    """Stitches with their mean quality over seeds and their scores; those that lack a finite score are left out.

    Args:
        metric: key of `ResultRow.metrics`.
        values: score → stitch → value.
        higher_is_better: of the metric; False for a loss.

    Raises:
        ValueError: fewer than three are left.
    """
    sign = 1.0 if higher_is_better else -1.0
    kept = [
        MeasuredStitch(stitch, model.macs, sign * model.value, {name: v[stitch] for name, v in values.items()})
        for model in measured_models((row for row in rows if row.joints), metric)
        if (stitch := model.rows[0].stitch) is not None
        and all(np.isfinite(of_score.get(stitch, np.nan)) for of_score in values.values())
    ]
    if len(kept) < 3:
        raise ValueError(f"got {len(kept)} measured stitches with a value of every score; expected at least three")
    return kept


def score_outcomes(
    stitches: Sequence[MeasuredStitch], *, buckets: int = 10, resamples: int = 1000, seed: int = 0
) -> list[ScoreOutcome]:
    """The outcome of every score that the stitches carry.

    Args:
        stitches: measured ones.
        buckets: cost buckets of equal width between the cheapest and the dearest stitch.
        resamples, seed: of the bootstrap.
    """
    macs, quality, bucket = _measured(stitches, buckets)
    draws = np.random.default_rng(seed).integers(len(stitches), size=(resamples, len(stitches)))
    names = list(stitches[0].values)
    values = {name: np.array([one.values[name] for one in stitches]) for name in names}
    best = lowest_per_bucket(-quality, bucket)
    chosen = {name: lowest_per_bucket(values[name], bucket) for name in names}
    ends = [(macs[places].min(), macs[places].max()) for places in (best, *chosen.values())]
    span = max(low for low, _ in ends), min(high for _, high in ends)
    chance = quality[best] - np.array([quality[bucket == bucket[place]].mean() for place in best])
    outcomes = []
    for name in names:
        lost = quality[best] - quality[chosen[name]]
        again = lost[np.random.default_rng(seed).integers(len(lost), size=(resamples, len(lost)))]
        outcomes.append(
            ScoreOutcome(
                score=name,
                spearman=spearman(values[name], -quality),
                spearman_interval=_interval([spearman(values[name][draw], -quality[draw]) for draw in draws]),
                pearson=pearson(values[name], -quality),
                regret=float(lost.mean()),
                regret_interval=_interval(again.mean(axis=1)),
                relative_regret=float(lost.sum() / chance.sum()) if chance.sum() > 0 else 0.0,
                area=_area(macs[chosen[name]], quality[chosen[name]], span),
                oracle_area=_area(macs[best], quality[best], span),
                stitches=len(stitches),
            )
        )
    return outcomes


def halving_outcome(
    stitches: Sequence[MeasuredStitch], cheap: str, dear: str, *, per_bucket: int, buckets: int = 10
) -> HalvingOutcome:
    """What halving would have chosen: the cheap score's best few of each bucket, and of these the dear score's best.

    Raises:
        ValueError: a number below 1.
    """
    if per_bucket < 1:
        raise ValueError(f"got per_bucket={per_bucket}; expected at least 1")
    _, quality, bucket = _measured(stitches, buckets)
    first, last = (np.array([one.values[name] for one in stitches]) for name in (cheap, dear))
    left = np.zeros(len(stitches), dtype=bool)
    for number in np.unique(bucket):
        there = np.flatnonzero(bucket == number)
        left[there[np.argsort(first[there], kind="stable")[:per_bucket]]] = True
    best, full = lowest_per_bucket(-quality, bucket), lowest_per_bucket(last, bucket)
    halved = lowest_per_bucket(np.where(left, last, np.inf), bucket)
    return HalvingOutcome(
        cheap, dear, per_bucket, float(left.mean()), float((halved == full).mean()),
        float((quality[best] - quality[halved]).mean()), float((quality[best] - quality[full]).mean()),
    )  # fmt: skip


def combined_values(
    families: Mapping[str, Sequence[MeasuredStitch]], held_out: str, scores: Sequence[str]
) -> dict[Stitch, float]:
    """A log-linear combination of scores, fitted to the drop in all families but one, applied to that one.

    Logarithms of the scores and drops below each family's best are standardised within a family, so only the shape of
    the combination is learnt; least squares over all stitches of the other families.

    Raises:
        ValueError: no other family.
    """
    others = [stitches for name, stitches in families.items() if name != held_out]
    if not others:
        raise ValueError(f"got the one family {held_out!r}; expected at least one other to fit a combination on")
    x = np.concatenate([_features(stitches, scores) for stitches in others])
    y = np.concatenate([_standardised(-np.array([one.quality for one in stitches])) for stitches in others])
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    combined = _features(families[held_out], scores) @ weights
    return {one.stitch: float(value) for one, value in zip(families[held_out], combined, strict=True)}


def with_score(stitches: Sequence[MeasuredStitch], name: str, values: Mapping[Stitch, float]) -> list[MeasuredStitch]:
    """The same stitches with one more score."""
    return [replace(one, values={**one.values, name: values[one.stitch]}) for one in stitches]


def format_outcomes(outcomes: Iterable[ScoreOutcome]) -> str:
    """Outcomes as a Markdown table, the least regret first."""
    lines = [["score", "Spearman", "95 %", "Pearson", "regret", "95 %", "of chance", "area of picks"]]
    for one in sorted(outcomes, key=lambda one: one.regret):
        low, high = one.spearman_interval
        lines.append(
            [
                one.score,
                f"{one.spearman:.2f}",
                f"{low:.2f} … {high:.2f}",
                f"{one.pearson:.2f}",
                f"{one.regret:.4f}",
                "{:.4f} … {:.4f}".format(*one.regret_interval),
                f"{one.relative_regret:.0%}",
                f"{one.area:.4f} of {one.oracle_area:.4f}",
            ]  # fmt: skip
        )
    return markdown_table(lines)


def format_halving(outcomes: Iterable[HalvingOutcome]) -> str:
    """Outcomes of halving as a Markdown table."""
    lines = [["first", "then", "kept per bucket", "scored twice", "same choice", "regret", "without halving"]]
    lines += [
        [
            one.cheap, one.dear, str(one.per_bucket), f"{one.share:.0%}", f"{one.agreement:.0%}", f"{one.regret:.4f}",
            f"{one.full_regret:.4f}",
        ]
        for one in outcomes
    ]  # fmt: skip
    return markdown_table(lines)


def _measured(stitches: Sequence[MeasuredStitch], buckets: int) -> tuple[Array, Array, NDArray[np.int64]]:
    """MACs, quality and cost bucket of every stitch."""
    macs = np.array([one.macs for one in stitches], dtype=np.float64)
    bucket = np.digitize(macs, np.linspace(macs.min(), macs.max(), buckets + 1)[1:-1])
    return macs, np.array([one.quality for one in stitches]), bucket


def _area(x: Array, y: Array, span: tuple[float, float]) -> float:
    """Mean of a curve over a span of costs that it covers: of no width, its value there; of less, nan."""
    if span[0] > span[1]:
        return float("nan")
    order = np.argsort(x)
    x, y = x[order], y[order]
    grid = np.unique([*x[(x > span[0]) & (x < span[1])], *span])
    heights = np.interp(grid, x, y)
    if len(grid) == 1:
        return float(heights[0])
    return float(np.trapezoid(heights, grid) / (grid[-1] - grid[0]))


def _features(stitches: Sequence[MeasuredStitch], scores: Sequence[str]) -> Array:
    columns = [np.log(np.maximum([one.values[name] for one in stitches], 1e-12)) for name in scores]
    return np.stack([_standardised(column) for column in columns], axis=1)


def _standardised(values: Array) -> Array:
    spread = values.std()
    return (values - values.mean()) / (spread if spread > 0 else 1.0)


def _interval(values: Sequence[float] | Array) -> tuple[float, float]:
    known = np.asarray(values)[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
