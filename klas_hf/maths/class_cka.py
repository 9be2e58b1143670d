"""Linear CKA within classes (KLAS App. D.2), for all pairs of blocks in one pass."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from klas_hf.maths.similarities import Array, Pair, check_pairs


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
        check_pairs(pairs, *blocks)
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
