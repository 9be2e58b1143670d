"""The measures of similarity that KLAS is compared with (Tab. 1, 2, 9 and 10), for all pairs of blocks in one pass.

Linear CKA (Kornblith et al., 2019) and DM ("direct matching"), the share of the target's variance that a least-squares
map of the source leaves unexplained, come from sums over rows: memory does not grow with the data. Class-conditional
CKA (App. D.2) keeps one pooled row per image. MSE and CE stand with the divergences.

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
        _check_pairs(pairs, len(source_widths), len(target_widths))
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


class ClassConditionalCka:
    """Linear CKA within each class, then the mean over classes (KLAS App. D.2).

    Gram matrices of features per class would take classes × width² memory, so the pooled features themselves are kept,
    as float32 on the CPU, and each class is compared through its images × images Gram matrices. This is the one
    statistic whose memory grows with the data: `4 · images · Σ width` bytes.

    Args:
        pairs: positions (source block, target block), each pair once.
        blocks: number of source and of target blocks.
        num_classes: number of classes; labels are 0 … num_classes - 1.

    Raises:
        ValueError: no pair, a pair twice, or one that names no block.
    """

    def __init__(self, pairs: Sequence[Pair], blocks: tuple[int, int], num_classes: int):
        _check_pairs(pairs, *blocks)
        self.pairs, self.shape, self.num_classes = tuple(pairs), blocks, num_classes
        self._source: dict[int, list[Tensor]] = {i: [] for i in sorted({i for i, _ in pairs})}
        self._target: dict[int, list[Tensor]] = {j: [] for j in sorted({j for _, j in pairs})}
        self._labels: list[Tensor] = []

    def update(self, source: Sequence[Tensor], target: Sequence[Tensor], labels: Tensor) -> None:
        """Add images.

        Args:
            source, target: `(images, width)` pooled features of every block.
            labels: `(images,)` integers.

        Raises:
            ValueError: a label out of range.
        """
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"got labels from {int(labels.min())} to {int(labels.max())}; expected 0 to {self.num_classes - 1}"
            )
        for kept, features in ((self._source, source), (self._target, target)):
            for block, rows in kept.items():
                rows.append(features[block].detach().float().cpu())
        self._labels.append(labels.detach().cpu())

    def combine(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Make these the images of all processes.

        Args:
            gather: concatenates the rows of all processes, in the same order each time. They may have unequally many;
                one that has seen no image gives a tensor of shape `(0,)`, which `torch.cat` joins to any.
        """
        for kept in (self._source, self._target):
            for block, rows in kept.items():
                kept[block] = [gather(torch.cat([torch.empty(0), *rows]))]
        self._labels = [gather(torch.cat([torch.empty(0, dtype=torch.long), *self._labels]))]

    @property
    def left_out(self) -> int:
        """Number of classes with fewer than two images: nothing varies within them."""
        return self.num_classes - len(self._classes())

    def cka(self) -> Array:
        """`(m, n)` mean over classes of the CKA of a class's images, 0 to 1; nan for pairs not asked for.

        A class of two images counts as 1 whatever its features: give many images per class.

        Raises:
            ValueError: no class has two images.
        """
        classes = self._classes()
        if not classes:
            raise ValueError(
                f"got fewer than two images of each of {self.num_classes} classes; expected at least two of one, "
                "better twenty of each"
            )
        labels = torch.cat(self._labels)
        sums = torch.zeros(len(self._source), len(self._target), dtype=torch.float64)
        sources, targets = ([torch.cat(rows) for rows in kept.values()] for kept in (self._source, self._target))
        for number in classes:
            of_class = labels == number
            x, y = _unit_grams([rows[of_class] for rows in sources]), _unit_grams([rows[of_class] for rows in targets])
            sums += x @ y.T
        values = np.full(self.shape, np.nan)
        places = {i: row for row, i in enumerate(self._source)}, {j: column for column, j in enumerate(self._target)}
        for i, j in self.pairs:
            values[i, j] = float(sums[places[0][i], places[1][j]]) / len(classes)
        return np.minimum(values, 1.0)  # rounding; keeps nans

    def _classes(self) -> list[int]:
        counts = torch.bincount(torch.cat([torch.zeros(0, dtype=torch.long), *self._labels]))
        return (counts >= 2).nonzero().flatten().tolist()


def _unit_grams(blocks: Sequence[Tensor]) -> Tensor:
    """`(blocks, images²)` Gram matrices of centred features, each of Frobenius norm 1; nan where nothing varies."""
    grams = []
    for rows in blocks:
        centred = rows.double() - rows.double().mean(0)
        gram = (centred @ centred.T).flatten()
        grams.append(gram / gram.norm())
    return torch.stack(grams)


def _check_pairs(pairs: Sequence[Pair], sources: int, targets: int) -> None:
    wrong = [(i, j) for i, j in pairs if not (0 <= i < sources and 0 <= j < targets)]
    if not pairs or wrong or len(set(pairs)) < len(pairs):
        raise ValueError(
            f"got {len(pairs)} pairs, {len(set(pairs))} of them different and {wrong} out of range; expected at least "
            f"one, each once, of positions below {sources} and {targets}"
        )
