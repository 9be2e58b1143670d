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
# Bytes of logits that are turned into distributions at a time, in scratch memory too: in a CPU's cache that takes a
# sixth of the time of whole arrays. An accelerator would start a kernel for every few.
CACHED_BYTES, ACCELERATED_BYTES = 1 << 20, 1 << 26


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P ‖ Q) in nats, from log-probabilities `(..., classes)`, fp32 or better; returns `(...)`."""
    _check_precision(log_p, log_q)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_to_logits(log_p: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(P ‖ softmax(logits / temperature)) in nats, without an array of its own for all units.

    Args:
        log_p: `(units, classes)` log-probabilities, fp32.
        logits: `(units, classes)` in any dtype, taken to fp32.

    Returns:
        `(units,)` in fp32.
    """
    _check_precision(log_p)
    kl = log_p.new_empty(len(log_p))
    for units, softened, scratch in _few_softened(logits, temperature):
        some_p = log_p[units]
        torch.sub(some_p, torch.log_softmax(softened, -1, out=scratch), out=scratch)
        torch.sum(torch.exp(some_p, out=softened).mul_(scratch), -1, out=kl[units])
    return kl


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `(units, classes)` of softmax(logits / temperature), in fp32 whatever the logits' dtype is."""
    found = torch.empty_like(logits, dtype=torch.float32)
    for units, softened, _ in _few_softened(logits, temperature):
        torch.log_softmax(softened, -1, out=found[units])
    return found


def label_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of `labels`: (units,), from logits `(units, classes)`; returns `(units,)` in fp32."""
    found = torch.empty(len(logits), device=logits.device)
    for units, softened, scratch in _few_softened(logits, 1.0):
        found[units] = torch.log_softmax(softened, -1, out=scratch).gather(-1, labels[units, None])[:, 0]
    return found


def _few_softened(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few units at a time: which, their logits / temperature in fp32, and scratch memory as large, both used anew."""
    allowed = CACHED_BYTES if logits.device.type == "cpu" else ACCELERATED_BYTES
    count = max(1, min(len(logits), allowed // (4 * logits.shape[-1])))
    softened, scratch = logits.new_empty(2, count, logits.shape[-1], dtype=torch.float32)
    for start in range(0, len(logits), count):
        units = slice(start, min(start + count, len(logits)))
        size = units.stop - start
        softened[:size].copy_(logits[units]).div_(temperature)
        yield units, softened[:size], scratch[:size]


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
