"""Cascades of two models, which stitches are compared with (KLAS App. E, Fig. 9, Tab. 11).

The small model runs on every image; where its highest probability falls below a threshold the large one runs too and
decides. Nothing is trained: the models' probabilities on the set are all that is needed to sweep the threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klas_hf.rows import ResultRow
from klas_hf.selection.choice import bucket_of


@dataclass(frozen=True, eq=False)
class CascadeMember:
    """One model of a cascade.

    Attributes:
        probabilities: `(images, classes)` softmax outputs.
        macs: MACs of one image.
        parameters: number of parameters; 0 leaves them out of the rows.

    Raises:
        ValueError: rows that are no distributions.

    Example:
        >>> CascadeMember(np.array([[0.9, 0.1], [0.4, 0.6]]), macs=1_000_000).macs
        1000000
    """

    probabilities: NDArray[np.floating]
    macs: int
    parameters: int = 0

    def __post_init__(self) -> None:
        shape = self.probabilities.shape
        if len(shape) != 2 or not shape[0]:
            raise ValueError(f"got probabilities of shape {shape}; expected (images, classes) with at least one image")
        sums = self.probabilities.sum(1, dtype=np.float64)
        if not (self.probabilities.min() >= 0 and np.allclose(sums, 1, atol=1e-2)):
            raise ValueError(
                f"got rows that sum to {sums.min():.3g} … {sums.max():.3g}, with values from "
                f"{self.probabilities.min():.3g}; expected probabilities. Pass the softmax of the logits"
            )


@dataclass(frozen=True)
class CascadePoint:
    """A cascade at one threshold.

    Attributes:
        threshold: least confidence at which the first model's answer stands.
        macs: mean MACs of an image.
        accuracy: share of images that are classified correctly.
        sent: share of images that the second model sees.
        parameters: of both models.

    Example:
        >>> CascadePoint(threshold=0.8, macs=1_500_000.0, accuracy=0.75, sent=0.5, parameters=30_000).sent
        0.5
    """

    threshold: float
    macs: float
    accuracy: float
    sent: float
    parameters: int


def cascade_curve(
    first: CascadeMember, second: CascadeMember, labels: NDArray[np.integer], thresholds: Sequence[float]
) -> list[CascadePoint]:
    """Cost and accuracy of the cascade at every threshold.

    Args:
        first, second: the small and the large model on the same images, in the same order.
        labels: `(images,)` classes.
        thresholds: an image is sent on where the first model's highest probability is below.

    Returns:
        A point per threshold, in their order.

    Raises:
        ValueError: other images, classes or labels, or a first model dearer than the second.

    Example:
        >>> quick = CascadeMember(np.array([[0.9, 0.1], [0.6, 0.4]]), macs=10)
        >>> sound = CascadeMember(np.array([[0.9, 0.1], [0.1, 0.9]]), macs=100)
        >>> points = cascade_curve(quick, sound, labels=np.array([0, 1]), thresholds=[0.0, 0.8, 1.0])
        >>> [(point.macs, point.accuracy) for point in points]
        [(10.0, 0.5), (60.0, 1.0), (110.0, 1.0)]
    """
    images, classes = first.probabilities.shape
    if second.probabilities.shape != (images, classes) or labels.shape != (images,):
        raise ValueError(
            f"got probabilities of shapes {(images, classes)} and {second.probabilities.shape} and labels of shape "
            f"{labels.shape}; expected the same images and classes for all"
        )
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"got labels from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}")
    if first.macs > second.macs:
        raise ValueError(f"got a first model of {first.macs:,} MACs and a second of {second.macs:,}; swap them")
    confidence = first.probabilities.max(1)
    correct = [member.probabilities.argmax(1) == labels for member in (first, second)]
    points = []
    for threshold in thresholds:
        sent = confidence < threshold
        share = float(sent.mean())
        accuracy = float(np.where(sent, correct[1], correct[0]).mean())
        macs = first.macs + share * second.macs
        points.append(CascadePoint(threshold, macs, accuracy, share, first.parameters + second.parameters))
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
        >>> points = [CascadePoint(0.5, macs, accuracy, 0.5, 0) for macs, accuracy in [(1, 0.5), (2, 0.7), (9, 0.6)]]
        >>> [point.macs for point in best_per_bucket(points, buckets=2)]
        [2, 9]
    """
    if not points:
        raise ValueError("got no points; expected those of cascade_curve")
    macs = np.array([round(point.macs) for point in points])
    best: dict[int, CascadePoint] = {}
    for point, bucket in zip(points, bucket_of(macs, int(macs.min()), int(macs.max()), buckets).tolist(), strict=True):
        kept = best.setdefault(bucket, point)
        if (point.accuracy, -point.macs) > (kept.accuracy, -kept.macs):
            best[bucket] = point
    return [best[bucket] for bucket in sorted(best)]


def to_rows(points: Sequence[CascadePoint], *, metric: str = "accuracy", seed: int = 0) -> list[ResultRow]:
    """Points as rows, for curves and tables; MACs are rounded.

    Args:
        points: of one cascade.
        metric: name that the accuracy gets, that of the rows it is compared with.
        seed: of those rows.

    Returns:
        A row of rule "cascade" per point, with its threshold as setting and the share sent on among its details.

    Example:
        >>> (row,) = to_rows([CascadePoint(threshold=0.8, macs=60.0, accuracy=0.7, sent=0.5, parameters=0)])
        >>> row.rule, row.macs, row.metrics
        ('cascade', 60, {'accuracy': 0.7})
    """
    return [
        ResultRow(
            rule="cascade",
            path=None,
            seed=seed,
            macs=round(point.macs),
            parameters=point.parameters,
            metrics={metric: point.accuracy},
            setting={"threshold": point.threshold},
            details={"sent": point.sent},
        )
        for point in points
    ]
