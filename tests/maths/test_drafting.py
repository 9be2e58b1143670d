"""What drafts save: the paper's formulas, a simulation token by token, scipy's roots."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch.distributions import Categorical

from klas_hf.maths.divergences import acceptance
from klas_hf.maths.drafting import best_drafted, break_even, expected_tokens, pays_above, speed_up

shares = st.floats(0, 0.999)
counts = st.integers(0, 12)


@given(shares, counts)
def test_tokens_of_a_run_are_equation_1(share: float, drafted: int) -> None:
    assert expected_tokens(share, drafted) == pytest.approx((1 - share ** (drafted + 1)) / (1 - share), rel=1e-9)


def test_a_simulation_takes_as_long() -> None:
    """Time of 40,000 runs in which each drafted token is taken by chance, until one is not."""
    chance, share, ratio, drafted = random.Random(0), 0.7, 0.2, 4
    tokens = time = 0.0
    for _ in range(40_000):
        taken = next((n for n in range(drafted) if chance.random() >= share), drafted)
        tokens, time = tokens + taken + 1, time + drafted * ratio + 1.3
    assert speed_up(share, ratio, drafted, checking=1.3) == pytest.approx(tokens / time, rel=0.01)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_draft_pays_just_where_it_is_taken_more_often_than_it_costs(share: float, ratio: float) -> None:
    """Corollary 3.9: if α > c there is a γ that pays, and one token gains at least (1 + α) / (1 + c)."""
    if abs(share - ratio) < 1e-6:
        return
    assert (best_drafted(share, ratio) > 0) == (share > ratio)
    best = speed_up(share, ratio, best_drafted(share, ratio))
    assert best == max(speed_up(share, ratio, drafted) for drafted in range(17))
    assert best >= min(1.0, (1 + share) / (1 + ratio)) - 1e-12


def test_reading_the_draft_may_eat_the_gain() -> None:
    """A target that takes as long to read n + 1 tokens as to write them gains nothing from any draft."""
    assert best_drafted(0.9, 0.1) > 0
    assert best_drafted(0.9, 0.1, checking=[1.0 + n for n in range(17)]) == 0


@given(st.floats(0.01, 0.9), st.integers(1, 8), st.floats(0.8, 1.5))
def test_break_even_is_where_the_speed_up_is_one(ratio: float, drafted: int, checking: float) -> None:
    found = break_even(ratio, drafted, checking)
    if speed_up(1, ratio, drafted, checking) <= 1:
        assert found is None
    elif speed_up(0, ratio, drafted, checking) < 1:
        root = brentq(lambda share: speed_up(share, ratio, drafted, checking) - 1, 0, 1)
        assert found == pytest.approx(root, abs=1e-6)


@given(st.floats(0.01, 1.2), st.lists(st.floats(1.0, 4.0), min_size=1, max_size=8), st.floats(0, 1))
def test_some_number_pays_just_above_the_least_acceptance(ratio: float, longer: list[float], share: float) -> None:
    checking = [1.0, *longer]
    least, pays = pays_above(ratio, checking), best_drafted(share, ratio, checking) > 0
    if least is None:
        assert not pays
    elif abs(share - least) > 1e-6:
        assert pays == (share > least)
    if set(checking) == {1.0} and ratio < 1:
        assert least == pytest.approx(ratio, abs=1e-6)  # Corollary 3.9


def test_acceptance_is_what_is_left_of_total_variation() -> None:
    torch.manual_seed(0)
    p, q = (Categorical(logits=3 * torch.randn(5, 7, 11, dtype=torch.float64)) for _ in range(2))
    expected = 1 - 0.5 * (p.probs - q.probs).abs().sum(-1)
    torch.testing.assert_close(acceptance(p.logits, q.logits), expected)
    assert torch.equal(acceptance(p.logits, p.logits).round(decimals=12), torch.ones(5, 7, dtype=torch.float64))
    with pytest.raises(TypeError, match="expected float32 or float64"):
        acceptance(p.logits.half(), q.logits.half())


@pytest.mark.parametrize(
    ("given", "message"),
    [((1.1, 0.1, 2), "acceptance=1.1"), ((0.5, 0.1, -1), "drafted=-1"), ((0.5, -0.1, 2), "cost_ratio=-0.1")],
)
def test_numbers_that_are_none_are_refused(given: tuple[float, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"got .*{message}.*expected 0"):
        speed_up(*given)
