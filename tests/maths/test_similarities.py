"""Similarities against their definitions on all rows at once: numpy, scikit-learn, plain loops."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from test_least_squares import LockStep
from torch import Tensor

from klas_hf.maths.class_cka import ClassConditionalCka
from klas_hf.maths.least_squares import RIDGE, LeastSquares
from klas_hf.maths.similarities import ROWS, PairMoments

SOURCE, TARGET = [3, 4, 4], [4, 5, 5, 2]  # widths
PAIRS = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3)]


def features(rows: int, widths: Sequence[int], seed: int, offset: float = 0.0) -> list[Tensor]:
    """Blocks that share some of their variance, and whose units differ in scale."""
    common = torch.randn(rows, 3, generator=torch.Generator().manual_seed(99 + rows), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def one(width: int) -> Tensor:
        mixed = common @ torch.randn(3, width, generator=generator, dtype=torch.float64)
        noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        return (mixed + noise) * torch.logspace(-1, 1, width).double() + offset

    return [one(width) for width in widths]


def moments(source: list[Tensor], target: list[Tensor], split: int | None = None) -> PairMoments:
    made = PairMoments(PAIRS, [x.shape[1] for x in source], [y.shape[1] for y in target])
    for start in range(0, len(source[0]), split or len(source[0])):
        part = slice(start, start + (split or len(source[0])))
        made.update([x[part] for x in source], [y[part] for y in target])
    return made


def cka_by_kernels(x: Tensor, y: Tensor) -> float:
    """HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with linear kernels, Kornblith et al. (2019), Eq. 2 and 3."""
    x, y = x.double().numpy(), y.double().numpy()
    centring = np.eye(len(x)) - 1 / len(x)
    k, other = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    return float(np.trace(k @ other) / np.sqrt(np.trace(k @ k) * np.trace(other @ other)))


@pytest.mark.parametrize("offset", [0.0, 1e7])
@pytest.mark.parametrize("split", [None, 17])
def test_cka_is_the_ratio_of_hsics(offset: float, split: int | None) -> None:
    source, target = features(60, SOURCE, 0, offset), features(60, TARGET, 1, -offset)
    got = moments(source, target, split).cka()
    assert got.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            expected = cka_by_kernels(source[i], target[j]) if (i, j) in PAIRS else np.nan
            assert got[i, j] == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert np.nanmin(got) < 0.1 and 0.4 < np.nanmax(got) < 0.99


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-100, 100))
@settings(max_examples=25, deadline=None)
def test_cka_ignores_rotation_scale_and_shift_and_is_one_for_the_same(seed: int, scale: float, shift: float) -> None:
    (x,) = features(40, [5], seed)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).double())
    made = PairMoments([(0, 0), (0, 1)], [5], [5, 3])
    y = features(40, [3], seed + 1)[0]
    made.update([scale * x @ rotation + shift], [x, y])
    assert made.cka()[0, 0] == pytest.approx(1.0, abs=1e-9) and made.cka()[0, 0] <= 1
    assert made.cka()[0, 1] == pytest.approx(cka_by_kernels(x, y), rel=1e-6)


@pytest.mark.parametrize("split", [None, 13])
def test_least_squares_of_every_pair_is_sklearns(split: int | None) -> None:
    source, target = features(60, SOURCE, 2, 30.0), features(60, TARGET, 3, -5.0)
    made = moments(source, target, split)
    unexplained = made.unexplained()
    for i in range(3):
        for j in range(4):
            if (i, j) not in PAIRS:
                assert np.isnan(unexplained[i, j])
                with pytest.raises(ValueError, match=rf"got the pairs \[\({i}, {j}\)\]; expected some of"):
                    made.least_squares(i, j)
                continue
            fit, reference = made.least_squares(i, j), LinearRegression().fit(source[i], target[j])
            np.testing.assert_allclose(fit.weight, reference.coef_, rtol=1e-7, atol=1e-10)
            np.testing.assert_allclose(fit.bias, reference.intercept_, rtol=1e-7, atol=1e-8)
            r2 = r2_score(target[j], reference.predict(source[i]), multioutput="variance_weighted")
            assert unexplained[i, j] == pytest.approx(1 - r2, rel=1e-7) and 0.01 < unexplained[i, j] < 0.99
            assert (fit.rows, fit.ridge) == (60, 0.0)


def test_a_ridge_is_passed_on() -> None:
    source, target = features(60, SOURCE, 2), features(60, TARGET, 3)
    made = moments(source, target)
    equations = LeastSquares(4, 5)
    equations.update(source[1], target[1])
    torch.testing.assert_close(made.least_squares(1, 1, ridge=0.3).weight, equations.solve(0.3).weight)
    assert made.unexplained(ridge=0.3)[1, 1] == pytest.approx(1 - equations.solve(0.3).r2)
    assert made.merged([(1, 1), (1, 2)], ridge=0.3).ridge == 0.3


def test_the_targets_of_a_source_block_share_one_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """And rows that come later count."""
    source, target = features(60, SOURCE, 2), features(60, TARGET, 3)
    made = moments([x[:40] for x in source], [y[:40] for y in target])
    calls, factorise = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: calls.append(len(matrix)) or factorise(matrix))
    made.unexplained(ridge=0.3)
    assert sorted(calls) == sorted(SOURCE[i] for i in {i for i, _ in PAIRS}) and len(PAIRS) > len(calls)
    made.update([x[40:] for x in source], [y[40:] for y in target])
    last = sorted(PAIRS)[-1]  # whose factor was kept
    whole = moments(source, target).least_squares(*last, ridge=0.3)
    torch.testing.assert_close(made.least_squares(*last, ridge=0.3).weight, whole.weight)


def test_an_exact_map_leaves_nothing_unexplained_and_never_less() -> None:
    for seed in range(20):
        (x,) = features(50, [4], seed)
        made = PairMoments([(0, 0)], [4], [2])
        made.update([x], [x[:, :2] * 3 + 1])
        assert 0.0 <= made.unexplained()[0, 0] < 1e-9


def test_a_shared_layer_is_the_fit_to_the_rows_of_all_its_pairs() -> None:
    source, target = features(60, SOURCE, 6, 100.0), features(60, TARGET, 7)
    source[2] += 40  # the pairs' means differ
    made = moments(source, target, 19)
    shared = [(1, 1), (1, 2), (2, 2)]
    x, y = (torch.cat([blocks[pair[side]] for pair in shared]) for side, blocks in enumerate((source, target)))
    reference = LinearRegression().fit(x, y)
    fit = made.merged(shared)
    np.testing.assert_allclose(fit.weight, reference.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(fit.bias, reference.intercept_, rtol=1e-6, atol=1e-7)
    assert fit.r2 == pytest.approx(r2_score(y, reference.predict(x), multioutput="variance_weighted"), rel=1e-7)
    assert fit.rows == 180
    alone, pair = made.merged([(0, 1)]), made.least_squares(0, 1)
    torch.testing.assert_close(alone.weight, pair.weight)
    with pytest.raises(ValueError, match=r"got pairs of the widths \[\(3, 4\), \(3, 5\)\]; expected one width"):
        made.merged([(0, 0), (0, 1)])
    with pytest.raises(ValueError, match=r"got the pairs \[\]; expected some of"):
        made.merged([])


def test_stages_may_have_other_numbers_of_rows() -> None:
    pairs = [(0, 0), (1, 1)]
    source = [features(2 * ROWS + 40, [3], 1)[0], features(90, [4], 2)[0]]
    target = [features(2 * ROWS + 40, [2], 3)[0], features(90, [5], 4)[0]]
    made = PairMoments(pairs, [3, 4], [2, 5])
    made.update([x[:1500] if k == 0 else x[:50] for k, x in enumerate(source)],
                [y[:1500] if k == 0 else y[:50] for k, y in enumerate(target)])  # fmt: skip
    made.update([x[1500:] if k == 0 else x[50:] for k, x in enumerate(source)],
                [y[1500:] if k == 0 else y[50:] for k, y in enumerate(target)])  # fmt: skip
    for i, j in pairs:
        assert made.cka()[i, j] == pytest.approx(cka_by_kernels(source[i], target[j]), rel=1e-6)
        assert made.least_squares(i, j).rows == len(source[i])


def test_blocks_in_no_pair_cost_nothing_and_may_hold_anything() -> None:
    made = PairMoments([(1, 0)], [10**6, 3], [3, 10**6])
    good = features(20, [3, 3], 0)
    broken = torch.full((7, 1), float("nan"))
    made.update([broken, good[0]], [good[1], broken])
    assert made.cka()[1, 0] == pytest.approx(cka_by_kernels(*good))
    assert PairMoments.bytes_needed([(1, 0)], [10**6, 3], [3, 10**6]) == 8 * (9 + 6 + 9 + 6 + 9)


def test_bytes_needed_are_those_of_the_sums() -> None:
    made = PairMoments(PAIRS, SOURCE, TARGET)
    tensors = [
        x for block in (*made._source.values(), *made._target.values()) for x in (block.shift, block.sum, block.gram)
    ]
    held = sum(x.nbytes for x in [*tensors, *made._cross.values()])
    assert PairMoments.bytes_needed(PAIRS, SOURCE, TARGET) == held


def test_half_precision_features_are_summed_in_float64() -> None:
    source, target = ([x.bfloat16() for x in features(60, w, k, 20.0)] for k, w in enumerate((SOURCE, TARGET)))
    got = moments(source, target, 20).cka()
    for i, j in PAIRS:
        assert got[i, j] == pytest.approx(cka_by_kernels(source[i], target[j]), rel=1e-6)


@pytest.mark.parametrize("counts", [(60,), (30, 30), (33, 2, 25), (0, 60), (1, 0, 59)])
def test_processes_together_know_what_one_would(counts: tuple[int, ...]) -> None:
    """Shares have different means, so their sums are about different points."""
    source, target = features(60, SOURCE, 0), features(60, TARGET, 1)
    drift = torch.arange(60).double()[:, None]
    source, target = [x + drift for x in source], [y - 2 * drift for y in target]
    shares, start = [], 0
    for count in counts:
        part = slice(start, start + count)
        one = PairMoments(PAIRS, SOURCE, TARGET)
        if count:
            one.update([x[part] for x in source], [y[part] for y in target])
        shares.append(one)
        start += count
    together = LockStep(len(shares))
    threads = [threading.Thread(target=one.combine, args=(together.total(k),)) for k, one in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    whole = moments(source, target)
    for one in shares:
        np.testing.assert_allclose(one.cka(), whole.cka(), rtol=1e-8)
        np.testing.assert_allclose(one.unexplained(), whole.unexplained(), rtol=1e-7)
        expected = whole.merged([(1, 1), (2, 2)])
        torch.testing.assert_close(one.merged([(1, 1), (2, 2)]).weight, expected.weight)
        assert one.merged([(1, 1), (2, 2)]).rows == 120


def test_too_few_rows_warn_and_no_rows_are_refused() -> None:
    made = PairMoments([(0, 0)], [5], [2])
    for call in (made.cka, made.unexplained):
        with pytest.raises(ValueError, match="got no rows"):
            call()
    x, y = features(3, [5, 2], 0)
    made.update([x], [y])
    with pytest.warns(UserWarning, match="3 rows do not determine a linear map of 5 features"):
        assert made.least_squares(0, 0).ridge == RIDGE


def test_features_that_do_not_vary_have_no_cka() -> None:
    made = PairMoments([(0, 0)], [2], [3])
    made.update([torch.full((9, 2), 0.3)], [torch.randn(9, 3)])
    assert np.isnan(made.cka()[0, 0])


def test_wrong_rows_and_pairs_are_refused() -> None:
    source, target = features(20, SOURCE, 0), features(20, TARGET, 1)
    made = PairMoments(PAIRS, SOURCE, TARGET)
    with pytest.raises(ValueError, match="got 20 rows of source block 1 and 19 of target block 2; expected equally"):
        made.update(source, [*target[:2], target[2][:19], target[3]])
    for bad in (float("nan"), float("inf")):
        for side in (source, target):
            broken = [x.clone() for x in side]
            broken[1][3, 2] = bad
            with pytest.raises(ValueError, match="got NaN or infinite features"):
                made.update(*((broken, target) if side is source else (source, broken)))
    for wrong in ([], [(3, 0)], [(0, 4)], [(-1, 0)], [(0, 0), (0, 0)]):
        with pytest.raises(ValueError, match="got . pairs, .*positions below 3 and 4"):
            PairMoments(wrong, SOURCE, TARGET)
        with pytest.raises(ValueError, match="got . pairs, .*positions below 3 and 4"):
            ClassConditionalCka(wrong, (3, 4), 2)


def classed(images: int = 90) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Features whose classes have other means; class 2 has one image, class 4 none."""
    labels = torch.tensor([k % 2 if k % 9 else 3 for k in range(images)])
    labels[5] = 2
    source, target = features(images, SOURCE, 11), features(images, TARGET, 12)
    return [x + 5 * labels[:, None] for x in source], [y - labels[:, None] for y in target], labels


