"""Divergences against torch.distributions, F.kl_div and float64 loops."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions import kl_divergence as reference_kl

from klas_hf.maths import divergences
from klas_hf.maths.divergences import (
    consecutive_kl,
    kl_divergence,
    kl_to_logits,
    label_log_probabilities,
    log_softmax,
    pairwise_ce,
    pairwise_kl,
    pairwise_mse,
)

seeds = st.integers(0, 2**31)


def log_probabilities(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1).to(dtype)


def naive(log_p: Tensor, log_q: Tensor) -> float:
    """KL of two vectors, term by term."""
    terms = zip(log_p.double().tolist(), log_q.double().tolist(), strict=True)
    return math.fsum(math.exp(a) * (a - b) for a, b in terms)


def test_kl_divergence_is_that_of_torch_in_the_direction_of_its_name() -> None:
    log_p, log_q = log_probabilities(3, 5, 11, seed=1), log_probabilities(3, 5, 11, seed=2)
    got = kl_divergence(log_p, log_q)
    torch.testing.assert_close(got, reference_kl(Categorical(logits=log_p), Categorical(logits=log_q)))
    torch.testing.assert_close(got, F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
    assert not torch.allclose(got, kl_divergence(log_q, log_p))


@pytest.mark.parametrize("units", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cached", [4, 3 * 4 * 5003, 1 << 20])  # one unit at a time, three, all
def test_a_few_units_at_a_time_are_softened_as_all_at_once(
    units: int, dtype: torch.dtype, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergences, "CACHED_BYTES", cached)
    generator = torch.Generator().manual_seed(units)
    reference, logits = (8 * torch.randn(2, units, 5003, generator=generator)).to(dtype)
    labels, kept = torch.randint(5003, (units,), generator=generator), logits.clone()
    p, q = (Categorical(logits=one.double() / 4) for one in (reference, logits))
    log_p = log_softmax(reference, 4.0)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.double(), p.logits, rtol=0, atol=5e-6)
    torch.testing.assert_close(kl_to_logits(log_p, logits, 4.0).double(), reference_kl(p, q), rtol=0, atol=5e-6)
    picked = Categorical(logits=logits.double()).log_prob(labels)
    torch.testing.assert_close(label_log_probabilities(logits, labels).double(), picked, rtol=0, atol=1e-5)
    assert torch.equal(logits, kept)


def test_a_small_divergence_is_exact_at_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = 8 * torch.randn(4, 128_256, generator=generator)
    logits = reference + 0.1 * torch.randn(4, 128_256, generator=generator)  # some 3e-4 nats
    p, q = (Categorical(logits=one.double() / 4) for one in (reference, logits))
    got = kl_to_logits(log_softmax(reference, 4.0), logits, 4.0).double()
    torch.testing.assert_close(got, reference_kl(p, q), rtol=0, atol=4e-6)
    assert kl_to_logits(log_softmax(reference, 4.0), reference, 4.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slice_size", [4, 4096])
def test_pairwise_is_a_loop_over_pairs_and_tokens(
    dtype: torch.dtype, slice_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergences, "SLICE", slice_size)
    log_p, log_q = log_probabilities(3, 4, 13, seed=1, dtype=dtype), log_probabilities(2, 4, 13, seed=2, dtype=dtype)
    got = pairwise_kl(log_p, log_q)
    assert got.shape == (4, 3, 2)
    for t in range(4):
        for i in range(3):
            for j in range(2):
                assert float(got[t, i, j]) == pytest.approx(naive(log_p[i, t], log_q[j, t]), rel=1e-5)


@pytest.mark.parametrize("slice_size", [4, 4096])
def test_consecutive_is_a_loop_over_neighbours(slice_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergences, "SLICE", slice_size)
    log_q = log_probabilities(4, 3, 13)
    got = consecutive_kl(log_q)
    assert got.shape == (3, 3)
    for t in range(3):
        for j in range(3):
            assert float(got[t, j]) == pytest.approx(naive(log_q[j, t], log_q[j + 1, t]), rel=1e-5)


def test_one_target_block_has_no_capacity() -> None:
    assert consecutive_kl(log_probabilities(1, 3, 5)).shape == (3, 0)


def test_parts_of_a_longer_chunk_give_the_same() -> None:
    log_p, log_q = log_probabilities(2, 9, 20, seed=1), log_probabilities(3, 9, 20, seed=2)
    torch.testing.assert_close(pairwise_kl(log_p[:, 2:5], log_q[:, 2:5]), pairwise_kl(log_p, log_q)[2:5])


def test_a_large_vocabulary_costs_no_precision() -> None:
    """One fp32 sum over all classes and tokens is wrong by 3e-3 of itself here."""
    log_p, log_q = log_probabilities(1, 3, 128_256, seed=1), log_probabilities(2, 3, 128_256, seed=2)
    log_q[1] = log_p[0]
    exact = (log_p.double().exp() * (log_p.double() - log_q.double())).sum(-1)
    torch.testing.assert_close(pairwise_kl(log_p, log_q)[:, 0].T, exact, rtol=0, atol=5e-6)


@given(seeds, st.floats(0.01, 30))
@settings(max_examples=40, deadline=None)
def test_never_negative_and_zero_only_on_itself(seed: int, scale: float) -> None:
    log_p = log_probabilities(2, 3, 9, seed=seed, scale=scale)
    log_q = log_probabilities(2, 3, 9, seed=seed + 1, scale=scale)
    assert (pairwise_kl(log_p, log_q) >= 0).all()
    assert (consecutive_kl(log_p) >= 0).all()
    assert pairwise_kl(log_p, log_p).diagonal(dim1=1, dim2=2).max() < 1e-5
    assert consecutive_kl(log_p[:1].expand(3, -1, -1)).max() == 0
    assert kl_divergence(log_p, log_p).abs().max() == 0
    exact = kl_divergence(log_p.double(), log_q.double())
    assert (exact > 0).all()
    torch.testing.assert_close(pairwise_kl(log_p, log_q).diagonal(dim1=1, dim2=2).T, exact, rtol=1e-4, atol=1e-5)


def test_rounding_makes_nothing_negative() -> None:
    """Distributions that differ by less than fp32 can tell: half of all sums would fall below 0."""
    log_p = log_probabilities(1, 64, 3000)
    same = (log_p + torch.randn(8, 64, 1) * 1e-6).log_softmax(-1)
    for got in (pairwise_kl(log_p, same), consecutive_kl(same)):
        assert (got >= 0).all() and (got == 0).any() and got.max() < 1e-5


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_merging_classes_never_raises_the_divergence(seed: int) -> None:
    """The data-processing inequality: what a coarser view tells apart, the finer one does."""
    log_p = log_probabilities(1, 1, 8, seed=seed, dtype=torch.float64)
    log_q = log_probabilities(1, 1, 8, seed=seed + 1, dtype=torch.float64)
    merged = (x.unflatten(-1, (4, 2)).logsumexp(-1) for x in (log_p, log_q))
    assert pairwise_kl(*merged).item() <= pairwise_kl(log_p, log_q).item() + 1e-12


def test_nan_is_kept_for_the_caller_to_see() -> None:
    logits = torch.randn(3, 5)
    logits[1, 2] = torch.nan
    assert kl_to_logits(log_probabilities(3, 5), logits).isnan().tolist() == [False, True, False]
    log_p = log_probabilities(2, 3, 5)
    log_p[0, 1, 2] = torch.nan
    assert pairwise_kl(log_p, log_p).isnan().nonzero()[:, 0].unique().tolist() == [1]
    assert consecutive_kl(log_p).isnan().nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends",
        *(pytest.param(f"torch.backends.{one}.matmul", marks=pytest.mark.slow) for one in ("cuda", "mkldnn")),
    ],
)
def test_products_are_exact_whichever_way_tf32_was_allowed(setting: str) -> None:
    """In a process of its own: PyTorch forgets no setting of the new kind, and then refuses the old questions."""
    script = f"""
