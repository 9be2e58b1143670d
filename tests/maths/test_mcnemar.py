"""McNemar's exact test against a count of coin tosses, a published example, and its symmetries."""

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from klas_hf.maths.mcnemar import mcnemar

answers = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


def tosses(one: int, other: int) -> float:
    """Probability that a fair coin falls at least as unevenly, by counting."""
    total = one + other
    return (
        sum(comb(total, heads) for heads in range(total + 1) if abs(2 * heads - total) >= abs(one - other)) / 2**total
    )


@given(answers)
def test_equals_counted_tosses_and_is_symmetric(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    found, turned = mcnemar(a, b), mcnemar(b, a)
    assert found.p_value == pytest.approx(tosses(found.only_a, found.only_b))
    assert (found.only_a, found.only_b, found.p_value) == (turned.only_b, turned.only_a, turned.p_value)
    assert found.only_a - found.only_b == sum(a) - sum(b)
    assert mcnemar(a, a).p_value == 1


def test_a_published_example() -> None:
    """Agresti's approval ratings (1990, Sec. 10.1): 150 against 86 changed their mind, z² = 17.36 uncorrected."""
    a = [1] * 794 + [1] * 150 + [0] * 86 + [0] * 570
    b = [1] * 794 + [0] * 150 + [1] * 86 + [0] * 570
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b, found.pairs) == (150, 86, 1600)
    assert pytest.approx(17.36, abs=0.005) == (150 - 86) ** 2 / (150 + 86)
    assert found.p_value == pytest.approx(chi2.sf((150 - 86 - 1) ** 2 / (150 + 86), 1), rel=0.1)  # Edwards' correction


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 0], [1], r"shape \(2,\) and b of shape \(1,\)"),
        ([], [], "expected two vectors"),
        ([0.5, 1], [1, 0], "paired_bootstrap takes any scores"),
    ],
)
def test_bad_input(a: list, b: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mcnemar(a, b)
