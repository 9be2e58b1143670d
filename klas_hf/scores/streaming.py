"""One pass over batches, for text and images alike: both anchors run once, and whatever is asked for adds itself up.

Only sums are kept, so memory does not grow with the data; over several processes, each reads its share of the batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from klas_hf.processes import progress, shared_out, sum_over_processes
from klas_hf.scores.sides import AnchorPair


class Gathered(ABC):
    """Sums over batches."""

    @abstractmethod
    def update(self, states: tuple[list[Any], list[Any]], batch: Any) -> None:
        """Add a batch, of which `states` are the outputs of all blocks of both anchors."""

    @abstractmethod
    def combine(self) -> None:
        """Make these the sums over all processes."""


@torch.no_grad()
def stream(anchors: AnchorPair, batches: Iterable[Any], gathered: Sequence[Gathered], description: str) -> int:
    """Run both anchors over the batches and add them up, over all processes; returns the number of items."""
    items = 0
    for batch in progress(shared_out(batches), description):
        states = anchors.states(batch)
        for one in gathered:
            one.update(states, batch)
        items += anchors.items(batch)
    for one in gathered:
        one.combine()
    return int(sum_over_processes(torch.tensor(float(items), dtype=torch.float64)))
