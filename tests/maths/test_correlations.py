"""Correlations against numpy, and ranks by hand."""

import math
import warnings

import numpy as np
import pytest

from klas_hf.maths.correlations import pearson, spearman


def test_correlations_are_numpys() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=30)
    y = x**3 + generator.normal(size=30)
    ranks = [series.argsort().argsort() for series in (x, y)]
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert spearman(list(x), tuple(y)) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)


def test_ties_share_their_mean_rank() -> None:
    assert spearman([1, 2, 2, 9], [4, 3, 5, 6]) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [2, 1, 3, 4])[0, 1])


def test_a_constant_series_correlates_with_nothing_and_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(pearson([1, 1, 1], [1, 2, 3])) and math.isnan(spearman([1, 2, 3], [1, 1, 1]))
