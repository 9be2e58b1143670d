"""How much a score's choice costs: the stitch that it picks in each cost bucket against the best one there."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow
from klas_hf.scores.values import StitchScores
from klas_hf.selection.choice import bucket_of


@dataclass(frozen=True)
class BucketPicks:
    """What a score picks, one stitch per non-empty cost bucket.

    Attributes:
        picked: mean quality of the stitches that the score picks.
        oracle: mean quality of the best stitch of each bucket.
        chance: mean over buckets of the mean quality in the bucket, what a random pick gets.
        buckets: number of buckets that hold a measured stitch.
    """

    picked: float
    oracle: float
    chance: float
    buckets: int

    @property
    def regret(self) -> float:
        """Mean distance to the best, in the metric's unit; 0 is perfect."""
        return abs(self.oracle - self.picked)


def bucket_picks(
    scores: StitchScores, rows: Iterable[ResultRow], metric: str, *, buckets: int = 10, higher_is_better: bool = True
) -> BucketPicks:
    """Pick the stitch of lowest score in each cost bucket, among those that were measured.

    Args:
        scores: of one pair of anchors.
        rows: measurements; of several seeds a stitch counts with its mean. Rows of other anchors are left out.
        metric: key of `ResultRow.metrics`.
        buckets: number of cost buckets of equal width between the two anchors.

    Raises:
        ValueError: no measured stitch has a score.
    """
    sign = 1.0 if higher_is_better else -1.0
    costs = scores.costs
    measured: dict[Stitch, dict[int, float]] = {}
    for row in rows:
        if row.stitch is not None and row.anchors == (costs.source, costs.target):
            measured.setdefault(Stitch(*row.stitch, *row.anchors), {})[row.seed] = row.value(metric)
    known = [stitch for stitch in measured if np.isfinite(scores.value_of(stitch))]
    if not known:
        raise ValueError("got no measured stitch with a score; expected rows of stitches between these two anchors")
    macs = np.array([costs.of(stitch)[0] for stitch in known])
    clipped = macs.clip(costs.source_total, costs.target_total)
    bucket = bucket_of(clipped, costs.source_total, costs.target_total, buckets)
    values = np.array([scores.value_of(stitch) for stitch in known])
    quality = np.array([np.mean(list(measured[stitch].values())) for stitch in known])
    picked, oracle, chance = [], [], []
    for number in np.unique(bucket):
        there = np.flatnonzero(bucket == number)
        picked.append(quality[there[np.argmin(values[there])]])
        oracle.append(sign * (sign * quality[there]).max())
        chance.append(quality[there].mean())
    return BucketPicks(float(np.mean(picked)), float(np.mean(oracle)), float(np.mean(chance)), len(picked))
