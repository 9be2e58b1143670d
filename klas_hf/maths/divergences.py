"""Kullback-Leibler divergences between the probes' distributions (KLAS, Eq. 1), in nats.

The divergences of all pairs of m source and n target distributions need one matrix product, because
KL(p_i ‖ q_j) = E_{p_i}[log p_i] − E_{p_i}[log q_j] and the second term is the (i, j) entry of P log(Q)ᵀ.

MSE and CE, which KLAS is compared with (Tab. 1 and 2), act on the same distributions, since features of two anchors
differ in width: the paper's formulas are lost, and this is our reading.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Classes at a time. Their fp32 sums are added up in float64: one fp32 sum over 128,256 classes is wrong by 5e-5 nats
# per token, sums over 4,096 by 1e-6. All slices use the same scratch memory: new memory costs a CPU more than the sums.
SLICE = 4096


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P ‖ Q) in nats, from log-probabilities `(..., classes)`, fp32 or better; returns `(...)`."""
    _check_precision(log_p, log_q)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 − TV(P, Q) = Σ min(p, q): how likely a target P takes what a draft Q has sampled (Leviathan et al., Cor. 3.6).

    Args:
        log_p, log_q: `(..., classes)` log-probabilities, fp32 or better.

    Returns:
        `(...)` probabilities.
    """
    _check_precision(log_p, log_q)
    return torch.minimum(log_p, log_q).exp().sum(-1).clamp_max(1)


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
    scratch = torch.empty_like(log_p[..., :SLICE])
    with _exact_products():
        for some_p, some_q in zip(log_p.split(SLICE, -1), log_q.split(SLICE, -1), strict=True):
            p = torch.exp(some_p, out=scratch[..., : some_p.shape[-1]])
            # One small product per token, of strided views: nothing is copied.
            kl -= p.transpose(0, 1) @ some_q.permute(1, 2, 0)
            kl += p.mul_(some_p).sum(-1).T[:, :, None]
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
    scratch = [torch.empty_like(log_q[:-1, :, :SLICE]) for _ in range(2)]
    for some in log_q.split(SLICE, -1):
        q, difference = (one[..., : some.shape[-1]] for one in scratch)
        torch.exp(some[:-1], out=q)
        torch.sub(some[:-1], some[1:], out=difference)
        kl += difference.mul_(q).sum(-1)
    return kl.clamp_min_(0).T


def pairwise_mse(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean over classes of (p_i − q_j)² for every pair (i, j) at every token or image.

    Args:
        log_p: `(m, tokens, classes)` log-probabilities of the source probes, fp32 or better.
        log_q: `(n, tokens, classes)` log-probabilities of the target probes.

    Returns:
        `(tokens, m, n)`, float64; 0 where rounding would make it negative.
    """
    _check_precision(log_p, log_q)
    sums = log_p.new_zeros(log_p.shape[1], len(log_p), len(log_q), dtype=torch.float64)
    for some_p, some_q in zip(log_p.split(SLICE, -1), log_q.split(SLICE, -1), strict=True):
        # In float64: the square's terms cancel where two distributions are close.
        p, q = some_p.double().exp(), some_q.double().exp()
        sums -= 2 * p.transpose(0, 1) @ q.permute(1, 2, 0)
        sums += p.square().sum(-1).T[:, :, None] + q.square().sum(-1).T[:, None, :]
    return sums.clamp_min_(0) / log_p.shape[-1]


def pairwise_ce(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Cross-entropy −Σ p_i log q_j in nats of every pair (i, j) at every token or image; shapes as `pairwise_mse`."""
    _check_precision(log_p, log_q)
    sums = log_p.new_zeros(log_p.shape[1], len(log_p), len(log_q), dtype=torch.float64)
    for some_p, some_q in zip(log_p.split(SLICE, -1), log_q.split(SLICE, -1), strict=True):
        sums -= some_p.double().exp().transpose(0, 1) @ some_q.double().permute(1, 2, 0)
    return sums


@contextmanager
def _exact_products() -> Iterator[None]:
    """No TF32 in fp32 products, whatever the user has allowed: it would change which stitch is best."""
    # Not torch.get_float32_matmul_precision, which raises once a user has set these.
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


def _check_precision(*log_probabilities: Tensor) -> None:
    for log_probability in log_probabilities:
        if log_probability.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"got log-probabilities in {log_probability.dtype}; expected float32 or float64, because half "
                "precision changes which stitch is best. Convert the logits with .float() before log_softmax"
            )
