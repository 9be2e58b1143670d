"""KLAS's selection (Alg. 3, Eq. 3): in each cost bucket, the stitches whose score is near the bucket's lowest.

Beside it, other ways to choose by a score. Where several pairs of anchors are stitched, a rule takes the scores of all
pairs, buckets each pair by itself and gives the union, as Alg. 3 does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klas_hf.budgets import Budget, Cost, described
from klas_hf.maths.buckets import Spacing, best_of_buckets
from klas_hf.paths import Stitch
from klas_hf.scores.values import StitchScores
from klas_hf.selection.choice import Candidates, StitchSelection, merge_selections


def select_stitches(
    scores: StitchScores | Sequence[StitchScores],
    *,
    buckets: int = 20,
    threshold: float = 0.05,
    spacing: Spacing = "width",
    absolute: bool = False,
    budget: Budget | Cost | str | float | None = None,
    costs: Callable[[Stitch], Cost] | None = None,
) -> StitchSelection:
    """KLAS selection (Alg. 3): in each cost bucket keep every stitch whose score is near the bucket's lowest.

    Args:
        scores: scores and costs of all candidates; of several pairs of anchors, each bucketed by itself.
        buckets: number of cost buckets between the anchors' MACs. There may be more than candidates; empty ones
            give nothing.
        threshold: τ of Eq. 3. Relative, as the paper's text has it: keep score <= (1 + τ) · lowest.
        spacing: buckets of equal "width" in MACs (the paper), or of equal candidate counts ("quantile").
        absolute: keep score <= lowest + τ instead, as the printed Eq. 3 can be read.
        budget: of the stitches kept, only those within it (see `Budget.of`); a share is of the target's MACs.
        costs: of a stitch, where the budget is about more than MACs and parameters: `PathCosts.of`.

    Returns:
        The choice, cheapest first; its rule is the name of the score.

    Raises:
        ValueError: fewer than one bucket, a negative threshold, no candidate between the anchors' costs, or no stitch
            within the budget.

    Example:
        >>> selection = select_stitches(scores, buckets=2, threshold=0.05)
        >>> selection.rule, [str(stitch) for stitch in selection], selection.buckets
        ('klas', ['(2, 3)', '(3, 3)', '(2, 2)', '(1, 1)'], (0, 1, 1, 1))
    """
    if not threshold >= 0:
        raise ValueError(f"got threshold={threshold}; expected 0 or more")
    if not isinstance(scores, StitchScores):
        alike: dict[str, Any] = {"buckets": buckets, "threshold": threshold, "spacing": spacing, "absolute": absolute}
        return merge_selections([select_stitches(one, budget=budget, costs=costs, **alike) for one in scores])
    every = Candidates.scored(scores)
    bucket = every.buckets(buckets, spacing)
    keep = near_bucket_minimum(every.values, bucket, threshold, absolute)
    chosen = every.selection(scores.score, keep, bucket[keep])
    return chosen if budget is None else _within(chosen, scores, Budget.of(budget), costs)


def _within(
    chosen: StitchSelection, scores: StitchScores, budget: Budget, costs: Callable[[Stitch], Cost] | None
) -> StitchSelection:
    """The stitches that are within a budget."""
    if costs is None and budget.kv_bytes_per_token is not None:
        raise ValueError(
            f"got a budget of {budget.text} without costs, and scores that count no cached bytes; expected "
            "costs=measure_path_costs([source, target]).of"
        )
    each = [Cost(*scores.costs.of(stitch)) if costs is None else costs(stitch) for stitch in chosen.stitches]
    target = Cost(scores.costs.target_total, 0)
    size = scores.provenance.get("target", {}).get("bytes_per_parameter", 4)
    within = [n for n, cost in enumerate(each) if budget.allows(cost, target, size)]
    if not within:
        near = min(each, key=lambda cost: budget.excess(cost, target, size))
        raise ValueError(
            f"got a budget of {budget.text}, which none of the {len(each)} stitches kept is within; expected more: the "
            f"nearest takes {described(near, target, size)}"
        )
    return chosen.take(within)


def match_stitches(scores: StitchScores, reference: StitchSelection, *, tolerance: float = 0.05) -> StitchSelection:
    """For each stitch of another rule, the best-scored one of about its size: a comparison at equal cost (ours).

    Args:
        scores: scores and costs of all candidates.
        reference: what to match, such as ESTA's stitches.
        tolerance: a match costs at most what the reference costs, and at least (1 - tolerance) times that.

    Returns:
        One match per reference stitch, cheapest first, a stitch twice where it matches two. The reference stitch
        itself is among the candidates.

    Raises:
        ValueError: no candidate between the anchors' costs.

    Example:
        >>> esta = esta_stitches(costs)
        >>> matched = match_stitches(scores, esta, tolerance=0.05)
        >>> len(matched) == len(esta), all(a <= b for a, b in zip(matched.macs, esta.macs))
        (True, True)
    """
    every = Candidates.scored(scores)
    macs = every.macs
    near = [np.flatnonzero((macs <= cost) & (macs >= (1 - tolerance) * cost)) for cost in reference.macs]
    keep = [places[np.argmin(every.values[places])] for places in near if len(places)]
    return every.selection(scores.score, np.array(keep, dtype=np.int64))


def best_stitches(scores: StitchScores | Sequence[StitchScores], *, count: int) -> StitchSelection:
    """The `count` stitches of lowest score with no buckets, over all pairs of anchors together.

    Args:
        scores: of one pair of anchors, or of several by one score.
        count: how many; all where there are fewer.

    Returns:
        The choice, cheapest first; its rule is the name of the score.

    Raises:
        ValueError: a count below 1, or no candidate between the anchors' costs.

    Example:
        >>> best = best_stitches(scores, count=2)
        >>> best.rule, max(best.values) <= min(scores.value_of(s) for s in scores.stitches if s not in best)
        ('klas', True)
    """
    if count < 1:
        raise ValueError(f"got count={count}; expected at least 1")
    each = []
    for one in [scores] if isinstance(scores, StitchScores) else scores:
        every = Candidates.scored(one)
        each.append(every.selection(one.score, np.argsort(every.values, kind="stable")[:count]))
    union = merge_selections(each)
    return union.take(np.sort(np.argsort(union.values, kind="stable")[:count]).tolist())


def shortlist_stitches(
    scores: StitchScores | Sequence[StitchScores], *, per_bucket: int = 3, buckets: int = 20
) -> StitchSelection:
    """The `per_bucket` best stitches of each cost bucket: what a dear score is left to decide between (halving).

    Args:
        scores: by a cheap score, such as "theta" or "dm"; of several pairs of anchors, each bucketed by itself.
        per_bucket: how many of each bucket; all where it holds fewer.
        buckets: number of cost buckets of equal width between the anchors' MACs.

    Returns:
        The choice, cheapest first; its rule is the name of the score.

    Raises:
        ValueError: a number below 1, or no candidate between the anchors' costs.

    Example:
        >>> few = shortlist_stitches(scores.with_score("theta"), per_bucket=1, buckets=3)
        >>> dear = FunctionalScoring(candidates=few)  # scores only these
        >>> few.buckets
        (0, 1, 2)
    """
    if per_bucket < 1:
        raise ValueError(f"got per_bucket={per_bucket}; expected at least 1")
    each = []
    for one in [scores] if isinstance(scores, StitchScores) else scores:
        every = Candidates.scored(one)
        bucket = every.buckets(buckets, "width")
        keep = best_of_buckets(every.values, bucket, per_bucket)
        each.append(every.selection(one.score, keep, bucket[keep]))
    return merge_selections(each)


def near_bucket_minimum(
    values: NDArray, bucket: NDArray[np.int64], threshold: float, absolute: bool = False
) -> NDArray[np.int64]:
    """Eq. 3: positions of the values within the threshold of the lowest value of their bucket."""
    lowest = np.full(bucket.max(initial=-1) + 1, np.inf)
    np.minimum.at(lowest, bucket, values)
    lowest = lowest[bucket]
    limit = lowest + threshold if absolute else lowest + threshold * np.abs(lowest)
    return np.flatnonzero(values <= limit)
