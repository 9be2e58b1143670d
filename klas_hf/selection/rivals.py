"""The rules that KLAS is compared with: Min-KL (its ablation), ESTA, and chance; SN-Net is in `selection.snnet`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from klas_hf.maths.buckets import Spacing
from klas_hf.scores.values import StitchScores
from klas_hf.selection.choice import Candidates, StitchSelection, merge_selections
from klas_hf.selection.klas import best_stitches
from klas_hf.stitch_costs import StitchCosts

DepthRule = Literal["index", "proportional"]


def min_kl_stitches(scores: StitchScores | Sequence[StitchScores], count: int) -> StitchSelection:
    """Min-KL, the paper's ablation (App. C): the `count` stitches of lowest Θ, with no capacity and no buckets.

    Args:
        scores: of one pair of anchors, or of several; Θ counts, whatever score they are ranked by.
        count: how many; all where there are fewer.

    Returns:
        Rule "min_kl", cheapest first; `values` are Θ in nats.

    Raises:
        ValueError: a count below 1, no candidate between the anchors' costs, or scores without Θ.

    Example:
        >>> chosen = min_kl_stitches(scores, count=2)
        >>> chosen.values == tuple(scores.cross[s.source_stop - 1, s.target_start - 1] for s in chosen)
        True
    """
    each = [scores] if isinstance(scores, StitchScores) else scores
    return replace(best_stitches([one.with_score("theta") for one in each], count=count), rule="min_kl")


def esta_stitches(costs: StitchCosts, *, mapping: DepthRule = "proportional") -> StitchSelection:
    """ESTA: by layer count, the first i blocks of the small anchor and the rest of the large one.

    Args:
        costs: costs of all candidates.
        mapping: which target block stands at the depth of source block i of m, the target having n blocks:
            "index" takes j = i, "proportional" j = round(i · n / m). He et al. (2024) do not say; both are run.

    Returns:
        Rule "esta_index" or "esta_proportional", cheapest first, without scores or buckets.

    Raises:
        ValueError: an unknown mapping, or no such stitch between the anchors' costs.

    Example:
        >>> [str(stitch) for stitch in esta_stitches(costs)]  # anchors of 3 and 4 blocks
        ['(2, 3)', '(1, 1)']
        >>> esta_stitches(costs, mapping="index").rule
        'esta_index'
    """
    m, n = costs.macs.shape
    matched = {"index": lambda i: i, "proportional": lambda i: round(i * n / m)}
    if mapping not in matched:
        raise ValueError(f"got mapping={mapping!r}; expected one of {sorted(matched)}")
    chosen = np.zeros((m, n), dtype=bool)
    for i in range(1, m + 1):
        j = matched[mapping](i)
        if 0 < j < n:
            chosen[i - 1, j] = True
    every = Candidates.of(costs, chosen)
    return every.selection(f"esta_{mapping}", np.arange(len(every.rows)))


def random_stitches(
    costs: StitchCosts | Sequence[StitchCosts],
    *,
    buckets: int = 20,
    per_bucket: int = 1,
    seed: int = 0,
    spacing: Spacing = "width",
) -> StitchSelection:
    """Uniform choice of `per_bucket` stitches in each cost bucket, the floor that any rule must beat.

    Only stitches with target_start >= 1 are drawn: the candidates of KLAS. A bucket that holds fewer gives all it has.

    Args:
        costs: costs of all candidates; of several pairs of anchors, each bucketed by itself.
        buckets: number of cost buckets between the anchors' MACs.
        per_bucket: how many of each bucket.
        seed: of the draw.
        spacing: buckets of equal "width" in MACs, or of equal candidate counts ("quantile").

    Returns:
        Rule "random", cheapest first, without scores.

    Raises:
        ValueError: a number below 1, an unknown spacing, or no candidate between the anchors' costs.

    Example:
        >>> drawn = random_stitches(costs, buckets=3, per_bucket=1, seed=0)
        >>> drawn.stitches == random_stitches(costs, buckets=3, seed=0).stitches
        True
        >>> len(drawn) == len(set(drawn.buckets))
        True
    """
    if per_bucket < 1:
        raise ValueError(f"got per_bucket={per_bucket}; expected at least 1")
    generator = np.random.default_rng(seed)
    each = []
    for one in [costs] if isinstance(costs, StitchCosts) else costs:
        has_probe = np.broadcast_to(np.arange(one.macs.shape[1]) > 0, one.macs.shape)
        every = Candidates.of(one, has_probe)
        bucket = every.buckets(buckets, spacing)
        shuffled = generator.permutation(len(bucket))
        order = shuffled[np.argsort(bucket[shuffled], kind="stable")]
        first_of_bucket = np.searchsorted(bucket[order], bucket[order])
        keep = order[np.arange(len(order)) - first_of_bucket < per_bucket]
        each.append(every.selection("random", keep, bucket[keep]))
    return merge_selections(each)
