"""Which path of a supernet a forward takes: any (SN-Net), or first a cost bucket, then a path in it (SN-Net v2)."""

import inspect
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from klas_hf.training.config import TrainingConfig


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


def path_sampler(model: PreTrainedModel, config: TrainingConfig) -> PathSampler | None:
    """What draws a supernet's paths; None for a model that has one path.

    Raises:
        ValueError: sampling by bucket of a model that is no supernet.
    """
    if not takes(model, "path"):
        if config.sampling != "uniform":
            name = type(model).__name__
            raise ValueError(f"got sampling={config.sampling!r} for {name}, which has one path; expected a supernet")
        return None
    # Where only stitching layers learn, an anchor run whole has nothing to learn.
    wanted = [n for n, path in enumerate(model.paths) if config.trainable != "stitch" or path.joints]
    return PathSampler([cost.macs for cost in model.path_costs], config.sampling, config.sampling_buckets, wanted)


def takes(model: PreTrainedModel, option: str) -> bool:
    """Whether a model's forward has an option."""
    return option in inspect.signature(model.forward).parameters