@pytest.mark.parametrize("split", [90, 7])
def test_class_cka_is_the_mean_over_classes(split: int) -> None:
    source, target, labels = classed()
    made = ClassConditionalCka(PAIRS, (3, 4), 5)
    for start in range(0, 90, split):
        part = slice(start, start + split)
        made.update([x[part] for x in source], [y[part] for y in target], labels[part])
    got = made.cka()
    assert made.left_out == 2 and got.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            each = [cka_by_kernels(source[i][labels == c], target[j][labels == c]) for c in (0, 1, 3)]
            expected = np.mean(each) if (i, j) in PAIRS else np.nan
            assert got[i, j] == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert not np.allclose(got[0, 0], moments(source, target).cka()[0, 0], rtol=0.01)


def test_class_cka_over_processes() -> None:
    source, target, labels = classed()
    whole, first, second, idle = (ClassConditionalCka(PAIRS, (3, 4), 5) for _ in range(4))
    whole.update(source, target, labels)
    for one, part in ((first, slice(0, 40)), (second, slice(40, 90))):
        one.update([x[part] for x in source], [y[part] for y in target], labels[part])

    def shares(one: ClassConditionalCka) -> list[Tensor]:
        """What another process gives to each gathering in turn."""
        return [torch.cat(rows) for rows in (*one._source.values(), *one._target.values(), one._labels)]

    others = iter(shares(second))
    first.combine(lambda rows: torch.cat([rows, next(others)]))
    np.testing.assert_allclose(first.cka(), whole.cka(), rtol=1e-12)
    assert first.left_out == whole.left_out
    theirs = iter(shares(whole))
    idle.combine(lambda rows: torch.cat([rows, next(theirs)]))
    np.testing.assert_array_equal(idle.cka(), whole.cka())


def test_class_cka_needs_two_images_of_a_class_and_labels_in_range() -> None:
    source, target = features(2, SOURCE, 0), features(2, TARGET, 1)
    made = ClassConditionalCka(PAIRS, (3, 4), 5)
    with pytest.raises(ValueError, match="got fewer than two images of each of 5 classes"):
        made.cka()
    made.update(source, target, torch.tensor([0, 4]))
    assert made.left_out == 5
    with pytest.raises(ValueError, match="got fewer than two images of each of 5 classes"):
        made.cka()
    for wrong in ([0, 5], [-1, 2]):
        with pytest.raises(ValueError, match=f"got labels from {wrong[0]} to {wrong[1]}; expected 0 to 4"):
            made.update(source, target, torch.tensor(wrong))
