"""B-splines on a uniform grid (de Boor 1978): what a KAN has on every edge (Liu et al. 2024, Eq. 2.10).

A spline of order k (degree k: 3 is cubic) on g intervals is a sum of g + k functions of the basis, whose knots go on
beyond both ends at the same distance. At any place only k + 1 of them are not zero, and they add up to one. Outside the
grid an input counts as the nearer end of it: the spline goes on as a constant.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Where the splines of a head live.

    Attributes:
        intervals: of equal length, between `low` and `high`.
        order: degree of the polynomials; 0 is steps, 1 straight pieces, 3 cubic.
        low, high: ends of the grid; inputs beyond are moved to the nearer end.

    Raises:
        ValueError: fewer intervals than the order, a negative order, or ends in the wrong order.

    Example:
        >>> grid = Grid(intervals=5, order=3, low=-2.0, high=2.0)
        >>> grid.coefficients, grid.step
        (8, 0.8)
    """

    intervals: int = 5
    order: int = 3
    low: float = -3.0
    high: float = 3.0

    def __post_init__(self) -> None:
        if self.order < 0 or self.intervals < max(1, self.order):
            raise ValueError(
                f"got a grid of {self.intervals} intervals for splines of order {self.order}; expected an order of 0 "
                "or more, and at least as many intervals: on fewer, functions of the basis reach past both ends"
            )
        if not self.low < self.high:
            raise ValueError(f"got a grid from {self.low} to {self.high}; expected low < high")

    @property
    def coefficients(self) -> int:
        """Numbers that a spline has."""
        return self.intervals + self.order

    @property
    def step(self) -> float:
        """Length of an interval."""
        return (self.high - self.low) / self.intervals

    def local_basis(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The functions of the basis that are not zero at each input (Cox and de Boor's recursion).

        Args:
            inputs: any shape.

        Returns:
            The number of the first of them, int64 of the inputs' shape, which is the number of the interval; and the
            values of it and the next ones, `(…, order + 1)`, which add up to 1.
        """
        place = (inputs.clamp(self.low, self.high) - self.low) / self.step
        cell = place.detach().floor().clamp(0, self.intervals - 1)
        within = (place - cell).unsqueeze(-1)
        values = torch.ones_like(within)
        for degree in range(1, self.order + 1):
            ahead = torch.arange(degree - 1, -1, -1, device=inputs.device)
            moved = values * ((within + ahead) / degree)  # what goes to the next function; the rest stays
            values = F.pad(values - moved, (0, 1)) + F.pad(moved, (1, 0))
        return cell.long(), values

    def basis(self, inputs: Tensor) -> Tensor:
        """All functions of the basis at each input: `(…, coefficients)`."""
        cell, values = self.local_basis(inputs)
        places = cell.unsqueeze(-1) + torch.arange(self.order + 1, device=inputs.device)
        empty = values.new_zeros(*inputs.shape, self.coefficients)
        return empty.scatter(-1, places, values)
