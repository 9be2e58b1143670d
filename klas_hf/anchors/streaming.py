"""One pass over batches, for text and images alike: each anchor runs once, and whatever is asked for adds itself up.

Only sums are kept, so memory does not grow with the data; over several processes, each reads its share of the batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from klas_hf.anchors.anchor import Anchor
from klas_hf.processes import progress, shared_out, sum_over_processes


class Gathered(ABC):
    """Sums over batches."""

    @abstractmethod
    def update(self, states: Sequence[list[Any]], batch: Any) -> None:
        """Add a batch, of which `states` are those of every anchor."""

    @abstractmethod
    def combine(self) -> None:
        """Make these the sums over all processes."""


@torch.no_grad()
def stream(
    anchors: Sequence[Anchor],
    batches: Iterable[Any],
    gathered: Sequence[Gathered],
    description: str,
    stops: Mapping[int, int] | None = None,
) -> int:
    """Run anchors over batches and add them up, over all processes; returns the number of sequences or images.

    Args:
        stops: the anchors that run, by position, and the last state of each that is needed; None: all of all.
    """
    stops = {place: anchor.num_blocks for place, anchor in enumerate(anchors)} if stops is None else stops
    items = 0
    for batch in progress(shared_out(batches), description):
        states = [anchor.states(batch, stops[n]) if n in stops else [] for n, anchor in enumerate(anchors)]
        for one in gathered:
            one.update(states, batch)
        items += len(batch)
    for one in gathered:
        one.combine()
    return int(sum_over_processes(torch.tensor(float(items), dtype=torch.float64)))
