"""Kullback-Leibler divergences between the probes' distributions (KLAS, Eq. 1), in nats.

The divergences of all pairs of m source and n target distributions need one matrix product, because
KL(p_i ‖ q_j) = E_{p_i}[log p_i] − E_{p_i}[log q_j] and the second term is the (i, j) entry of P log(Q)ᵀ.
"""

import torch
from torch import Tensor

# Classes at a time, at most. Their fp32 sums are added up in float64: one fp32 sum over 128,256 classes is wrong by
# 5e-5 nats per token, sums over 4,096 by 1e-6.
SLICE = 4096
# Probabilities at a time on a CPU, 1 MB: what fits its cache takes a fifth of the time of what has to be paged in.
CACHED = 1 << 18


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P ‖ Q) in nats, from log-probabilities `(..., classes)`, fp32 or better; returns `(...)`."""
    _check_precision(log_p, log_q)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def pairwise_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P_i ‖ Q_j) of every pair (i, j) at every token: the terms of KLAS Eq. 1.

    Args:
        log_p: `(m, tokens, classes)` log-probabilities of the source probes, fp32 or better.
        log_q: `(n, tokens, classes)` log-probabilities of the target probes.

    Returns:
        `(tokens, m, n)` nats, float64; 0 where rounding would make them negative.
    """
    _check_precision(log_p, log_q)
    kl = log_p.new_zeros(log_p.shape[1], len(log_p), len(log_q), dtype=torch.float64)
    step = _step(log_p)
    for some_p, some_q in zip(log_p.split(step, -1), log_q.split(step, -1), strict=True):
        p = some_p.exp()
        negative_entropy = torch.linalg.vecdot(p, some_p).T
        # One small product per token, of strided views: nothing is copied.
        kl += negative_entropy[:, :, None] - p.transpose(0, 1) @ some_q.permute(1, 2, 0)
    return kl.clamp_min_(0)


def consecutive_kl(log_q: Tensor) -> Tensor:
    """KL(Q_j ‖ Q_{j+1}) at every token, the terms of the capacity of target block j + 1 (KLAS Eq. 2, denominator).

    Args:
        log_q: `(n, tokens, classes)` log-probabilities, fp32 or better.

    Returns:
        `(tokens, n - 1)` nats, float64; 0 where rounding would make them negative.
    """
    _check_precision(log_q)
    kl = log_q.new_zeros(len(log_q) - 1, log_q.shape[1], dtype=torch.float64)
    for some in log_q.split(_step(log_q), -1):
        kl += torch.linalg.vecdot(some[:-1].exp(), some[:-1] - some[1:])
    return kl.clamp_min_(0).T


def _step(log_probabilities: Tensor) -> int:
    """Number of classes to take at a time from `(blocks, tokens, classes)`."""
    blocks, tokens, _ = log_probabilities.shape
    if log_probabilities.device.type != "cpu":
        return SLICE
    return min(SLICE, max(256, CACHED // (blocks * tokens)))


def _check_precision(*log_probabilities: Tensor) -> None:
    for log_probability in log_probabilities:
        if log_probability.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"got log-probabilities in {log_probability.dtype}; expected float32 or float64, because half "
                "precision changes which stitch is best. Convert the logits with .float() before log_softmax"
            )
