"""Candidates in buckets by their cost, as KLAS's Alg. 3 has them, and the best of each."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Spacing = Literal["width", "quantile"]


def bucket_of(macs: NDArray, low: int, high: int, buckets: int, spacing: Spacing = "width") -> NDArray[np.int64]:
    """Bucket index (0 … buckets - 1) of each cost; the last bucket contains `high`. Buckets may be empty.

    Args:
        macs: `(candidates,)` integers, each between `low` and `high`.

    Raises:
        ValueError: fewer than one bucket, or an unknown spacing.
    """
    if buckets < 1:
        raise ValueError(f"got buckets={buckets}; expected at least 1")
    if spacing == "width":
        bucket = (macs - low) * buckets // max(high - low, 1)
    elif spacing == "quantile":
        bucket = np.searchsorted(np.sort(macs), macs, side="left") * buckets // len(macs)
    else:
        raise ValueError(f"got spacing={spacing!r}; expected 'width' or 'quantile'")
    return np.minimum(bucket, buckets - 1)


def best_of_buckets(values: NDArray, bucket: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Positions of the `count` lowest values of each bucket, or of all that it holds, bucket by bucket."""
    order = np.lexsort((values, bucket))
    rank = np.arange(len(order)) - np.searchsorted(bucket[order], bucket[order])
    return order[rank < count]
