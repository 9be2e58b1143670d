"""Kullback-Leibler divergences between the probes' distributions (KLAS, Eq. 1), in nats.

The divergences of all pairs of m source and n target distributions need one matrix product, because
KL(p_i ‖ q_j) = E_{p_i}[log p_i] − E_{p_i}[log q_j] and the second term is the (i, j) entry of P log(Q)ᵀ.
"""

import torch
from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P ‖ Q) in nats, from log-probabilities `(..., classes)`; returns `(...)`."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def pairwise_kl_sums(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum over tokens of KL(P_i ‖ Q_j) for every pair (i, j): KLAS Eq. 1 before the mean.

    Args:
        log_p: `(m, tokens, classes)` log-probabilities of the source probes, fp32 or better.
        log_q: `(n, tokens, classes)` log-probabilities of the target probes.

    Returns:
        `(m, n)` nats.
    """
    _check_precision(log_p, log_q)
    p = log_p.exp()
    negative_entropy = torch.linalg.vecdot(p, log_p).sum(1)
    # Rows stay strided views where tokens are a slice of a longer chunk: no copy of the vocabulary is made.
    return negative_entropy[:, None] - p.flatten(1) @ log_q.flatten(1).T


def consecutive_kl_sums(log_q: Tensor) -> Tensor:
    """Sum over tokens of KL(Q_j ‖ Q_{j+1}), the capacity of target block j + 1 (KLAS Eq. 2, denominator).

    Args:
        log_q: `(n, tokens, classes)` log-probabilities.

    Returns:
        `(n - 1,)` nats.
    """
    _check_precision(log_q)
    sums = log_q.new_empty(len(log_q) - 1)
    for block in range(len(log_q) - 1):  # one block at a time: no second copy of all distributions
        q = log_q[block].exp()
        sums[block] = torch.linalg.vecdot(q, log_q[block] - log_q[block + 1]).sum()
    return sums


def _check_precision(*log_probabilities: Tensor) -> None:
    for log_probability in log_probabilities:
        if log_probability.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"got log-probabilities in {log_probability.dtype}; expected float32 or float64, because half "
                "precision changes which stitch is best. Convert the logits with .float() before log_softmax"
            )
