"""Scores of all stitches between two anchors in one streaming pass (KLAS Alg. 2, Eq. 1 and 2).

Both anchors run once over each batch. Every probe's distribution is formed for a few tokens at a time, all pairs
of divergences come from one matrix product, and only sums per sequence are kept: memory depends on neither the
number of tokens nor, beyond the workspace, on the vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klas_hf.anchors.batches import TokenBatch, token_batches
from klas_hf.anchors.language import LanguageAnchor, load_anchor
from klas_hf.anchors.vocabularies import check_vocabularies
from klas_hf.costs import measure_stitch_costs
from klas_hf.maths.divergences import SLICE, consecutive_kl, pairwise_kl
from klas_hf.maths.estimates import RatioSums
from klas_hf.probes import ProbeNet, fit_probes
from klas_hf.processes import progress, shared_out, sum_array_over_processes
from klas_hf.rows import library_versions
from klas_hf.scores.values import StitchScores, check_score

WORKSPACE_BYTES = 1 << 29


def score_decoders(
    source: Any,
    target: Any,
    data: Iterable[Any],
    *,
    probes: tuple[ProbeNet, ProbeNet] | None = None,
    score: str = "klas",
    tokens: int = 128,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> StitchScores:
    """Score every stitch between two causal language models; see `score_stitches`."""
    check_score(score)
    first, last = load_anchor(source), load_anchor(target)
    check_vocabularies(first.path, first.config, last.path, last.config)
    costs = measure_stitch_costs(first.config, last.config, tokens=tokens)
    costs.check_direction()
    batches = token_batches(data)
    if probes is None:
        every = list(batches)
        half = len(every) // 2
        if not half:
            raise ValueError(
                f"got {len(every)} batches; expected at least two, one to fit probes and one to score on. Pass smaller "
                "batches, or probes=(…, …) trained on other data"
            )
        probes = fit_probes(first, every[:half]), fit_probes(last, every[:half])
        batches = iter(every[half:])
    for probe, anchor in zip(probes, (first, last), strict=True):
        probe.check(anchor)
    sums = _PairSums(first, last, probes, workspace_bytes)
    for batch in progress(shared_out(batches), "scoring stitches"):
        sums.update(batch)
    sums.combine()
    return StitchScores(
        score=score,
        cross=sums.cross.value,
        capacity=sums.capacity.value,
        cross_error=sums.cross.standard_error,
        capacity_error=sums.capacity.standard_error,
        gamma_error=sums.gamma.standard_error,
        sequences=sums.cross.sequences,
        tokens=sums.tokens,
        costs=costs,
        provenance=_provenance(first, last, probes),
    )


class _PairSums:
    """Sums of Θ, capacity and Γ for all pairs of blocks of two anchors."""

    def __init__(
        self, first: LanguageAnchor, last: LanguageAnchor, probes: tuple[ProbeNet, ProbeNet], workspace_bytes: int
    ):
        self.first, self.last, self.probes = first, last, probes
        m, n = first.num_blocks, last.num_blocks
        self.cross, self.capacity, self.gamma = RatioSums((m, n)), RatioSums((n - 1,)), RatioSums((m, n - 1))
        self.tokens = 0
        self.vocabulary = last.config.vocab_size
        # Alive at once: log-probabilities of both, and the logits of one or two slices for the divergences.
        either = (max(m, n) + 1) * max(self.vocabulary, 2 * min(SLICE, self.vocabulary))
        self.chunk = max(1, workspace_bytes // (4 * (self.vocabulary * (m + n) + either)))
        self._log_probs: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def update(self, batch: TokenBatch) -> None:
        """Add the sequences of a batch."""
        counted = batch.counted(self.last.config.bos_token_id).cpu()
        first, last = self._hidden(self.first, batch, counted), self._hidden(self.last, batch, counted)
        sequence = counted.nonzero()[:, 0]
        cross = torch.zeros(len(counted), first.shape[0], last.shape[0], dtype=torch.float64)
        capacity = torch.zeros(len(counted), last.shape[0] - 1, dtype=torch.float64)
        for start in range(0, len(sequence), self.chunk):
            part = slice(start, start + self.chunk)
            # A chunk may hold the end of one sequence and the start of others.
            for sums, terms in zip((cross, capacity), self._divergences(first[:, part], last[:, part]), strict=True):
                sums.index_add_(0, sequence[part], terms.cpu())
        if not (cross.isfinite().all() and capacity.isfinite().all()):
            raise ValueError(
                "got probe distributions with NaN or infinite divergences; expected finite activations. Load the "
                "anchors in bfloat16 or float32 and check their weights and probes"
            )
        self._add(cross.numpy(), capacity.numpy(), counted.sum(1).numpy())

    def combine(self) -> None:
        """Make these the sums over all processes.

        Raises:
            ValueError: no process has seen a token.
        """
        for sums in (self.cross, self.capacity, self.gamma):
            sums.set_moments(sum_array_over_processes(sums.moments()))
        self.tokens = int(sum_array_over_processes(np.array([float(self.tokens)]))[0])
        if not self.tokens:
            raise ValueError(
                "got no token to score that is neither padding nor BOS; expected text. Check the attention masks, and "
                "that an iterator was not used up before"
            )

    def _add(self, cross: np.ndarray, capacity: np.ndarray, tokens: np.ndarray) -> None:
        kept = tokens > 0
        cross, capacity, tokens = cross[kept], capacity[kept], tokens[kept]
        self.tokens += int(tokens.sum())
        self.cross.update(cross, tokens[:, None, None])
        self.capacity.update(capacity, tokens[:, None])
        self.gamma.update(cross[:, :, :-1], capacity[:, None, :])

    def _divergences(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Cross `(tokens, m, n)` and capacity `(tokens, n - 1)` terms of a few tokens."""
        log_p, log_q = self._workspace(first.shape[1])
        self.probes[0].log_probs(self.first, first, out=log_p)
        self.probes[1].log_probs(self.last, last, out=log_q)
        return pairwise_kl(log_p, log_q), consecutive_kl(log_q)

    def _workspace(self, tokens: int) -> tuple[Tensor, ...]:
        """Where the log-probabilities of so many tokens go, the same memory for every chunk."""
        if not self._log_probs or self._log_probs[0].shape[1] < tokens:
            self._log_probs = ()  # let go before taking more
            self._log_probs = tuple(
                torch.empty(anchor.num_blocks, tokens, self.vocabulary, device=self.first.device)
                for anchor in (self.first, self.last)
            )
        return tuple(log_probs[:, :tokens] for log_probs in self._log_probs)

    @staticmethod
    def _hidden(anchor: LanguageAnchor, batch: TokenBatch, counted: Tensor) -> Tensor:
        """`(blocks, counted tokens, width)`."""
        return torch.stack([h[counted.to(h.device)].to(anchor.device) for h in anchor.hidden_states(batch)])


def _provenance(first: LanguageAnchor, last: LanguageAnchor, probes: tuple[ProbeNet, ProbeNet]) -> dict[str, Any]:
    def one(anchor: LanguageAnchor, probe: ProbeNet) -> dict[str, Any]:
        return {
            "name": anchor.name,
            "revision": anchor.revision,
            "fingerprint": anchor.fingerprint,
            "probes": {"kind": probe.config.kind, "ridge": probe.config.ridge},
        }

    return {"source": one(first, probes[0]), "target": one(last, probes[1]), "versions": library_versions()}
