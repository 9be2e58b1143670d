"""Streaming means and ratios with standard errors, from one term per sequence.

Tokens of one sequence are not independent, so the sequence is the sampling unit (a cluster). Θ is the ratio
(summed KL) / (tokens) and Γ the ratio (summed cross KL) / (summed capacity); both get the linearised (delta
method) variance of a ratio of sums over clusters. Only sums and sums of products are kept, so memory does not
grow with the data.
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class RatioSums:
    """Accumulates Σa / Σb over sequences, with the moments that its standard error needs.

    Args:
        shape: shape S of the ratio; the denominators must broadcast to it.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.sequences = 0
        self._moments = np.zeros((5, *shape))  # Σa, Σb, Σa², Σab, Σb²

    def update(self, numerator: Array, denominator: Array) -> None:
        """Add sequences: `numerator` is `(sequences, *S)`, `denominator` broadcasts to it."""
        a = np.asarray(numerator, dtype=np.float64)
        b = np.broadcast_to(np.asarray(denominator, dtype=np.float64), a.shape)
        self.sequences += len(a)
        for moment, term in enumerate((a, b, a * a, a * b, b * b)):
            self._moments[moment] += term.sum(0)

    def add_at(self, place: tuple[int, ...], numerator: Array, denominator: Array) -> None:
        """Add the terms of one entry of S, one per sequence; the caller counts the sequences."""
        a, b = numerator, denominator
        for moment, term in enumerate((a, b, a * a, a * b, b * b)):
            self._moments[(moment, *place)] += term.sum()

    def moments(self) -> Array:
        """All sums as one vector, so that several processes can add theirs."""
        return np.concatenate([[self.sequences], self._moments.ravel()])

    def set_moments(self, moments: Array) -> None:
        """The inverse of `moments`."""
        self.sequences = int(moments[0])
        self._moments = moments[1:].reshape(5, *self.shape).copy()

    @property
    def value(self) -> Array:
        """Σa / Σb, of shape S; nan where nothing was added."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._moments[0] / self._moments[1]

    @property
    def denominator(self) -> Array:
        """Σb, of shape S."""
        return self._moments[1]

    @property
    def standard_error(self) -> Array:
        """Standard error of `value`, of shape S; nan with fewer than two sequences."""
        if self.sequences < 2:
            return np.full(self.shape, np.nan)
        _, b, aa, ab, bb = self._moments
        ratio = self.value
        with np.errstate(invalid="ignore", divide="ignore"):
            residual = np.maximum(aa - 2 * ratio * ab + ratio**2 * bb, 0.0)
            return np.sqrt(residual * self.sequences / (self.sequences - 1)) / np.abs(b)


def normal_interval(value: Array, standard_error: Array, confidence: float) -> tuple[Array, Array]:
    """Two-sided normal interval: `value ∓ z · standard_error`."""
    if not 0 < confidence < 1:
        raise ValueError(f"got confidence={confidence}; expected a number between 0 and 1, such as 0.95")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return value - z * standard_error, value + z * standard_error
