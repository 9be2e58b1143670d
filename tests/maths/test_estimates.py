"""Ratios of sums over sequences and their standard errors, against formulas written out and resampling."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from klas_hf.maths.estimates import RatioSums, normal_interval

Array = NDArray[np.float64]


def sequences(count: int, seed: int = 0) -> tuple[Array, Array]:
    """Numerators `(count, 2, 3)` and lengths `(count, 1, 1)` of sequences of unequal length."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 40, size=(count, 1, 1)).astype(float)
    return lengths * generator.gamma(4.0, 0.3, size=(count, 2, 3)) + generator.normal(size=(count, 2, 3)), lengths


def filled(numerator: Array, denominator: Array, split: int | None = None) -> RatioSums:
    sums = RatioSums(numerator.shape[1:])
    for start in range(0, len(numerator), split or len(numerator)):
        part = slice(start, start + (split or len(numerator)))
        sums.update(numerator[part], denominator[part])
    return sums


def naive_error(a: list[float], b: list[float]) -> float:
    """Delta method for a ratio of sums over clusters (Cochran, Sampling Techniques, 1977, eq. 6.13)."""
    n, ratio = len(a), sum(a) / sum(b)
    residuals = [x - ratio * y for x, y in zip(a, b, strict=True)]
    return math.sqrt(n / (n - 1) * sum(r * r for r in residuals)) / sum(b)


def test_value_and_error_are_those_of_the_written_out_formula() -> None:
    a, b = sequences(17)
    sums = filled(a, b)
    for index in np.ndindex(2, 3):
        column, lengths = a[(slice(None), *index)].tolist(), b.ravel().tolist()
        assert sums.value[index] == pytest.approx(sum(column) / sum(lengths), rel=1e-12)
        assert sums.standard_error[index] == pytest.approx(naive_error(column, lengths), rel=1e-9)


def test_error_agrees_with_bootstrap_and_jackknife() -> None:
    a, b = sequences(300)
    x, y = a[:, 0, 0], b.ravel()
    got = filled(a, b).standard_error[0, 0]

    def ratio(x: Array, y: Array, axis: int = -1) -> Array:
        return x.sum(axis) / y.sum(axis)

    resampled = stats.bootstrap((x, y), ratio, paired=True, n_resamples=2000, rng=np.random.default_rng(0))
    assert got == pytest.approx(resampled.standard_error, rel=0.1)
    left_out = (x.sum() - x) / (y.sum() - y)
    jackknife = math.sqrt(299 / 300 * ((left_out - left_out.mean()) ** 2).sum())
    assert got == pytest.approx(jackknife, rel=0.02)


@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_any_split_into_batches_gives_the_same(count: int, split: int, seed: int) -> None:
    a, b = sequences(count, seed)
    whole, parts = filled(a, b), filled(a, b, split)
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-12)
    np.testing.assert_allclose(parts.standard_error, whole.standard_error, rtol=1e-6, atol=1e-9)


def test_moments_of_several_processes_add_up() -> None:
    a, b = sequences(12)
    whole, together = filled(a, b), RatioSums((2, 3))
    together.set_moments(filled(a[:5], b[:5]).moments() + filled(a[5:], b[5:]).moments())
    assert together.sequences == 12
    np.testing.assert_allclose(together.value, whole.value, rtol=1e-12)
    np.testing.assert_allclose(together.standard_error, whole.standard_error, rtol=1e-9)


def test_set_moments_keeps_no_tie_to_its_argument() -> None:
    a, b = sequences(4)
    sums, moments = filled(a, b), filled(a, b).moments()
    before = sums.value
    sums.set_moments(moments)
    moments[:] = 0
    np.testing.assert_allclose(sums.value, before)


def test_a_ratio_without_noise_has_no_error() -> None:
    lengths = np.arange(1.0, 9.0)[:, None]
    sums = filled(0.3 * lengths, lengths)
    assert sums.value[0] == pytest.approx(0.3)
    assert 0 <= sums.standard_error[0] < 1e-8


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_sequences_have_no_error(count: int) -> None:
    a, b = sequences(count)
    sums = filled(a, b) if count else RatioSums((2, 3))
    assert np.isnan(sums.standard_error).all() and sums.standard_error.shape == (2, 3)
    assert np.isnan(sums.value).all() == (count == 0)


def test_a_zero_denominator_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    sums = filled(np.array([[1.0, 0.0]] * 3), np.zeros((3, 2)))
    assert np.isinf(sums.value[0]) and np.isnan(sums.value[1])
    assert np.isnan(sums.standard_error).all()
    assert not recwarn.list


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """1,000 experiments of 60 sequences whose tokens depend on each other; 95 ± 2.5 % of intervals hold the truth."""
    generator = np.random.default_rng(0)
    experiments, count = 1_000, 60
    lengths = generator.integers(5, 30, size=(count, experiments)).astype(float)
    per_sequence = generator.gamma(4.0, 0.25, size=(count, experiments))  # mean 1, shared by a sequence's tokens
    sums = filled(lengths * per_sequence, lengths)
    low, high = normal_interval(sums.value, sums.standard_error, 0.95)
    assert abs(np.mean((low <= 1) & (high >= 1)) - 0.95) < 0.025
    # Tokens taken for independent would promise far too much: the test can tell.
    token_error = np.sqrt(per_sequence.var() / lengths.sum(0))
    assert np.mean(np.abs(sums.value - 1) < 1.96 * token_error) < 0.8


def test_normal_interval_is_scipys() -> None:
    value, error = np.array([1.0, -2.0]), np.array([0.5, 2.0])
    for confidence in (0.5, 0.95, 0.99):
        expected = stats.norm.interval(confidence, loc=value, scale=error)
        np.testing.assert_allclose(normal_interval(value, error, confidence), expected, rtol=1e-12)


@pytest.mark.parametrize("confidence", [0, 1, 95, float("nan")])
def test_a_confidence_that_is_no_share_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        normal_interval(np.ones(1), np.ones(1), confidence)


def test_a_single_ratio_has_no_shape() -> None:
    numerator, lengths = sequences(6)
    sums = filled(numerator[:, 0, 0], lengths[:, 0, 0], split=4)
    assert sums.value == pytest.approx(numerator[:, 0, 0].sum() / lengths.sum())
    assert sums.standard_error == pytest.approx(filled(numerator, lengths).standard_error[0, 0])
    one = RatioSums(())
    one.add_at((), numerator[:, 0, 0], lengths[:, 0, 0])
    assert one.value == sums.value
