"""Least squares by streaming normal equations: the start of a stitching layer and of ridge probes.

The fit is y ≈ W x + b over all rows seen. Only the Gram matrices are kept, in float64, about the mean of the
first rows (which avoids the cancellation that large, nearly constant hidden units would cause). Features are
standardised before solving, so that a ridge means the same for a unit of variance 1e-4 as for one of 1e+4:
hidden states of language models have both.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-10  # least share of a feature's variance that the features before it may leave unexplained
CONSTANT = 1e-24  # variance, relative to the squared mean, at which float64 can no longer tell a unit from a constant
RIDGE = 1e-6  # used where the Gram matrix is singular, relative to a standardised feature's variance


@dataclass(frozen=True)
class LinearFit:
    """A solved linear map.

    Attributes:
        weight: `(out_features, in_features)`, float64.
        bias: `(out_features,)`, float64.
        r2: share of the variance of y (summed over its units) that the map explains, on the rows it was fitted to.
        ridge: the penalty used, relative to the variance of a standardised feature; 0 for plain least squares.
        rows: number of rows seen.
    """

    weight: Tensor
    bias: Tensor
    r2: float
    ridge: float
    rows: int


class LeastSquares:
    """Accumulates the normal equations of y ≈ W x + b.

    Args:
        in_features, out_features: widths of x and y.
        device: where the float64 sums live: `8 · in · (in + out)` bytes.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | str = "cpu"):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.rows = 0
        self._shift_x, self._shift_y = zeros(in_features), zeros(out_features)
        self._sum_x, self._sum_y = zeros(in_features), zeros(out_features)
        self._gram, self._cross = zeros(in_features, in_features), zeros(in_features, out_features)
        self._square_y = zeros()

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows: `x` is `(rows, in_features)`, `y` is `(rows, out_features)`.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        if not len(x):
            return
        x, y = x.to(self._gram), y.to(self._gram)
        if not self.rows:
            self._shift_x, self._shift_y = x.mean(0), y.mean(0)
        x, y = x - self._shift_x, y - self._shift_y
        square_y = y.square().sum()
        if not (square_y.isfinite() and x.sum().isfinite()):
            raise ValueError(
                "got NaN or infinite hidden states; expected finite activations. Load the anchors in bfloat16 "
                "or float32 (float16 overflows in some models) and check their weights"
            )
        self.rows += len(x)
        self._sum_x += x.sum(0)
        self._sum_y += y.sum(0)
        self._gram += x.T @ x
        self._cross += x.T @ y
        self._square_y += square_y

    def combine(self, total: Callable[[Tensor], Tensor]) -> None:
        """Make these the equations of all processes, each of which has seen other rows.

        Args:
            total: sums a tensor over processes.
        """
        rows = int(total(torch.tensor(self.rows, dtype=torch.float64, device=self._gram.device)))
        if not rows:
            return
        for shift, sums in ((self._shift_x, self._sum_x), (self._shift_y, self._sum_y)):
            common = total(shift * self.rows + sums) / rows  # the mean over all processes
            moved = shift - common
            self._move(shift is self._shift_x, moved)
            shift.copy_(common)
        self._sum_x, self._sum_y = total(self._sum_x), total(self._sum_y)
        self._gram, self._cross, self._square_y = total(self._gram), total(self._cross), total(self._square_y)
        self.rows = rows

    def _move(self, is_x: bool, by: Tensor) -> None:
        """Take the sums about another shift: every row of x (or y) grows by `by`."""
        if is_x:
            self._gram += torch.outer(self._sum_x, by) + torch.outer(by, self._sum_x) + self.rows * torch.outer(by, by)
            self._cross += torch.outer(by, self._sum_y)
            self._sum_x += self.rows * by
        else:
            self._square_y += 2 * (by * self._sum_y).sum() + self.rows * by.square().sum()
            self._cross += torch.outer(self._sum_x, by)
            self._sum_y += self.rows * by

    def solve(self, ridge: float | None = None) -> LinearFit:
        """Solve for W and b.

        Args:
            ridge: penalty on the weights of standardised features. None: 0, or `RIDGE` with a warning where
                the rows do not determine the map.

        A feature that is constant gets the weight 0.

        Raises:
            ValueError: no row was added, or the rows do not determine the map at the ridge asked for.
        """
        if not self.rows:
            raise ValueError("got no rows to fit; expected at least one token that is neither padding nor BOS")
        mean_x, mean_y = self._sum_x / self.rows, self._sum_y / self.rows
        gram = self._gram / self.rows - torch.outer(mean_x, mean_x)
        cross = self._cross / self.rows - torch.outer(mean_x, mean_y)
        constant = gram.diagonal() <= CONSTANT * (self._shift_x + mean_x).square()
        scale = gram.diagonal().sqrt().masked_fill(constant, torch.inf)
        standardised = gram / scale / scale[:, None]
        standardised.diagonal()[constant] = 1.0
        ridge = self._choose_ridge(standardised) if ridge is None else ridge
        standardised.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(standardised)
        if failed:
            raise ValueError(
                f"got ridge={ridge:g}, at which {self.rows} rows do not determine a linear map of {len(gram)} "
                "features; expected more rows or a larger ridge. Pass ridge=None to leave it to the fit"
            )
        weight = (torch.cholesky_solve(cross / scale[:, None], factor) / scale[:, None]).T
        bias = self._shift_y + mean_y - weight @ (self._shift_x + mean_x)
        variance = self._square_y / self.rows - mean_y.square().sum()
        residual = variance - 2 * (weight * cross.T).sum() + ((weight @ gram) * weight).sum()
        is_constant = variance <= CONSTANT * (self._shift_y + mean_y).square().sum()
        r2 = 1.0 if is_constant else 1 - float(residual / variance)
        return LinearFit(weight, bias, r2, ridge, self.rows)

    def _choose_ridge(self, standardised: Tensor) -> float:
        width = len(standardised)
        if self.rows > width:
            factor, failed = torch.linalg.cholesky_ex(standardised)
            if not failed and factor.diagonal().min().square() > RANK_TOLERANCE:
                return 0.0
        warnings.warn(
            f"{self.rows} rows do not determine a linear map of {width} features: solved with a relative ridge "
            f"of {RIDGE:g}. Give more calibration tokens than the source is wide, better ten times as many",
            stacklevel=3,
        )
        return RIDGE
