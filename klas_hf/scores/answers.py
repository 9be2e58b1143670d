"""How far networks' answers are from a reference's, in memory that grows with neither the batch nor the vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from klas_hf.anchors.anchor import Anchor
from klas_hf.maths.divergences import kl_divergence

WORKSPACE_BYTES = 1 << 29
ALIVE = 6  # arrays (units, classes) in fp32 at once: two logits and their logarithms, and what KL makes of them


class Reference:
    """What a reference answers on one batch.

    Args:
        anchor, state: the reference, and its last state on the batch.
        batch: that both have read.
        temperature: that softens all distributions.
        workspace_bytes: memory for distributions, which are formed for so many units at a time.
    """

    def __init__(self, anchor: Anchor, state: Any, batch: Any, temperature: float, workspace_bytes: int):
        self.anchor, self.state, self.batch, self.temperature = anchor, state, batch, temperature
        self.units = len(batch.unit_items)
        self.chunk = max(1, workspace_bytes // (4 * ALIVE * anchor.classes))
        self._whole = self._log_p(slice(None)) if self.units <= self.chunk else None

    def compare(
        self, others: Sequence[tuple[Anchor, Any]], labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """KL(reference ‖ other) and log-probabilities of labels, each `(others, units)` in nats, on the CPU.

        Args:
            others: whose heads answer, and their last states on the batch. Where the distributions of a batch are
                formed in parts, the reference's are formed anew for each call: few calls cost less.
            labels: `(units,)`; those below 0 are taken for 0. None: no log-probabilities.
        """
        terms = torch.empty(len(others), self.units)
        picked = None if labels is None else torch.empty(len(others), self.units)
        for start in range(0, self.units, self.chunk):
            units = slice(start, start + self.chunk)
            log_p = self._log_p(units) if self._whole is None else self._whole
            for place, (anchor, state) in enumerate(others):
                logits = anchor.answers(state, self.batch, units).float().to(log_p.device)
                terms[place, units] = kl_divergence(log_p, self._softened(logits)).cpu()
                if labels is not None and picked is not None:
                    classes = labels[units].clamp_min(0).to(logits.device)
                    picked[place, units] = logits.log_softmax(-1).gather(-1, classes[:, None])[:, 0].cpu()
        return terms, picked

    def _log_p(self, units: slice) -> Tensor:
        return self._softened(self.anchor.answers(self.state, self.batch, units).float())

    def _softened(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).log_softmax(-1)
