"""Streaming least squares against numpy and scikit-learn on all rows at once."""

import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from klas_hf.maths.least_squares import RIDGE, LeastSquares, LinearFit

WIDTHS = 5, 3


def rows(count: int, seed: int = 0, in_features: int = WIDTHS[0], offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Correlated features of very different scales, and a noisy linear image of them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(count, in_features) @ normal(in_features, in_features) * torch.logspace(-2, 2, in_features).double()
    y = x @ normal(in_features, WIDTHS[1]) + 0.5 * normal(count, WIDTHS[1]) + 3
    return x + offset, y - offset


def added(x: Tensor, y: Tensor, split: int | None = None, bias: bool = True) -> LeastSquares:
    equations = LeastSquares(x.shape[1], y.shape[1], bias=bias)
    for part in zip(x.split(split or len(x)), y.split(split or len(y)), strict=True):
        equations.update(*part)
    return equations


def predicted(fit: LinearFit, x: Tensor) -> Tensor:
    return x.double() @ fit.weight.T + fit.bias


def assert_same(one: LinearFit, other: LinearFit, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one.weight, other.weight, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one.bias, other.bias, rtol=tolerance, atol=tolerance)
    assert one.r2 == pytest.approx(other.r2, rel=tolerance, abs=tolerance)
    assert (one.ridge, one.rows) == (other.ridge, other.rows)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_plain_least_squares_is_numpys_and_sklearns(offset: float) -> None:
    x, y = rows(40, offset=offset)
    fit = added(x, y, split=7).solve()
    reference = LinearRegression().fit(x, y)
    np.testing.assert_allclose(fit.weight, reference.coef_, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(predicted(fit, x), reference.predict(x), rtol=1e-7)
    centred, *_ = np.linalg.lstsq(x - x.mean(0), y - y.mean(0))
    np.testing.assert_allclose(fit.weight.T, centred, rtol=1e-5, atol=1e-8)
    assert fit.r2 == pytest.approx(r2_score(y, reference.predict(x), multioutput="variance_weighted"), abs=1e-9)
    assert (fit.ridge, fit.rows) == (0.0, 40)


@pytest.mark.parametrize("ridge", [1e-4, 0.3, 10.0])
def test_ridge_is_sklearns_on_standardised_features(ridge: float) -> None:
    x, y = rows(40, offset=50.0)
    fit = added(x, y, split=11).solve(ridge)
    scaler = StandardScaler().fit(x)
    reference = Ridge(alpha=ridge * len(x)).fit(scaler.transform(x), y)
    np.testing.assert_allclose(fit.weight, reference.coef_ / scaler.scale_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(predicted(fit, x), reference.predict(scaler.transform(x)), rtol=1e-7)
    expected = r2_score(y, reference.predict(scaler.transform(x)), multioutput="variance_weighted")
    assert fit.r2 == pytest.approx(expected, abs=1e-9)
    assert fit.ridge == ridge


@given(st.integers(8, 60), st.integers(1, 60), st.integers(0, 1000), st.sampled_from([None, 0.01]))
@settings(max_examples=40, deadline=None)
def test_any_split_into_batches_gives_the_same(count: int, split: int, seed: int, ridge: float | None) -> None:
    x, y = rows(count, seed, offset=10.0)
    assert_same(added(x, y, split).solve(ridge), added(x, y).solve(ridge), tolerance=1e-6)


@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
@settings(max_examples=30, deadline=None)
def test_scaling_and_shifting_features_changes_no_prediction(seed: int, scale: float, shift: float) -> None:
    x, y = rows(30, seed)
    moved = x * torch.tensor([scale, 1, 1, 1, 1 / scale]) + shift
    for ridge in (0.0, 0.1):
        one, other = added(x, y).solve(ridge), added(moved, y).solve(ridge)
        torch.testing.assert_close(predicted(one, x), predicted(other, moved), rtol=1e-4, atol=1e-5)


def test_half_precision_rows_are_summed_in_float64() -> None:
    x, y = (z.to(torch.bfloat16) for z in rows(40))
    fit = added(x, y, split=9).solve()
    assert fit.weight.dtype == fit.bias.dtype == torch.float64
    np.testing.assert_allclose(fit.weight, LinearRegression().fit(x.double(), y.double()).coef_, rtol=1e-6, atol=1e-9)


def test_an_empty_batch_adds_nothing() -> None:
    x, y = rows(20)
    equations = added(x, y)
    equations.update(x[:0], y[:0])
    assert_same(equations.solve(), added(x, y).solve())


def test_no_rows_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="got no rows to fit; expected at least one token"):
        LeastSquares(*WIDTHS).solve()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_fewer_rows_than_features_warn_and_still_fit_the_rows(count: int) -> None:
    x, y = rows(count)
    with pytest.warns(UserWarning, match=f"{count} rows do not determine a linear map of 5 features.*ridge of 1e-06"):
        fit = added(x, y).solve()
    assert fit.ridge == RIDGE
    torch.testing.assert_close(predicted(fit, x), y, rtol=1e-3, atol=1e-2)


def test_collinear_features_warn_and_predict_as_well_as_the_least_norm_solution() -> None:
    x, y = rows(60)
    x = torch.cat([x, x[:, :2] @ torch.tensor([[1.0], [-2.0]]).double()], 1)
    with pytest.warns(UserWarning, match="do not determine"):
        fit = added(x, y).solve()
    np.testing.assert_allclose(predicted(fit, x), LinearRegression().fit(x, y).predict(x), atol=2e-3)
    fresh, _ = rows(60, seed=1)
    fresh = torch.cat([fresh, fresh[:, :2] @ torch.tensor([[1.0], [-2.0]]).double()], 1)
    assert predicted(fit, fresh).abs().max() < 1e5  # nothing blows up where the rows say nothing


def test_enough_rows_and_a_ridge_that_is_asked_for_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough, asked_for = added(*rows(40)).solve(), added(*rows(3)).solve(ridge=0.1)
    assert (enough.ridge, asked_for.ridge) == (0.0, 0.1)


@pytest.mark.parametrize("ridge", [0.0, -2.0])
def test_a_ridge_that_cannot_be_solved_is_refused(ridge: float) -> None:
    x, y = rows(40)
    x = torch.cat([x, x[:, :1]], 1)
    with pytest.raises(ValueError, match=f"got ridge={ridge:g}, at which 40 rows do not determine.*larger ridge"):
        added(x, y).solve(ridge)


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1, -3e7])
@pytest.mark.parametrize("ridge", [None, 0.1])
def test_a_constant_feature_gets_no_weight_and_changes_nothing(value: float, ridge: float | None) -> None:
    x, y = rows(57)
    wider = torch.cat([x[:, :2], torch.full((57, 1), value).double(), x[:, 2:]], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = added(wider, y, split=5).solve(ridge)
    assert fit.weight[:, 2].tolist() == [0.0] * 3
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(fit.weight[:, others], added(x, y, split=5).solve(ridge).weight)


def test_a_feature_that_hardly_moves_about_a_large_mean_is_not_taken_for_constant() -> None:
    x, y = rows(50)
    x[:, 0] = 1e4 + 1e-3 * torch.randn(50).double()
    y[:, 0] += 2e3 * (x[:, 0] - 1e4)
    np.testing.assert_allclose(added(x, y, 8).solve().weight, LinearRegression().fit(x, y).coef_, rtol=1e-4, atol=1e-7)


def test_a_constant_output_is_explained() -> None:
    x, _ = rows(30)
    fit = added(x, torch.full((30, 3), 7.3).double(), split=4).solve()
    assert fit.r2 == 1.0
    torch.testing.assert_close(predicted(fit, x), torch.full((30, 3), 7.3).double())


def test_r2_is_small_for_noise_and_one_for_a_linear_map() -> None:
    x, _ = rows(4000)
    noise = torch.randn(4000, 3).double()
    assert 0 <= added(x, noise).solve().r2 < 0.01
    assert added(x, x[:, :3] * 2 + 1).solve().r2 == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_values_that_are_not_finite_are_refused(bad: float, side: int, first: bool) -> None:
    good, broken = rows(20), tuple(z.clone() for z in rows(20))
    broken[side][4, 1] = bad
    equations = LeastSquares(*WIDTHS) if first else added(*good)
    with pytest.raises(ValueError, match="got NaN or infinite hidden states"):
        equations.update(*broken)


class LockStep:
    """Sums over threads that stand for processes: each call waits for the others and gives all the same sum."""

    def __init__(self, processes: int):
        self._values: list[Tensor] = [torch.empty(0)] * processes
        self._barrier = threading.Barrier(processes, timeout=20)

    def total(self, process: int) -> Callable[[Tensor], Tensor]:
        def total(value: Tensor) -> Tensor:
            self._values[process] = value.clone()
            self._barrier.wait()
            result = torch.stack(self._values).sum(0)
            self._barrier.wait()
            return result

        return total


def combined(shares: list[LeastSquares]) -> list[LeastSquares]:
    together = LockStep(len(shares))
    threads = [
        threading.Thread(target=share.combine, args=(together.total(number),)) for number, share in enumerate(shares)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return shares


@pytest.mark.parametrize("counts", [(30,), (20, 20), (33, 2, 11), (0, 25), (1, 0, 24)])
@pytest.mark.parametrize("ridge", [None, 0.2])
def test_processes_together_solve_what_one_would(counts: tuple[int, ...], ridge: float | None) -> None:
    """Shares have different means, so their sums are about different points."""
    parts = [tuple(z + 40 * seed for z in rows(count, seed)) for seed, count in enumerate(counts)]
    shares = combined([added(*part, split=6) if len(part[0]) else LeastSquares(*WIDTHS) for part in parts])
    whole = added(*(torch.cat(side) for side in zip(*parts, strict=True))).solve(ridge)
    for share in shares:
        assert_same(share.solve(ridge), whole, tolerance=1e-7)


@pytest.mark.parametrize("counts", [(40,), (33, 2, 11), (0, 25)])
def test_without_a_bias_it_is_numpys_of_all_rows(counts: tuple[int, ...]) -> None:
    parts = [rows(count, seed, offset=4.0) for seed, count in enumerate(counts)]
    shares = combined([added(*part, split=6, bias=False) for part in parts])
    x, y = (torch.cat(side) for side in zip(*parts, strict=True))
    weight, *_ = np.linalg.lstsq(x, y)
    left = np.square(y - x @ weight).sum() / np.square(y).sum()  # about 0: there is no bias to take the mean
    for fit in (share.solve() for share in shares):
        np.testing.assert_allclose(fit.weight.T, weight, rtol=1e-5, atol=1e-8)
        assert not fit.bias.any()
        assert (fit.r2, fit.rows) == (pytest.approx(1 - left), sum(counts))


def test_processes_that_have_seen_nothing_have_nothing_to_fit() -> None:
    for share in combined([LeastSquares(*WIDTHS), LeastSquares(*WIDTHS)]):
        assert share.rows == 0
        with pytest.raises(ValueError, match="got no rows"):
            share.solve()


def test_any_map_is_judged_by_the_variance_that_it_explains() -> None:
    rng = np.random.default_rng(0)
    x, y = 5 + rng.normal(size=(40, 3)), 7 + rng.normal(size=(40, 2))
    weight, bias = rng.normal(size=(2, 3)), rng.normal(size=2)
    sums = LeastSquares(3, 2)
    sums.update(torch.tensor(x[:15]), torch.tensor(y[:15]))
    sums.update(torch.tensor(x[15:]), torch.tensor(y[15:]))
    fit = sums.equations().fit_of(torch.tensor(weight), torch.tensor(bias))
    left = ((y - x @ weight.T - bias) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert fit.r2 == pytest.approx(1 - left) and (fit.ridge, fit.rows) == (0, 40)
