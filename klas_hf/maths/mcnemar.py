"""McNemar's test: do two systems differ in which questions they get right?

Only the questions that one gets right and the other wrong tell; under "no difference" each of them falls to either side
with probability ½, so the count is binomial (McNemar, 1947; exact form, Edwards, 1948; for classifiers, Dietterich,
1998).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest


@dataclass(frozen=True)
class McNemarResult:
    """Questions on which two systems differ.

    Attributes:
        only_a, only_b: questions that only the one, or only the other, gets right.
        p_value: two-sided, exact; 1 where they never differ.
        pairs: number of questions.
    """

    only_a: int
    only_b: int
    p_value: float
    pairs: int


def mcnemar(a: ArrayLike, b: ArrayLike) -> McNemarResult:
    """Compare two systems by which of the same questions they get right, each question once.

    Args:
        a, b: `(questions,)`, 1 or True where the answer is right and 0 or False where it is wrong, in the same order.

    Raises:
        ValueError: shapes that do not match, no question, or scores that are neither 0 nor 1.

    Example:
        >>> result = mcnemar([1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0])
        >>> result.only_a, result.only_b, result.p_value
        (4, 1, 0.375)
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError(
            f"got answers a of shape {first.shape} and b of shape {second.shape}; expected two vectors of one length, "
            "of the same questions in the same order"
        )
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        raise ValueError("got scores other than 0 and 1; expected right or wrong. paired_bootstrap takes any scores")
    only_a, only_b = int(np.sum(first > second)), int(np.sum(first < second))
    p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemarResult(only_a, only_b, p_value, len(first))
