"""What a draft saves: speculative decoding's arithmetic (Leviathan, Kalman and Matias, ICML 2023).

A draft writes γ tokens, the target reads them in one run and keeps them up to the first that it refuses, in whose
place it writes its own. α is the share of the draft's tokens that are accepted, taken as independent from token to
token; c is what one token of the draft takes, in tokens of the target. The paper assumes that the target reads γ + 1
tokens in the time of one, which holds where weights are waited for; `checking` says what it really takes.
"""

from collections.abc import Sequence


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens that a run of the target yields (Eq. 1): (1 − α^(γ+1)) / (1 − α).

    Args:
        acceptance: α, 0 to 1.
        drafted: γ, tokens drafted at a time.

    Raises:
        ValueError: numbers that are none of that.

    Example:
        >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4)
        (1.75, 5.0)
    """
    if not 0 <= acceptance <= 1 or drafted < 0:
        raise ValueError(f"got acceptance={acceptance} and drafted={drafted}; expected 0 to 1, and 0 or more")
    return float(sum(acceptance**number for number in range(drafted + 1)))


def speed_up(acceptance: float, cost_ratio: float, drafted: int, checking: float = 1.0) -> float:
    """How many times faster the target writes with the draft (Theorem 3.8): below 1 the draft does not pay.

    Args:
        acceptance: α, 0 to 1.
        cost_ratio: c, time of one token of the draft over one of the target.
        drafted: γ, tokens drafted at a time.
        checking: time of the target's run over γ + 1 tokens over its run over one; the paper takes 1.

    Raises:
        ValueError: a time that is negative, or as `expected_tokens`.

    Example:
        >>> round(speed_up(0.8, 0.1, 4), 3), round(speed_up(0.3, 0.6, 4), 3)
        (2.401, 0.419)
    """
    if cost_ratio < 0 or checking <= 0:
        raise ValueError(f"got cost_ratio={cost_ratio} and checking={checking}; expected 0 or more, and more than 0")
    return expected_tokens(acceptance, drafted) / (drafted * cost_ratio + checking)


def best_drafted(acceptance: float, cost_ratio: float, checking: Sequence[float] = (1.0,) * 17) -> int:
    """How many tokens to draft at a time, of 0 or more, for the greatest speed-up; 0: the draft does not pay.

    Args:
        acceptance, cost_ratio: as for `speed_up`.
        checking: of 0 and more drafted tokens. By the paper's 1 for all of them, some number pays just where α > c
            (Corollary 3.9).

    Example:
        >>> best_drafted(0.8, 0.05), best_drafted(0.4, 0.5)
        (8, 0)
    """
    return max(range(len(checking)), key=lambda drafted: speed_up(acceptance, cost_ratio, drafted, checking[drafted]))


def break_even(cost_ratio: float, drafted: int, checking: float = 1.0) -> float | None:
    """The acceptance above which drafting so many tokens at a time pays; None where none does.

    Args:
        cost_ratio, drafted, checking: as for `speed_up`.

    Example:
        >>> round(break_even(0.2, 1), 3), break_even(1.2, 3)
        (0.2, None)
    """
    if speed_up(1.0, cost_ratio, drafted, checking) <= 1:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if speed_up(middle, cost_ratio, drafted, checking) < 1 else (low, middle)
    return high


def pays_above(cost_ratio: float, checking: Sequence[float] = (1.0,) * 17) -> float | None:
    """The least acceptance above which drafting some number of tokens at a time pays; None where none does.

    Args:
        cost_ratio, checking: as for `best_drafted`; by the paper's 1 for all of them it is c itself (Corollary 3.9).

    Example:
        >>> round(pays_above(0.2), 3), round(pays_above(0.2, (1.0, 1.3, 1.6)), 3), pays_above(1.2)
        (0.2, 0.5, None)
    """
    found = [break_even(cost_ratio, drafted, checking[drafted]) for drafted in range(1, len(checking))]
    return min((one for one in found if one is not None), default=None)