import torch
from klas_hf.maths import divergences
log_p = torch.randn(2, 3, 50).log_softmax(-1)
exact = divergences.pairwise_kl(log_p, log_p)
{setting}.fp32_precision = "tf32"
with divergences._exact_products():
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
assert torch.equal(divergences.pairwise_kl(log_p, log_p), exact)
assert {setting}.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_older_setting_for_tf32_comes_back_too() -> None:
    for precision in ("high", "medium", "highest"):
        torch.set_float32_matmul_precision(precision)
        pairwise_kl(log_probabilities(1, 2, 5), log_probabilities(1, 2, 5))
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    good = log_probabilities(2, 3, 5)
    bad = good.to(dtype)
    for call in (
        lambda: pairwise_kl(good, bad),
        lambda: pairwise_kl(bad, good),
        lambda: consecutive_kl(bad),
        lambda: kl_divergence(bad, bad),
        lambda: kl_to_logits(bad[0], good[0]),
        lambda: pairwise_mse(good, bad),
        lambda: pairwise_ce(bad, good),
    ):
        with pytest.raises(TypeError, match=f"got log-probabilities in {dtype}.*expected float32 or float64"):
            call()


@pytest.mark.parametrize("classes", [2, 10, 5000])  # 5000: more than one slice
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_and_cross_entropies_of_all_pairs_are_those_of_a_loop(classes: int, dtype: torch.dtype) -> None:
    log_p, log_q = (
        log_probabilities(3, 4, classes, seed=0, dtype=dtype),
        log_probabilities(2, 4, classes, seed=1, dtype=dtype),
    )
    mse, ce = pairwise_mse(log_p, log_q), pairwise_ce(log_p, log_q)
    assert mse.shape == ce.shape == (4, 3, 2) and mse.dtype == ce.dtype == torch.float64
    for t in range(4):
        for i in range(3):
            for j in range(2):
                p, log_qj = log_p[i, t].double().exp(), log_q[j, t].double()
                expected = torch.nn.functional.mse_loss(p, log_qj.exp())
                assert float(mse[t, i, j]) == pytest.approx(float(expected), rel=1e-9)
                entropy = torch.nn.functional.cross_entropy(log_qj[None], p[None])
                assert float(ce[t, i, j]) == pytest.approx(float(entropy), rel=1e-6)


def test_close_distributions_keep_their_small_error() -> None:
    log_p = log_probabilities(1, 3, 8, seed=0, dtype=torch.float64)
    log_q = (log_p + 1e-5 * log_probabilities(1, 3, 8, seed=1, dtype=torch.float64)).log_softmax(-1)
    expected = (log_p.exp() - log_q.exp()).square().mean(-1)[0]
    torch.testing.assert_close(pairwise_mse(log_p, log_q)[:, 0, 0], expected, rtol=1e-3, atol=0)
    many = log_probabilities(1, 400, 300, seed=2)
    assert 0 <= pairwise_mse(many, many).min() <= pairwise_mse(many, many).max() < 1e-16
