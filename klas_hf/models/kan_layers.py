"""Kolmogorov-Arnold layers (Liu et al. 2024): a spline on every edge, summed at every output; and heads of them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kan_splines import Grid

BASES = ("none", "silu")


class KANLayer(nn.Module):
    """`out[o] = Σ_i spline_oi(x_i) + base_oi · silu(x_i)` (Liu et al. 2024, Eq. 2.10), the base being optional.

    The splines are constant outside the grid; silu takes the inputs as they are.

    Args:
        inputs, outputs: widths.
        grid: of every spline.
        base: "none" or "silu".

    Attributes:
        coefficients: of the splines, `(outputs, inputs, grid.coefficients)`.
        base: `(outputs, inputs)`, or None.

    Example:
        >>> layer = KANLayer(4, 2, Grid(intervals=5, order=3))
        >>> layer(torch.zeros(3, 4)).shape, layer.coefficients.shape
        (torch.Size([3, 2]), torch.Size([2, 4, 8]))
    """

    def __init__(self, inputs: int, outputs: int, grid: Grid, base: str = "none"):
        super().__init__()
        if base not in BASES:
            raise ValueError(f"got base={base!r}; expected one of {BASES}")
        self.grid = grid
        self.coefficients = nn.Parameter(torch.empty(outputs, inputs, grid.coefficients))
        self.base = nn.Parameter(torch.empty(outputs, inputs)) if base == "silu" else None
        self.reset()

    def reset(self) -> None:
        """Draw the weights so that outputs vary about as much as normed inputs."""
        nn.init.normal_(self.coefficients, std=self.coefficients.shape[1] ** -0.5)
        if self.base is not None:
            nn.init.normal_(self.base, std=self.base.shape[1] ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(…, inputs)` to `(…, outputs)`."""
        out = F.linear(self.grid.basis(hidden).flatten(-2), self.coefficients.flatten(1))
        return out if self.base is None else out + F.linear(F.silu(hidden), self.base)


class KANHead(nn.Module):
    """KAN layers in a row, each after a layer norm without weights, which brings any features onto the grid.

    Args:
        widths: of the features, of hidden layers if any, and of the outputs.
        grid: of every spline.
        base: "none" (splines alone) or "silu".

    Raises:
        ValueError: fewer than two widths, or an unknown base.

    Example:
        >>> head = KANHead([64, 16, 10], Grid(intervals=5, order=3), base="silu")
        >>> head(torch.randn(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, widths: Sequence[int], grid: Grid, base: str = "none"):
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"got widths={list(widths)}; expected those of the features and the outputs, 1 or more")
        self.layers = nn.ModuleList(KANLayer(one, other, grid, base) for one, other in pairwise(widths))

    def forward(self, features: Tensor) -> Tensor:
        """`(…, features)` to `(…, outputs)`."""
        for layer in self.layers:
            features = layer(normed(features))
        return features


def normed(features: Tensor) -> Tensor:
    """Each row with mean 0 and variance 1."""
    return F.layer_norm(features, features.shape[-1:])
