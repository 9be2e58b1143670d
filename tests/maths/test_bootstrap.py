"""The paired bootstrap against naive loops, scipy and the properties that it must have."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats

from klas_hf.maths import bootstrap
from klas_hf.maths.bootstrap import paired_bootstrap

Array = NDArray[np.float64]

scores = hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(-100, 100, width=32))


def systems(pairs: int, gap: float, seed: int = 3) -> tuple[Array, Array]:
    """Scores of two systems that agree on which questions are hard."""
    generator = np.random.default_rng(seed)
    hardness = generator.normal(size=pairs)
    return hardness + gap + 0.3 * generator.normal(size=pairs), hardness + 0.3 * generator.normal(size=pairs)


def naive(a: Array, b: Array, clusters: NDArray[np.int_], samples: int, seed: int) -> Array:
    """Resampled mean differences, one question at a time."""
    generator = np.random.default_rng(seed)
    questions = sorted(set(clusters.tolist()))
    means: list[float] = []
    for _ in range(samples):
        pool: list[float] = []
        for draw in generator.integers(len(questions), size=len(questions)):
            pool += [x - y for x, y, id_ in zip(a, b, clusters, strict=True) if id_ == questions[draw]]
        means.append(sum(pool) / len(pool))
    return np.array(means)


@pytest.mark.parametrize("repeated", [False, True])
def test_equals_a_naive_loop(repeated: bool) -> None:
    a, b = systems(23, gap=0.1)
    clusters = np.arange(23) % 9 if repeated else np.arange(23)
    got = paired_bootstrap(a, b, clusters=clusters if repeated else None, samples=400, seed=5, confidence=0.8)
    means = naive(a, b, clusters, 400, seed=5)
    assert got.difference == pytest.approx(np.mean(a - b))
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(means, [10, 90])))
    assert got.p_value == pytest.approx(2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / 401)
    assert 0.002 < got.p_value < 1
    assert got.pairs == 23
    assert all(type(value) in (int, float) for value in asdict(got).values())


def test_interval_agrees_with_scipy() -> None:
    a, b = systems(200, gap=0.05)
    ours = paired_bootstrap(a, b, seed=1)

    def mean_difference(a: Array, b: Array, axis: int) -> Any:
        return (a - b).mean(axis)

    theirs = stats.bootstrap((a, b), mean_difference, paired=True, method="percentile", rng=2)
    noise = 0.12 * theirs.standard_error  # Monte Carlo error of a 2.5 % quantile: about 0.03 standard errors
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=noise)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=noise)


@pytest.mark.parametrize("gap", [0.0, 0.02, 0.05])
def test_p_value_agrees_with_a_t_test_on_normal_scores(gap: float) -> None:
    a, b = systems(400, gap=gap)
    assert paired_bootstrap(a, b).p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)


@given(scores, st.data())
def test_swapping_the_systems_flips_the_sign(a: Array, data: st.DataObject) -> None:
    b = data.draw(hnp.arrays(np.float64, len(a), elements=st.floats(-100, 100, width=32)))
    one, other = paired_bootstrap(a, b, samples=50), paired_bootstrap(b, a, samples=50)
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low), abs=1e-9)
    assert one.p_value == other.p_value


@given(scores)
def test_equal_systems_do_not_differ(a: Array) -> None:
    got = paired_bootstrap(a, a.copy(), samples=50)
    assert (got.difference, got.low, got.high, got.p_value) == (0, 0, 0, 1)


@given(scores, st.floats(-50, 50, width=32))
def test_a_shift_moves_the_interval_with_it(a: Array, shift: float) -> None:
    b = np.zeros_like(a)
    plain, moved = paired_bootstrap(a, b, samples=50), paired_bootstrap(a + shift, b, samples=50)
    expected = (plain.difference + shift, plain.low + shift, plain.high + shift)
    assert (moved.difference, moved.low, moved.high) == pytest.approx(expected, abs=1e-9)


@given(scores, st.integers(2, 4), st.randoms(use_true_random=False))
def test_repeated_questions_add_no_certainty(a: Array, times: int, shuffler: Any) -> None:
    rows = [place for place in range(len(a)) for _ in range(times)]
    shuffler.shuffle(rows)
    b = np.roll(a, 1)
    names = np.array([f"question {place:03}" for place in rows])
    once = paired_bootstrap(a, b, samples=50)
    repeated = paired_bootstrap(a[rows], b[rows], clusters=names, samples=50)
    assert (repeated.difference, repeated.low, repeated.high) == pytest.approx(
        (once.difference, once.low, once.high), abs=1e-9
    )
    assert repeated.pairs == times * once.pairs


def test_repeated_questions_taken_for_new_ones_look_too_certain() -> None:
    a, b = systems(60, gap=0.1)
    a, b, ids = np.tile(a, 4), np.tile(b, 4), np.tile(np.arange(60), 4)
    honest, blind = paired_bootstrap(a, b, clusters=ids), paired_bootstrap(a, b)
    assert (blind.high - blind.low) == pytest.approx((honest.high - honest.low) / 2, rel=0.1)


def test_memory_bound_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = systems(31, gap=0.1)
    whole = paired_bootstrap(a, b, samples=500)
    for bound in (1, 100, 31 * 7):
        monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", bound)
        assert paired_bootstrap(a, b, samples=500) == whole


def test_only_the_seed_decides() -> None:
    a, b = systems(40, gap=0.1)
    global_state = repr(np.random.get_state())
    first = paired_bootstrap(a, b, samples=200)
    assert paired_bootstrap(a, b, samples=200) == first
    assert repr(np.random.get_state()) == global_state
    assert paired_bootstrap(a, b, samples=200, seed=1) != first


def test_less_confidence_is_narrower_and_clear_gaps_reach_the_least_p_value() -> None:
    a, b = systems(50, gap=5)
    wide, narrow = paired_bootstrap(a, b, samples=999), paired_bootstrap(a, b, samples=999, confidence=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide.p_value == narrow.p_value == 2 / 1000


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([1, 2], [1, 2, 3], {}, r"shape \(2,\) and b of shape \(3,\)"),
        ([[1, 2]], [[1, 2]], {}, "two vectors of one length"),
        ([1, np.nan, 2], [0, 0, 0], {}, "1 of 3 pairs with a NaN"),
        ([1, 2, 3], [0, 0, np.inf], {}, "1 of 3 pairs with a NaN or infinite"),
        ([1], [2], {}, "got 1 questions; expected at least 2"),
        ([], [], {}, "got 0 questions"),
        ([1, 2], [1, 3], {"clusters": [7, 7]}, "got 1 questions"),
        ([1, 2], [1, 3], {"clusters": [7]}, r"clusters of shape \(1,\)"),
        ([1, 2], [1, 3], {"samples": 0}, "samples=0; expected at least 1"),
        ([1, 2], [1, 3], {"confidence": 95}, "confidence=95; expected a number between 0 and 1"),
    ],
)
def test_bad_input_is_refused(a: Any, b: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b, **options)
