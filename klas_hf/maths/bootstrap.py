"""Paired bootstrap: how sure is it that one system answers the same questions better than another?

Both systems are scored on the same questions, so the differences are resampled, not the scores: what makes
a question hard for both cancels (Koehn, "Statistical significance tests for machine translation evaluation",
2004; Efron and Tibshirani, "An introduction to the bootstrap", 1993). With several split seeds one question
may have been held out several times; its scores are not independent, so whole questions (clusters) are drawn.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS_AT_ONCE = 1 << 20  # bounds the memory: about 24 bytes each

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BootstrapResult:
    """The mean difference between two systems and how far chance may have moved it.

    Attributes:
        difference: mean of a - b over all pairs, in the unit of the scores.
        low, high: percentile interval of `difference` at the confidence asked for.
        p_value: two-sided, of "no difference": twice the smaller share of resampled differences on either
            side of 0 (0 itself counts on both), so it agrees with the interval. At least 2 / (samples + 1).
        pairs: number of scores compared.
    """

    difference: float
    low: float
    high: float
    p_value: float
    pairs: int


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapResult:
    """Compare two systems by their scores on the same questions.

    Args:
        a, b: `(pairs,)` scores, in the same order.
        clusters: `(pairs,)` question ids (integers or strings) where a question occurs more than once. Whole
            questions are then drawn, and a resampled difference is the mean over all pairs drawn. None: every
            pair is a question of its own.
        samples: number of resamplings.
        seed: seed of the resampling; the result depends on nothing else that is random.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: shapes that do not match, scores that are not finite, fewer than two questions, or
            `samples` or `confidence` out of range.
    """
    if samples < 1:
        raise ValueError(f"got samples={samples}; expected at least 1, better 10,000")
    if not 0 < confidence < 1:
        raise ValueError(f"got confidence={confidence}; expected a number between 0 and 1, such as 0.95")
    differences = _differences(a, b)
    sums, counts = _cluster_totals(differences, clusters)
    means = _resampled_means(sums, counts, samples, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    rarer_side = int(min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0)))
    return BootstrapResult(
        difference=float(differences.mean()),
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * (rarer_side + 1) / (samples + 1)),
        pairs=len(differences),
    )


def _differences(a: ArrayLike, b: ArrayLike) -> Array:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"got scores a of shape {first.shape} and b of shape {second.shape}; expected two vectors of one "
            "length, the scores of both systems on the same questions in the same order"
        )
    differences = first - second
    if bad := np.count_nonzero(~np.isfinite(differences)):
        raise ValueError(
            f"got {bad} of {len(differences)} pairs with a NaN or infinite score; expected finite scores. "
            "Leave such questions out of both systems"
        )
    return differences


def _cluster_totals(differences: Array, clusters: ArrayLike | None) -> tuple[Array, Array]:
    """Sum of differences and number of pairs of each question, both `(questions,)`."""
    if clusters is None:
        sums, counts = differences, np.ones(len(differences))
    else:
        ids = np.asarray(clusters)
        if ids.shape != differences.shape:
            raise ValueError(
                f"got clusters of shape {ids.shape} for scores of shape {differences.shape}; expected one "
                "question id for each pair of scores"
            )
        unique, place = np.unique(ids, return_inverse=True)
        sums, counts = np.zeros(len(unique)), np.zeros(len(unique))
        np.add.at(sums, place, differences)
        np.add.at(counts, place, 1)
    if len(sums) < 2:
        raise ValueError(f"got {len(sums)} questions; expected at least 2, since whole questions are resampled")
    return sums, counts


def _resampled_means(sums: Array, counts: Array, samples: int, generator: np.random.Generator) -> Array:
    """`(samples,)` mean differences, each over as many questions as there are, drawn with replacement."""
    questions = len(sums)
    rows = max(1, DRAWS_AT_ONCE // questions)
    means = np.empty(samples)
    for start in range(0, samples, rows):
        drawn = generator.integers(questions, size=(min(rows, samples - start), questions))
        means[start : start + rows] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means
