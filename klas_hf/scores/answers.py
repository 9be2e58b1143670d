"""How far networks' answers are from a reference's, in memory that grows with neither the batch nor the vocabulary."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from klas_hf.anchors.anchor import Anchor
from klas_hf.maths.divergences import kl_to_logits, label_log_probabilities, log_softmax

WORKSPACE_BYTES = 1 << 29
ALIVE = 3  # arrays (units, classes) in fp32 at once: a network's logits, twice where it scales them, the reference's


class Reference:
    """What a reference answers on one batch.

    Args:
        anchor, state: the reference, and its last state on the batch.
        batch: that both have read.
        temperature: that softens all distributions.
        workspace_bytes: memory for distributions, which are formed for so many units at a time.
        classes: that distributions are over; None: all.
    """

    def __init__(
        self, anchor: Anchor, state: Any, batch: Any, temperature: float, workspace_bytes: int,
        classes: Sequence[int] | None = None,
    ):  # fmt: skip
        self.classes = slice(None) if classes is None else list(classes)
        self.anchor, self.state, self.batch, self.temperature = anchor, state, batch, temperature
        self.units = len(batch.unit_items)
        of_all = 4 * anchor.classes * self.units
        kept = of_all <= workspace_bytes // 2
        left, alive = (workspace_bytes - of_all, ALIVE - 1) if kept else (workspace_bytes, ALIVE)
        self.chunk = max(1, left // (4 * alive * anchor.classes))
        self._whole = self._log_p_of_all() if kept else None

    def compare(
        self, others: Sequence[tuple[Anchor, Any]], labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """KL(reference ‖ other) and log-probabilities of labels, each `(others, units)` in nats, on the CPU.

        Args:
            others: whose heads answer, and their last states on the batch. Where those of the reference for
                the whole batch take more than half the memory, they are formed anew for each call: few cost less.
            labels: `(units,)`; those below 0 are taken for 0. None: no log-probabilities.
        """
        terms = torch.empty(len(others), self.units)
        picked = None if labels is None else torch.empty(len(others), self.units)
        for units in self._chunks():
            log_p = self._log_p(units) if self._whole is None else self._whole[units]
            for place, (anchor, state) in enumerate(others):
                logits = anchor.answers(state, self.batch, units).to(log_p.device)
                terms[place, units] = kl_to_logits(log_p, logits[:, self.classes], self.temperature).cpu()
                if labels is not None and picked is not None:
                    classes = labels[units].clamp_min(0).to(logits.device)
                    picked[place, units] = label_log_probabilities(logits, classes).cpu()
        return terms, picked

    def _chunks(self) -> Iterator[slice]:
        return (slice(start, start + self.chunk) for start in range(0, self.units, self.chunk))

    def _log_p(self, units: slice) -> Tensor:
        return log_softmax(self.anchor.answers(self.state, self.batch, units)[:, self.classes], self.temperature)

    def _log_p_of_all(self) -> Tensor | None:
        whole = None
        for units in self._chunks():
            log_p = self._log_p(units)
            if whole is None:
                whole = log_p.new_empty(self.units, log_p.shape[-1])
            whole[units] = log_p
        return whole
