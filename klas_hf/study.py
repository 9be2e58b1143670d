"""When does a score hold? Scores against measured quality: rank correlation, regret per cost bucket, and the area kept.

Intervals are percentile bootstrap intervals over stitches: each resample draws as many stitches, with replacement.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from klas_hf.curves import spearman
from klas_hf.rows import ResultRow, markdown_table
from klas_hf.stitches import Stitch

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredStitch:
    """One stitch of a study.

    Attributes:
        stitch: which one.
        macs: its cost.
        quality: mean over seeds; higher is better.
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
        spearman: rank correlation with the drop in quality, with its interval.
        regret: mean over cost buckets of the best stitch's quality less that of the score's pick, with its interval.
        area: mean quality over cost of the curve through the picks, between the cheapest and the dearest bucket.
        oracle_area: the same through the best stitch of each bucket.
        stitches: number of stitches.
    """

    score: str
    spearman: float
    spearman_interval: tuple[float, float]
    regret: float
    regret_interval: tuple[float, float]
    area: float
    oracle_area: float
    stitches: int


def measured_stitches(
    rows: Iterable[ResultRow], metric: str, values: Mapping[str, Mapping[Stitch, float]]
) -> list[MeasuredStitch]:
    """Stitches with their mean quality over seeds and their scores; those that lack a finite score are left out.

    Raises:
        ValueError: fewer than three are left.
    """
    found: dict[Stitch, tuple[int, dict[int, float]]] = {}
    for row in rows:
        if row.stitch is not None:
            stitch = Stitch(*row.stitch, *row.anchors)
            found.setdefault(stitch, (row.macs, {}))[1][row.seed] = row.metrics[metric]
    kept = [
        MeasuredStitch(stitch, macs, float(np.mean(list(seeds.values()))), {n: v[stitch] for n, v in values.items()})
        for stitch, (macs, seeds) in found.items()
        if all(np.isfinite(of_score.get(stitch, np.nan)) for of_score in values.values())
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
    macs = np.array([one.macs for one in stitches], dtype=np.float64)
    quality = np.array([one.quality for one in stitches])
    bucket = np.digitize(macs, np.linspace(macs.min(), macs.max(), buckets + 1)[1:-1])
    draws = np.random.default_rng(seed).integers(len(stitches), size=(resamples, len(stitches)))
    best = picks(-quality, bucket)
    outcomes = []
    for name in stitches[0].values:
        values = np.array([one.values[name] for one in stitches])
        chosen = picks(values, bucket)
        correlations = [spearman(values[draw], -quality[draw]) for draw in draws]
        regrets = [_regret(values[draw], quality[draw], bucket[draw]) for draw in draws]
        outcomes.append(
            ScoreOutcome(
                score=name,
                spearman=spearman(values, -quality),
                spearman_interval=_interval(correlations),
                regret=_regret(values, quality, bucket),
                regret_interval=_interval(regrets),
                area=_area(macs[chosen], quality[chosen], macs),
                oracle_area=_area(macs[best], quality[best], macs),
                stitches=len(stitches),
            )
        )
    return outcomes


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
    lines = [["score", "Spearman", "95 %", "regret", "95 %", "area of picks"]]
    for one in sorted(outcomes, key=lambda one: one.regret):
        low, high = one.spearman_interval
        lines.append(
            [
                one.score,
                f"{one.spearman:.2f}",
                f"{low:.2f} … {high:.2f}",
                f"{one.regret:.4f}",
                "{:.4f} … {:.4f}".format(*one.regret_interval),
                f"{one.area:.4f} of {one.oracle_area:.4f}",
            ]  # fmt: skip
        )
    return markdown_table(lines)


def picks(values: Array, bucket: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of the lowest value in each non-empty bucket."""
    by_bucket = [np.flatnonzero(bucket == number) for number in np.unique(bucket)]
    return np.array([there[np.argmin(values[there])] for there in by_bucket])


def _regret(values: Array, quality: Array, bucket: NDArray[np.int64]) -> float:
    return float((quality[picks(-quality, bucket)] - quality[picks(values, bucket)]).mean())


def _area(x: Array, y: Array, every: Array) -> float:
    """Mean of a curve over the span of all costs; beyond its ends it stays level."""
    order = np.argsort(x)
    grid = np.unique(np.concatenate([x, [every.min(), every.max()]]))
    return float(np.trapezoid(np.interp(grid, x[order], y[order]), grid) / (grid[-1] - grid[0]))


def _features(stitches: Sequence[MeasuredStitch], scores: Sequence[str]) -> Array:
    columns = [np.log(np.maximum([one.values[name] for one in stitches], 1e-12)) for name in scores]
    return np.stack([_standardised(column) for column in columns], axis=1)


def _standardised(values: Array) -> Array:
    spread = values.std()
    return (values - values.mean()) / (spread if spread > 0 else 1.0)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
