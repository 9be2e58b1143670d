"""Least squares by streaming normal equations: the start of a stitching layer and of ridge probes.

The fit is y ≈ W x + b over all rows seen. Only the Gram matrices are kept, in float64, about the mean of the
first rows (which avoids the cancellation that large, nearly constant hidden units would cause). Features are
standardised before solving, so that a ridge means the same for a unit of variance 1e-4 as for one of 1e+4:
hidden states of language models have both.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-10  # least share of a feature's variance that the features before it may leave unexplained
CONSTANT = 1e-24  # variance, relative to the squared mean, at which float64 can no longer tell a unit from a constant
# Rows per feature below which a fit is warned of: at 4, what is left of unseen rows is a third more than need be.
ENOUGH_ROWS = 4
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


@dataclass(frozen=True, eq=False)
class Factor:
    """What least-squares maps of the same rows of x, to any y, have in common.

    Attributes:
        scale: `(in,)` standard deviation of each feature; infinite for a constant.
        lower: `(in, in)` Cholesky factor of the standardised features' second moments, ridge included.
        ridge: the penalty, relative to the variance of a standardised feature.
    """

    scale: Tensor
    lower: Tensor
    ridge: float


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """The sums that determine a least-squares map y ≈ W x + b, all in float64.

    Attributes:
        rows: number of rows seen.
        shift_x, shift_y: `(in,)` and `(out,)` points that the sums are about.
        sum_x, sum_y: Σ (x − shift) and Σ (y − shift).
        gram, cross: `(in, in)` Σ (x − shift)(x − shift)ᵀ and `(in, out)` Σ (x − shift)(y − shift)ᵀ.
        square_y: Σ ‖y − shift‖².
    """

    rows: int
    shift_x: Tensor
    shift_y: Tensor
    sum_x: Tensor
    sum_y: Tensor
    gram: Tensor
    cross: Tensor
    square_y: Tensor

    def about(self, shift_x: Tensor, shift_y: Tensor) -> "NormalEquations":
        """The same rows, summed about other points."""
        by_x, by_y = self.shift_x - shift_x, self.shift_y - shift_y
        return NormalEquations(
            self.rows,
            shift_x,
            shift_y,
            self.sum_x + self.rows * by_x,
            self.sum_y + self.rows * by_y,
            moved_gram(self.gram, self.sum_x, self.rows, by_x),
            self.cross
            + torch.outer(by_x, self.sum_y)
            + torch.outer(self.sum_x, by_y)
            + self.rows * torch.outer(by_x, by_y),
            self.square_y + 2 * (by_y * self.sum_y).sum() + self.rows * by_y.square().sum(),
        )

    def solve(self, ridge: float | None = None, factor: Factor | None = None) -> LinearFit:
        """Solve for W and b; arguments and errors as for `LeastSquares.solve`.

        Args:
            factor: of other equations of the same rows of x; None makes it.
        """
        factor = self.factor(ridge) if factor is None else factor
        mean_x, mean_y = self.sum_x / self.rows, self.sum_y / self.rows
        cross = (self.cross / self.rows - torch.outer(mean_x, mean_y)) / factor.scale[:, None]
        standardised = torch.cholesky_solve(cross, factor.lower)
        weight = (standardised / factor.scale[:, None]).T
        bias = self.shift_y + mean_y - weight @ (self.shift_x + mean_x)
        # W solves (S + ridge) W = C of standardised features: tr(Wᵀ S W) takes no product of matrices.
        explained = (standardised * cross).sum() + factor.ridge * standardised.square().sum()
        return LinearFit(weight, bias, self._r2(self._variance() - explained), factor.ridge, self.rows)

    def factor(self, ridge: float | None = None) -> Factor:
        """What the maps of the same rows of x to any y have in common; arguments and errors as for `solve`."""
        if not self.rows:
            raise ValueError("got no rows to fit; expected at least one token that is neither padding nor BOS")
        mean_x = self.sum_x / self.rows
        gram = self.gram / self.rows - torch.outer(mean_x, mean_x)
        constant = gram.diagonal() <= CONSTANT * (self.shift_x + mean_x).square()
        scale = gram.diagonal().sqrt().masked_fill(constant, torch.inf)
        standardised = gram / scale / scale[:, None]
        standardised.diagonal()[constant] = 1.0
        ridge = self._choose_ridge(standardised) if ridge is None else ridge
        standardised.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(standardised)
        if failed:
            raise ValueError(
                f"got ridge={ridge:g}, at which {self.rows} rows do not determine a linear map of {len(gram)} "
                "features; expected more rows or a larger ridge. Pass ridge=None to leave it to the fit"
            )
        return Factor(scale, lower, ridge)

    def fit_of(self, weight: Tensor, bias: Tensor, ridge: float = 0.0) -> LinearFit:
        """Any map, `(out, in)` and `(out,)`, with the share of the variance of y that it explains."""
        mean_x, mean_y = self.sum_x / self.rows, self.sum_y / self.rows
        gram = self.gram / self.rows - torch.outer(mean_x, mean_x)
        cross = self.cross / self.rows - torch.outer(mean_x, mean_y)
        residual = self._variance() - 2 * (weight * cross.T).sum() + ((weight @ gram) * weight).sum()
        residual += (self.shift_y + mean_y - weight @ (self.shift_x + mean_x) - bias).square().sum()
        return LinearFit(weight, bias, self._r2(residual), ridge, self.rows)

    def _variance(self) -> Tensor:
        """Of y, summed over its units."""
        return self.square_y / self.rows - (self.sum_y / self.rows).square().sum()

    def _r2(self, residual: Tensor) -> float:
        """Share of the variance of y that is explained, where `residual` is not."""
        variance = self._variance()
        is_constant = variance <= CONSTANT * (self.shift_y + self.sum_y / self.rows).square().sum()
        return 1.0 if is_constant else 1 - float(residual / variance)

    def _choose_ridge(self, standardised: Tensor) -> float:
        width = len(standardised)
        if self.rows > width:
            factor, failed = torch.linalg.cholesky_ex(standardised)
            if not failed and factor.diagonal().min().square() > RANK_TOLERANCE:
                return 0.0
        warnings.warn(
            f"{self.rows} rows do not determine a linear map of {width} features: solved with a relative ridge "
            f"of {RIDGE:g}. Give more calibration tokens than the source is wide, better ten times as many",
            stacklevel=5,
        )
        return RIDGE


def warn_of_few_rows(rows: int, width: int) -> None:
    """Warn where a linear map of `width` features is fitted to fewer than `ENOUGH_ROWS` times as many rows."""
    if rows < ENOUGH_ROWS * width:
        warnings.warn(
            f"got {rows} calibration rows for linear maps of {width} features, {rows / width:.1f} per feature; "
            f"expected at least {ENOUGH_ROWS}, better ten. Calibrate on more data: tokens, or positions of images",
            stacklevel=3,
        )


def moved_gram(gram: Tensor, sums: Tensor, rows: int, by: Tensor) -> Tensor:
    """Σ z zᵀ after every row z, whose sum is `sums`, has grown by `by`."""
    return gram + torch.outer(sums, by) + torch.outer(by, sums) + rows * torch.outer(by, by)


def joint_equations(parts: Sequence[NormalEquations]) -> NormalEquations:
    """The equations of one map for the rows of all parts, which must have one width of x and one of y."""
    rows = sum(part.rows for part in parts)
    shift_x = torch.stack([part.shift_x * part.rows + part.sum_x for part in parts]).sum(0) / max(rows, 1)
    shift_y = torch.stack([part.shift_y * part.rows + part.sum_y for part in parts]).sum(0) / max(rows, 1)
    moved = [part.about(shift_x, shift_y) for part in parts]
    summed = ("rows", "sum_x", "sum_y", "gram", "cross", "square_y")
    return replace(moved[0], **{name: sum(getattr(part, name) for part in moved) for name in summed})


def summing_device(device: torch.device | str) -> torch.device:
    """Where float64 sums of a device's tensors live: there, or on the CPU for Apple's GPUs, which have no float64."""
    return torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)


class LeastSquares:
    """Accumulates the normal equations of y ≈ W x + b.

    Args:
        in_features, out_features: widths of x and y.
        device: where the rows come from; the float64 sums, `8 · in · (in + out)` bytes, live there (`summing_device`).
        bias: whether there is b; without it the sums are about 0, as if every row were seen with both signs.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | str = "cpu", bias: bool = True):
        device = summing_device(device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.rows, self.bias = 0, bias
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
        x, y = (one.to(self._gram.device).double() for one in (x, y))
        if not self.rows and self.bias:
            self._shift_x, self._shift_y = x.mean(0), y.mean(0)
        if self.bias:
            x, y = x - self._shift_x, y - self._shift_y
        square_y = y.square().sum()
        if not (square_y.isfinite() and x.sum().isfinite()):
            raise ValueError(
                "got NaN or infinite hidden states; expected finite activations. Load the anchors in bfloat16 "
                "or float32 (float16 overflows in some models) and check their weights"
            )
        self.rows += len(x)
        if self.bias:
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
            self._gram = moved_gram(self._gram, self._sum_x, self.rows, by)
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
        return self.equations().solve(ridge)

    def equations(self) -> "NormalEquations":
        """The sums so far."""
        return NormalEquations(
            self.rows,
            self._shift_x,
            self._shift_y,
            self._sum_x,
            self._sum_y,
            self._gram,
            self._cross,
            self._square_y,
        )
