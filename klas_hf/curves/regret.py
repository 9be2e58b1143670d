"""How much a score's choice costs: the stitch that it picks in each cost bucket against the best one there."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klas_hf.curves.tradeoff import scored_stitches
from klas_hf.maths.buckets import bucket_of
from klas_hf.rows import ResultRow
from klas_hf.scores.values import StitchScores


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
        rows: measurements; a model counts with its mean over seeds. Rows of other anchors are left out.
        metric: key of `ResultRow.metrics`.
        buckets: number of cost buckets of equal width between the two anchors.

    Raises:
        ValueError: no measured stitch has a score.
    """
    sign = 1.0 if higher_is_better else -1.0
    costs = scores.costs
    known = scored_stitches(scores, rows, metric)
    if not known:
        raise ValueError("got no measured stitch with a score; expected rows of stitches between these two anchors")
    macs = np.array([costs.of(stitch)[0] for stitch, _ in known])
    clipped = macs.clip(costs.source_total, costs.target_total)
    bucket = bucket_of(clipped, costs.source_total, costs.target_total, buckets)
    values = np.array([scores.value_of(stitch) for stitch, _ in known])
    quality = np.array([value for _, value in known])
    picked, oracle = quality[lowest_per_bucket(values, bucket)], quality[lowest_per_bucket(-sign * quality, bucket)]
    chance = [quality[bucket == number].mean() for number in np.unique(bucket)]
    return BucketPicks(float(picked.mean()), float(oracle.mean()), float(np.mean(chance)), len(picked))


def lowest_per_bucket(values: NDArray[np.float64], bucket: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of the lowest value in each non-empty bucket, by bucket; both arrays are `(items,)`.

    Example:
        >>> lowest_per_bucket(np.array([3.0, 1.0, 2.0]), np.array([0, 0, 4])).tolist()
        [1, 2]
    """
    by_bucket = [np.flatnonzero(bucket == number) for number in np.unique(bucket)]
    return np.array([there[np.argmin(values[there])] for there in by_bucket])
