"""Cascades of two models, which stitches are compared with (KLAS App. E, Fig. 9, Tab. 11).

The small model runs on every image or sequence; where it is less confident than a threshold the large one runs too and
decides. Nothing is trained: what both models make of the set is all that is needed to sweep the threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klas_hf.maths.buckets import bucket_of
from klas_hf.rows import ResultRow


@dataclass(frozen=True, eq=False)
class CascadeMember:
    """One model of a cascade, on a set of items: images, or sequences.

    Attributes:
        quality: `(items,)` of its answers: 1 and 0 for right and wrong, or a loss.
        confidence: `(items,)` in them; of a sequence, the mean of its tokens' highest probabilities.
        macs: MACs of one item.
        parameters: number of parameters; 0 leaves them out of the rows.
        weights: `(items,)` of the items in means, such as a sequence's tokens; None: all alike.

    Raises:
        ValueError: no items, other numbers of them, or numbers that are not finite.

    Example:
        >>> CascadeMember(np.array([1.0, 0.0]), np.array([0.9, 0.6]), macs=1_000_000).macs
        1000000
    """

    quality: NDArray[np.floating]
    confidence: NDArray[np.floating]
    macs: int
    parameters: int = 0
    weights: NDArray[np.floating] | None = None

    def __post_init__(self) -> None:
        given = [self.quality, self.confidence] + ([] if self.weights is None else [self.weights])
        shapes = {one.shape for one in given}
        if len(shapes) > 1 or self.quality.ndim != 1 or not len(self.quality):
            raise ValueError(f"got arrays of shapes {[one.shape for one in given]}; expected (items,), at least one")
        if not all(np.isfinite(one).all() for one in given):
            raise ValueError("got numbers that are not finite among quality, confidence and weights; expected none")

    @classmethod
    def of_probabilities(
        cls, probabilities: NDArray[np.floating], labels: NDArray[np.integer], macs: int, parameters: int = 0
    ) -> "CascadeMember":
        """A classifier, whose answers are right or wrong.

        Args:
            probabilities: `(images, classes)` softmax outputs.
            labels: `(images,)` classes.
            macs, parameters: of the model, as the attributes.

        Raises:
            ValueError: rows that are no distributions, or labels of other images or classes.

        Example:
            >>> one = CascadeMember.of_probabilities(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 0]), macs=10)
            >>> one.quality.tolist(), one.confidence.tolist()
            ([1.0, 0.0], [0.9, 0.6])
        """
        shape = probabilities.shape
        if len(shape) != 2 or not shape[0]:
            raise ValueError(f"got probabilities of shape {shape}; expected (images, classes) with at least one image")
        sums = probabilities.sum(1, dtype=np.float64)
        if not (probabilities.min() >= 0 and np.allclose(sums, 1, atol=1e-2)):
            raise ValueError(
                f"got rows that sum to {sums.min():.3g} … {sums.max():.3g}, with values from "
                f"{probabilities.min():.3g}; expected probabilities. Pass the softmax of the logits"
            )
        if labels.shape != shape[:1] or not 0 <= labels.min() <= labels.max() < shape[1]:
            raise ValueError(
                f"got labels of shape {labels.shape} from {labels.min()} to {labels.max()}; expected "
                f"({shape[0]},), from 0 to {shape[1] - 1}"
            )
        right = (probabilities.argmax(1) == labels).astype(np.float64)
        return cls(right, probabilities.max(1), macs, parameters)


@dataclass(frozen=True)
class CascadePoint:
    """A cascade at one threshold.

    Attributes:
        threshold: least confidence at which the first model's answer stands.
        macs: mean MACs of an item.
        quality: mean quality: the share of images that are classified correctly, or a loss.
        sent: share of the items that the second model sees.
        parameters: of both models.

    Example:
        >>> CascadePoint(threshold=0.8, macs=1_500_000.0, quality=0.75, sent=0.5, parameters=30_000).sent
        0.5
    """

    threshold: float
    macs: float
    quality: float
    sent: float
    parameters: int


def cascade_curve(
    first: CascadeMember, second: CascadeMember, thresholds: Sequence[float], *, shared: int = 0
) -> list[CascadePoint]:
    """Cost and quality of the cascade at every threshold.

    Args:
        first, second: the small and the large model on the same items, in the same order.
        thresholds: an item is sent on where the first model's confidence is below.
        shared: MACs of the second that the first has already done: where two paths begin alike.

    Returns:
        A point per threshold, in their order.

    Raises:
        ValueError: other items, a first model dearer than the second, or more shared than the first costs.

    Example:
        >>> quick = CascadeMember.of_probabilities(np.array([[0.9, 0.1], [0.6, 0.4]]), np.array([0, 1]), macs=10)
        >>> sound = CascadeMember.of_probabilities(np.array([[0.9, 0.1], [0.1, 0.9]]), np.array([0, 1]), macs=100)
        >>> points = cascade_curve(quick, sound, thresholds=[0.0, 0.8, 1.0])
        >>> [(point.macs, point.quality) for point in points]
        [(10.0, 0.5), (60.0, 1.0), (110.0, 1.0)]
    """
    if len(first.quality) != len(second.quality):
        raise ValueError(f"got {len(first.quality)} and {len(second.quality)} items; expected the same for both models")
    if first.macs > second.macs:
        raise ValueError(f"got a first model of {first.macs:,} MACs and a second of {second.macs:,}; swap them")
    if not 0 <= shared <= first.macs:
        raise ValueError(f"got shared={shared:,} of {first.macs:,} MACs; expected no more than the first model's")
    weights = np.ones(len(first.quality)) if first.weights is None else first.weights
    points = []
    for threshold in thresholds:
        sent = first.confidence < threshold
        share = float(np.average(sent, weights=weights))
        quality = float(np.average(np.where(sent, second.quality, first.quality), weights=weights))
        macs = first.macs + share * (second.macs - shared)
        points.append(CascadePoint(threshold, macs, quality, share, first.parameters + second.parameters))
    return points


def best_per_bucket(points: Sequence[CascadePoint], *, buckets: int = 20) -> list[CascadePoint]:
    """The most accurate point of each cost bucket, the cheaper of equals (App. E: "the best value per FLOP bin").

    The buckets are equally wide between the cheapest and the dearest point.

    Args:
        points: of one cascade.
        buckets: how many; empty ones give nothing.

    Returns:
        The points, cheapest first.

    Raises:
        ValueError: no points, or fewer than one bucket.

    Example:
        >>> points = [CascadePoint(0.5, macs, quality, 0.5, 0) for macs, quality in [(1, 0.5), (2, 0.7), (9, 0.6)]]
        >>> [point.macs for point in best_per_bucket(points, buckets=2)]
        [2, 9]
    """
    if not points:
        raise ValueError("got no points; expected those of cascade_curve")
    macs = np.array([round(point.macs) for point in points])
    best: dict[int, CascadePoint] = {}
    for point, bucket in zip(points, bucket_of(macs, int(macs.min()), int(macs.max()), buckets).tolist(), strict=True):
        kept = best.setdefault(bucket, point)
        if (point.quality, -point.macs) > (kept.quality, -kept.macs):
            best[bucket] = point
    return [best[bucket] for bucket in sorted(best)]


def to_rows(
    points: Sequence[CascadePoint], *, metric: str = "accuracy", seed: int = 0, rule: str = "cascade"
) -> list[ResultRow]:
    """Points as rows, for curves and tables; MACs are rounded.

    Args:
        points: of one cascade.
        metric: name that the quality gets, that of the rows it is compared with.
        seed: of those rows.
        rule: their name.

    Returns:
        A row of this rule per point, with its threshold as setting and the share sent on among its details.

    Example:
        >>> (row,) = to_rows([CascadePoint(threshold=0.8, macs=60.0, quality=0.7, sent=0.5, parameters=0)])
        >>> row.rule, row.macs, row.metrics
        ('cascade', 60, {'accuracy': 0.7})
    """
    return [
        ResultRow(
            rule=rule,
            path=None,
            seed=seed,
            macs=round(point.macs),
            parameters=point.parameters,
            metrics={metric: point.quality},
            setting={"threshold": point.threshold},
            details={"sent": point.sent},
        )
        for point in points
    ]
