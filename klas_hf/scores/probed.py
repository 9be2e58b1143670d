"""What probes say of all stitches: Θ, capacity and Γ (KLAS Alg. 2, Eq. 1 and 2).

Every probe's distribution is formed for a few tokens at a time, all pairs of divergences come from one matrix product,
and only sums per sequence are kept: memory depends on neither the number of tokens nor, beyond the workspace, on the
vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.streaming import Gathered
from klas_hf.maths.divergences import SLICE, consecutive_kl, pairwise_kl
from klas_hf.maths.estimates import RatioSums
from klas_hf.processes import sum_array_over_processes


class Distributions:
    """What the probes of two anchors say, a few units at a time, in memory that the next ones overwrite.

    Args:
        anchors: of m and n blocks.
        workspace_bytes: memory for the distributions.
    """

    def __init__(self, anchors: tuple[Anchor, Anchor], workspace_bytes: int):
        self.anchors = anchors
        m, n, classes = anchors[0].num_blocks, anchors[1].num_blocks, anchors[1].classes
        # Alive at once: log-probabilities of both, and the logits of one or two slices for the divergences.
        either = (max(m, n) + 1) * max(classes, 2 * min(SLICE, classes))
        self.chunk = max(1, workspace_bytes // (4 * (classes * (m + n) + either)))
        self._memory: tuple[Tensor, ...] = ()

    def of(
        self, states: Sequence[list[Any]], batch: Any, probes: Sequence[Any]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Log-probabilities `(m, units, classes)` and `(n, units, classes)`, fp32, and `(units,)` the units' items."""
        for start in range(0, len(batch.unit_items), self.chunk):
            units = slice(start, start + self.chunk)
            items = batch.unit_items[units]  # the end of one sequence, perhaps, and the start of others
            found = self._workspace(len(items))
            for probe, anchor, of_one, out in zip(probes, self.anchors, states, found, strict=True):
                read = [anchor.probed(state, batch, units).to(anchor.device) for state in of_one[1:]]
                probe.log_probs(read, anchor, out=out)
            yield *found, items

    def _workspace(self, units: int) -> tuple[Tensor, ...]:
        if not self._memory or self._memory[0].shape[1] < units:
            self._memory = ()  # let go before taking more
            device, classes = self.anchors[0].device, self.anchors[1].classes
            self._memory = tuple(torch.empty(one.num_blocks, units, classes, device=device) for one in self.anchors)
        return tuple(log_probs[:, :units] for log_probs in self._memory)


class ProbedSums(Gathered):
    """Sums of Θ, capacity and Γ for all pairs of blocks of two anchors.

    Args:
        distributions: of two anchors of m and n blocks.
        probes: of both.

    Attributes:
        cross, capacity, gamma: `(m, n)`, `(n - 1,)` and `(m, n - 1)`.
        units: tokens or images.
    """

    def __init__(self, distributions: Distributions, probes: Sequence[Any]):
        self.distributions, self.probes = distributions, probes
        m, n = self.shape = distributions.anchors[0].num_blocks, distributions.anchors[1].num_blocks
        self.cross, self.capacity, self.gamma = RatioSums((m, n)), RatioSums((n - 1,)), RatioSums((m, n - 1))
        self.units = 0

    def update(self, states: Sequence[list[Any]], batch: Any) -> None:
        (m, n), count = self.shape, len(batch)
        cross, capacity, units = (torch.zeros(count, *shape, dtype=torch.float64) for shape in ((m, n), (n - 1,), ()))
        for log_p, log_q, items in self.distributions.of(states, batch, self.probes):
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
                f"got no {self.distributions.anchors[1].unit} to score on; expected batches of some. Check the "
                "attention masks, and that an iterator was not used up before"
            )

    def _add(self, cross: np.ndarray, capacity: np.ndarray, units: np.ndarray) -> None:
        self.units += int(units.sum())
        self.cross.update(cross, units[:, None, None])
        self.capacity.update(capacity, units[:, None])
        self.gamma.update(cross[:, :, :-1], capacity[:, None, :])
