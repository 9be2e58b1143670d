"""What probes say of all stitches: Θ, capacity and Γ (KLAS Alg. 2, Eq. 1 and 2).

Every probe's distribution is formed for a few tokens at a time, all pairs of divergences come from one matrix product,
and only sums per sequence are kept: memory depends on neither the number of tokens nor, beyond the workspace, on the
vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from klas_hf.maths.divergences import consecutive_kl, pairwise_kl
from klas_hf.maths.estimates import RatioSums
from klas_hf.processes import sum_array_over_processes
from klas_hf.scores.sides import AnchorPair
from klas_hf.scores.streaming import Gathered


class ProbedSums(Gathered):
    """Sums of Θ, capacity and Γ for all pairs of blocks of two anchors.

    Args:
        anchors: of m and n blocks.
        probes: of both.

    Attributes:
        cross, capacity, gamma: `(m, n)`, `(n - 1,)` and `(m, n - 1)`.
        units: tokens or images.
    """

    def __init__(self, anchors: AnchorPair, probes: Sequence[Any]):
        self.anchors, self.probes = anchors, probes
        m, n = self.shape = anchors.first.num_blocks, anchors.last.num_blocks
        self.cross, self.capacity, self.gamma = RatioSums((m, n)), RatioSums((n - 1,)), RatioSums((m, n - 1))
        self.units = 0

    def update(self, states: tuple[list[Any], list[Any]], batch: Any) -> None:
        (m, n), count = self.shape, self.anchors.items(batch)
        cross, capacity, units = (torch.zeros(count, *shape, dtype=torch.float64) for shape in ((m, n), (n - 1,), ()))
        for log_p, log_q, items in self.anchors.log_probs(states, batch, self.probes):
            for sums, terms in ((cross, pairwise_kl(log_p, log_q)), (capacity, consecutive_kl(log_q))):
                sums.index_add_(0, items, terms.cpu())
            units += torch.bincount(items, minlength=count)
        if not (cross.isfinite().all() and capacity.isfinite().all()):
            raise ValueError(
                "got probe distributions with NaN or infinite divergences; expected finite activations. Load the "
                "anchors in bfloat16 or float32 and check their weights and probes"
            )
        kept = units > 0
        self._add(cross[kept].numpy(), capacity[kept].numpy(), units[kept].numpy())

    def combine(self) -> None:
        """Make these the sums over all processes.

        Raises:
            ValueError: no process has seen anything.
        """
        for sums in (self.cross, self.capacity, self.gamma):
            sums.set_moments(sum_array_over_processes(sums.moments()))
        self.units = int(sum_array_over_processes(np.array([float(self.units)]))[0])
        if not self.units:
            raise ValueError(
                f"got no {self.anchors.nothing}; expected batches of some. Check the attention masks, and that an "
                "iterator was not used up before"
            )

    def _add(self, cross: np.ndarray, capacity: np.ndarray, units: np.ndarray) -> None:
        self.units += int(units.sum())
        self.cross.update(cross, units[:, None, None])
        self.capacity.update(capacity, units[:, None])
        self.gamma.update(cross[:, :, :-1], capacity[:, None, :])
