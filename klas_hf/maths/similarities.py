"""The measures of similarity that KLAS is compared with (Tab. 1, 2, 9 and 10), for all pairs of blocks in one pass.

Linear CKA (Kornblith et al., 2019) and DM ("direct matching"), the share of the target's variance that a least-squares
map of the source leaves unexplained, come from sums over rows: memory does not grow with the data. MSE and CE stand
with the divergences; class-conditional CKA (App. D.2), which keeps one pooled row per image, in `class_cka`.

Blocks are named by their positions, from 0, in the sequences that `update` is given.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klas_hf.maths.least_squares import (
    Factor,
    LinearFit,
    NormalEquations,
    joint_equations,
    moved_gram,
    summing_device,
)

Pair = tuple[int, int]
Array = NDArray[np.float64]

ROWS = 1024  # rows that are in float64 at a time: more only take memory


class PairMoments:
    """Accumulates the centred second moments of pairs of blocks: what CKA and least squares need.

    Memory is `8 · (Σ_i width_i² + Σ_j width_j² + Σ_pairs width_i · width_j)` bytes over the blocks that a pair names
    (`bytes_needed`), whatever the number of rows.

    Args:
        pairs: positions (source block, target block), each pair once.
        source_widths, target_widths: features of every block of the two sequences, in a pair or not.
        device: where the rows come from; the float64 sums live there (`summing_device`).

    Raises:
        ValueError: no pair, a pair twice, or one that names no block.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        source_widths: Sequence[int],
        target_widths: Sequence[int],
        device: torch.device | str = "cpu",
    ):
        check_pairs(pairs, len(source_widths), len(target_widths))
        self.shape, self.device = (len(source_widths), len(target_widths)), (device := summing_device(device))
        self._source = {i: _Moments(source_widths[i], device) for i in sorted({i for i, _ in pairs})}
        self._target = {j: _Moments(target_widths[j], device) for j in sorted({j for _, j in pairs})}
        self._cross = {
            (i, j): torch.zeros(source_widths[i], target_widths[j], dtype=torch.float64, device=device)
            for i, j in pairs
        }
        self._factored: tuple[Any, Factor] | None = None

    @classmethod
    def bytes_needed(cls, pairs: Sequence[Pair], source_widths: Sequence[int], target_widths: Sequence[int]) -> int:
        """Memory of the sums, in bytes, before anything is allocated."""
        one_sided = [source_widths[i] for i in {i for i, _ in pairs}] + [
            target_widths[j] for j in {j for _, j in pairs}
        ]
        crossed = sum(source_widths[i] * target_widths[j] for i, j in pairs)
        return 8 * (sum(width * width + 2 * width for width in one_sided) + crossed)

    def update(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Add rows.

        Args:
            source, target: `(rows, width)` of every block; the two blocks of a pair have equally many rows, which stand
                for the same places of the same images. Rows may differ between pairs (stages have other grids).

        Raises:
            ValueError: rows of a pair that differ in number, or a value that is NaN or infinite.
        """
        for i, j in self._cross:
            if len(source[i]) != len(target[j]):
                raise ValueError(
                    f"got {len(source[i])} rows of source block {i} and {len(target[j])} of target block {j}; expected "
                    "equally many in a pair. Pair only blocks of one spatial grid"
                )
        self._check_finite([source[i] for i in self._source] + [target[j] for j in self._target])
        for start in range(0, max(len(source[i]) for i in self._source), ROWS):
            part = slice(start, start + ROWS)
            xs = {i: moments.add(source[i][part]) for i, moments in self._source.items()}
            ys = {j: moments.add(target[j][part]) for j, moments in self._target.items()}
            for (i, j), cross in self._cross.items():
                cross.addmm_(xs[i].T, ys[j])

    def _check_finite(self, tensors: Sequence[Tensor]) -> None:
        if not torch.stack([tensor.sum().isfinite().to(self.device) for tensor in map(Tensor.float, tensors)]).all():
            raise ValueError(
                "got NaN or infinite features; expected finite activations. Load the anchors in bfloat16 or float32 "
                "and check their weights"
            )

    def combine(self, total: Callable[[Tensor], Tensor]) -> None:
        """Make these the sums of all processes, each of which has seen other rows.

        Args:
            total: sums a tensor over processes.
        """
        source = {i: moments.common_shift(total) for i, moments in self._source.items()}
        target = {j: moments.common_shift(total) for j, moments in self._target.items()}
        for (i, j), cross in self._cross.items():
            cross.copy_(total(self._equations(i, j).about(source[i], target[j]).cross))
        for blocks, shifts in ((self._source, source), (self._target, target)):
            for block, moments in blocks.items():
                moments.move(shifts[block])
                moments.combine(total)

    def cka(self) -> Array:
        """`(m, n)` linear CKA, ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features, 0 to 1; nan for pairs not asked for.

        nan, too, where a block's features do not vary.

        Raises:
            ValueError: no rows.
        """
        if not all(moments.rows for moments in self._source.values()):
            raise ValueError("got no rows for some block; expected at least one batch of features of every block")
        norms_x = {i: torch.linalg.norm(moments.covariance()) for i, moments in self._source.items()}
        norms_y = {j: torch.linalg.norm(moments.covariance()) for j, moments in self._target.items()}
        values = np.full(self.shape, np.nan)
        for (i, j), cross in self._cross.items():
            x, y = self._source[i], self._target[j]
            covariance = cross / x.rows - torch.outer(x.mean, y.mean)
            values[i, j] = float(covariance.square().sum() / (norms_x[i] * norms_y[j]))
        return np.minimum(values, 1.0)  # rounding; keeps nans

    def least_squares(self, i: int, j: int, ridge: float | None = None) -> LinearFit:
        """The map from source block i to target block j; `ridge` as for `LeastSquares.solve`.

        Raises:
            ValueError: a pair that was not asked for, or no rows.
        """
        return self.merged([(i, j)], ridge)

    def merged(self, pairs: Iterable[Pair], ridge: float | None = None) -> LinearFit:
        """The one map that serves several pairs best: a stitching layer that they share.

        Its normal equations are the sum of theirs, so that each pair weighs as much as it has rows.

        Raises:
            ValueError: no pair, pairs that were not asked for or differ in width, or no rows.
        """
        pairs = list(pairs)
        if not pairs or (unknown := [pair for pair in pairs if pair not in self._cross]):
            raise ValueError(f"got the pairs {unknown if pairs else pairs}; expected some of {sorted(self._cross)}")
        widths = {tuple(self._cross[pair].shape) for pair in pairs}
        if len(widths) > 1:
            raise ValueError(f"got pairs of the widths {sorted(widths)}; expected one width on each side")
        if len(pairs) == 1:
            return self._equations(*pairs[0]).solve(ridge, self._factor(*pairs[0], ridge))
        return joint_equations([self._equations(*pair) for pair in pairs]).solve(ridge)

    def _factor(self, i: int, j: int, ridge: float | None) -> Factor:
        """Of a source block, one for all its targets: the last is kept, so ask for the pairs of a block together."""
        about = i, ridge, self._source[i].rows
        if self._factored is None or self._factored[0] != about:
            self._factored = None  # before the next takes memory
            self._factored = about, self._equations(i, j).factor(ridge)
        return self._factored[1]

    def unexplained(self, ridge: float | None = None) -> Array:
        """`(m, n)` 1 − R² of every pair's least-squares map, 0 to 1; nan for pairs not asked for."""
        values = np.full(self.shape, np.nan)
        for i, j in sorted(self._cross):
            values[i, j] = 1 - self.least_squares(i, j, ridge).r2
        return np.maximum(values, 0.0)  # rounding; keeps nans

    def _equations(self, i: int, j: int) -> NormalEquations:
        x, y, cross = self._source[i], self._target[j], self._cross[i, j]
        return NormalEquations(x.rows, x.shift, y.shift, x.sum, y.sum, x.gram, cross, y.gram.trace())


class _Moments:
    """Σ x and Σ x xᵀ of one block, about the mean of its first rows."""

    def __init__(self, width: int, device: torch.device | str):
        self.rows = 0
        self.shift = torch.zeros(width, dtype=torch.float64, device=device)
        self.sum = torch.zeros_like(self.shift)
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> Tensor:
        """Add rows and return them as they were summed: in float64, about the shift."""
        x = x.to(self.gram.device).double()
        if not self.rows and len(x):
            self.shift = x.mean(0)
        x = x - self.shift
        self.rows += len(x)
        self.sum += x.sum(0)
        self.gram.addmm_(x.T, x)
        return x

    @property
    def mean(self) -> Tensor:
        return self.sum / self.rows

    def covariance(self) -> Tensor:
        return self.gram / self.rows - torch.outer(self.mean, self.mean)

    def common_shift(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean over all processes."""
        rows = total(torch.tensor(float(self.rows), dtype=torch.float64, device=self.shift.device))
        return total(self.shift * self.rows + self.sum) / rows.clamp(min=1)

    def move(self, shift: Tensor) -> None:
        """Take the sums about another point."""
        by = self.shift - shift
        self.gram = moved_gram(self.gram, self.sum, self.rows, by)
        self.sum = self.sum + self.rows * by
        self.shift = shift

    def combine(self, total: Callable[[Tensor], Tensor]) -> None:
        self.rows = int(total(torch.tensor(float(self.rows), dtype=torch.float64, device=self.shift.device)))
        self.sum, self.gram = total(self.sum), total(self.gram)


def check_pairs(pairs: Sequence[Pair], sources: int, targets: int) -> None:
    """That there are pairs, each once, of blocks that exist; ValueError otherwise."""
    wrong = [(i, j) for i, j in pairs if not (0 <= i < sources and 0 <= j < targets)]
    if not pairs or wrong or len(set(pairs)) < len(pairs):
        raise ValueError(
            f"got {len(pairs)} pairs, {len(set(pairs))} of them different and {wrong} out of range; expected at least "
            f"one, each once, of positions below {sources} and {targets}"
        )
