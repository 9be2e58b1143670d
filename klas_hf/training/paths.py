"""Which path of a supernet a forward takes: any (SN-Net), or first a cost bucket, then a path in it (SN-Net v2)."""

from collections.abc import Sequence

import numpy as np


class PathSampler:
    """Draws positions of paths.

    Args:
        macs: MACs of every path.
        sampling: "uniform" over paths, or "bucket": over the cost buckets that hold a path, then over its paths.
        buckets: number of buckets of equal width, from the cheapest path to the dearest.
        positions: the paths that are drawn from; None: all.
    """

    def __init__(self, macs: Sequence[int], sampling: str, buckets: int, positions: Sequence[int] | None = None):
        drawn = np.arange(len(macs)) if positions is None else np.asarray(positions)
        self.groups = [drawn]
        if sampling == "bucket":
            costs = np.asarray(macs, dtype=np.float64)[drawn]
            bucket = np.digitize(costs, np.linspace(costs.min(), costs.max(), buckets + 1)[1:-1])
            self.groups = [drawn[bucket == number] for number in np.unique(bucket)]

    def draw(self, seed: tuple[int, ...]) -> int:
        """Position of a path; the same seed draws the same."""
        generator = np.random.default_rng(seed)
        group = self.groups[generator.integers(len(self.groups))]
        return int(generator.choice(group))
