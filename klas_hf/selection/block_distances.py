"""How far runs of an anchor's blocks take its states: what pruning rules rank blocks by."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.streaming import Gathered, stream
from klas_hf.maths.least_squares import summing_device
from klas_hf.processes import sum_over_processes

Run = tuple[int, int]  # blocks[start:stop]; also the states before and after them
ROWS = 256  # that are in float64 at a time, of every state


def cosine_distance(cosines: Tensor) -> Tensor:
    """1 − cos, 0 to 2."""
    return 1 - cosines


def angular_distance(cosines: Tensor) -> Tensor:
    """arccos(cos) / π, 0 to 1."""
    return cosines.clamp(-1, 1).arccos() / torch.pi


def run_distances(
    anchor: Anchor, data: Iterable[Any], runs: Sequence[Run], measure: Callable[[Tensor], Tensor], *, last: bool = False
) -> dict[Run, float]:
    """Mean distance between the states before and after each run, from one pass over the data.

    Args:
        anchor: the anchor.
        data: batches of token ids or images.
        runs: each between states of one width and grid.
        measure: distances from cosines, `(rows,)`.
        last: compare what a probe reads of the last unit of each sequence or image, not every position that counts.

    Raises:
        ValueError: no data.
    """
    if not runs:
        return {}
    sums = _Distances(anchor, runs, measure, last)
    stream([anchor], anchor.read(data), [sums], "distances between states")
    if not sums.total[1].all():
        raise ValueError("got no data to measure on; expected batches. Check that an iterator was not used up before")
    means = (sums.total[0] / sums.total[1]).tolist()
    return dict(zip(runs, means, strict=True))


class _Distances(Gathered):
    """Sums of distances, and their numbers, `(2, runs)`."""

    def __init__(self, anchor: Anchor, runs: Sequence[Run], measure: Callable[[Tensor], Tensor], last: bool):
        self.anchor, self.runs, self.measure, self.last = anchor, runs, measure, last
        self.total = torch.zeros(2, len(runs), dtype=torch.float64)

    def update(self, states: Sequence[list[Any]], batch: Any) -> None:
        ends = sorted({end for run in self.runs for end in run})
        home = summing_device(self.anchor.device)
        rows = {end: self._rows(states[0][end], batch).to(home) for end in ends}
        for first in range(0, max(map(len, rows.values())), ROWS):
            part = {end: normalize(of_one[first : first + ROWS].double(), dim=1) for end, of_one in rows.items()}
            found = [self.measure((part[one] * part[other]).sum(1)) for one, other in self.runs]
            self.total[0] += torch.stack([one.sum() for one in found]).cpu()
            self.total[1] += torch.tensor([len(one) for one in found])

    def _rows(self, state: Any, batch: Any) -> Tensor:
        if not self.last:
            return self.anchor.rows(state, batch)
        items = batch.unit_items
        ends = torch.cat([items[1:] != items[:-1], torch.ones(min(1, len(items)), dtype=torch.bool)])
        units = self.anchor.probed(state, batch)
        return units[ends.to(units.device)]

    def combine(self) -> None:
        self.total = sum_over_processes(self.total)
