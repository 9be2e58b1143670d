"""Which stitches to make: KLAS selection (Alg. 3, Eq. 3) and the rules it is compared with.

Every rule returns a `StitchSelection`. Candidates that cost less than the source or more than the target are no
interpolation between the anchors: they are dropped, and counted. Where several pairs of anchors are stitched, a rule
takes the scores (or costs) of all pairs, buckets each pair by itself and gives the union, as Alg. 3 does.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from klas_hf.paths import Stitch, StitchCosts
from klas_hf.scores.values import StitchScores

Spacing = Literal["width", "quantile"]
Mapping = Literal["index", "proportional"]


@dataclass(frozen=True)
class StitchSelection:
    """Stitches that a rule chose, cheapest first; iterates and indexes as a sequence of `Stitch`.

    Attributes:
        rule: name of the rule.
        stitches: the choice.
        macs: MACs of each.
        values: score of each, lower is better; nan where the rule uses no score.
        buckets: cost bucket of each among those of its pair of anchors, from 0; -1 where the rule uses no buckets.
        candidates: number of stitches inside the anchors' cost range that were considered.
        outside: number of stitches dropped because they cost less than the source or more than the target.

    Example:
        >>> selection = select_stitches(scores, buckets=4)
        >>> list(selection.macs) == sorted(selection.macs), selection[0] in selection.stitches
        (True, True)
        >>> [str(stitch) for stitch in selection.best_per_bucket().spread(2)]
        ['(2, 3)', '(1, 1)']
    """

    rule: str
    stitches: tuple[Stitch, ...]
    macs: tuple[int, ...]
    values: tuple[float, ...]
    buckets: tuple[int, ...]
    candidates: int
    outside: int

    def __len__(self) -> int:
        return len(self.stitches)

    def __iter__(self) -> Iterator[Stitch]:
        return iter(self.stitches)

    def __getitem__(self, index: int) -> Stitch:
        return self.stitches[index]

    def best_per_bucket(self) -> "StitchSelection":
        """Keep the lowest value of each bucket of each pair of anchors (τ = 0)."""
        best: dict[tuple[int, int, int], int] = {}
        for place, (stitch, number) in enumerate(zip(self.stitches, self.buckets, strict=True)):
            bucket = stitch.source, stitch.target, number
            if bucket not in best or self.values[place] < self.values[best[bucket]]:
                best[bucket] = place
        return self.take(sorted(best.values()))

    def spread(self, count: int) -> "StitchSelection":
        """Keep `count` stitches, evenly spaced in rank by cost; all where there are fewer."""
        places = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        return self.take(sorted(set(places.tolist())))

    def take(self, places: Sequence[int]) -> "StitchSelection":
        """Keep the stitches at these places, in this order."""

        def pick(field: tuple) -> tuple:
            return tuple(field[place] for place in places)

        fields = pick(self.stitches), pick(self.macs), pick(self.values), pick(self.buckets)
        return StitchSelection(self.rule, *fields, self.candidates, self.outside)


def merge_selections(selections: Sequence[StitchSelection], rule: str | None = None) -> StitchSelection:
    """The union of several selections, cheapest first, each stitch once with the value and bucket it first has.

    Args:
        selections: of several pairs of anchors, say. `candidates` and `outside` are summed.
        rule: name of the union; None takes the one that all selections have.

    Returns:
        The union; `values` are comparable only where they are of one score.

    Raises:
        ValueError: no selection, or rules that differ and no name for the union.

    Example:
        >>> both = merge_selections([select_stitches(scores), esta_stitches(costs)], rule="klas or esta")
        >>> both.rule, len(both) == len({*select_stitches(scores), *esta_stitches(costs)})
        ('klas or esta', True)
    """
    rules = sorted({one.rule for one in selections})
    if not rules or (rule is None and len(rules) > 1):
        raise ValueError(
            f"got {len(selections)} selections of the rules {rules}; expected at least one selection, and one rule. "
            "Name a union of several with rule=…"
        )
    rows: dict[Stitch, tuple[int, float, int]] = {}
    for one in selections:
        for stitch, row in zip(one.stitches, zip(one.macs, one.values, one.buckets, strict=True), strict=True):
            rows.setdefault(stitch, row)
    order = sorted(rows, key=lambda stitch: rows[stitch][0])
    macs, values, buckets = zip(*(rows[stitch] for stitch in order), strict=True) if order else ((), (), ())
    candidates, outside = sum(one.candidates for one in selections), sum(one.outside for one in selections)
    return StitchSelection(rule or rules[0], tuple(order), macs, values, buckets, candidates, outside)


@dataclass(frozen=True)
class Overlap:
    """How many stitches two selections share (KLAS Tab. 4), and how many each has."""

    common: int
    of_first: int
    of_second: int


def overlap(first: Iterable[Stitch], second: Iterable[Stitch]) -> Overlap:
    """Count the stitches that two rules agree on; a stitch counts once."""
    one, other = set(first), set(second)
    return Overlap(len(one & other), len(one), len(other))


def recovery(selection: Iterable[Stitch], viable: Iterable[Stitch]) -> float:
    """Share of the viable stitches that a rule has chosen (KLAS Tab. 1), 0 to 1.

    Raises:
        ValueError: no stitch is viable.
    """
    found = overlap(selection, viable)
    if not found.of_second:
        raise ValueError("got no viable stitch; expected at least one to recover")
    return found.common / found.of_second


def select_stitches(
    scores: StitchScores | Sequence[StitchScores],
    *,
    buckets: int = 20,
    threshold: float = 0.05,
    spacing: Spacing = "width",
    absolute: bool = False,
) -> StitchSelection:
    """KLAS selection (Alg. 3): in each cost bucket keep every stitch whose score is near the bucket's lowest.

    Args:
        scores: scores and costs of all candidates; of several pairs of anchors, each bucketed by itself.
        buckets: number of cost buckets between the anchors' MACs. There may be more than candidates; empty ones
            give nothing.
        threshold: τ of Eq. 3. Relative, as the paper's text has it: keep score <= (1 + τ) · lowest.
        spacing: buckets of equal "width" in MACs (the paper), or of equal candidate counts ("quantile").
        absolute: keep score <= lowest + τ instead, as the printed Eq. 3 can be read.

    Returns:
        The choice, cheapest first; its rule is the name of the score.

    Raises:
        ValueError: fewer than one bucket, a negative threshold, or no candidate between the anchors' costs.

    Example:
        >>> selection = select_stitches(scores, buckets=2, threshold=0.05)
        >>> selection.rule, [str(stitch) for stitch in selection], selection.buckets
        ('klas', ['(2, 3)', '(3, 3)', '(2, 2)', '(1, 1)'], (0, 1, 1, 1))
    """
    if not threshold >= 0:
        raise ValueError(f"got threshold={threshold}; expected 0 or more")
    if not isinstance(scores, StitchScores):
        each = [
            select_stitches(one, buckets=buckets, threshold=threshold, spacing=spacing, absolute=absolute)
            for one in scores
        ]
        return merge_selections(each)
    every = _Candidates.scored(scores)
    bucket = every.buckets(buckets, spacing)
    keep = near_bucket_minimum(every.values, bucket, threshold, absolute)
    return every.selection(scores.score, keep, bucket[keep])


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
    every = _Candidates.scored(scores)
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
        every = _Candidates.scored(one)
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
        every = _Candidates.scored(one)
        bucket = every.buckets(buckets, "width")
        order = np.lexsort((every.values, bucket))
        rank = np.arange(len(order)) - np.searchsorted(bucket[order], bucket[order])
        keep = order[rank < per_bucket]
        each.append(every.selection(one.score, keep, bucket[keep]))
    return merge_selections(each)


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


def esta_stitches(costs: StitchCosts, *, mapping: Mapping = "proportional") -> StitchSelection:
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
    every = _Candidates.of(costs, chosen)
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
        every = _Candidates.of(one, has_probe)
        bucket = every.buckets(buckets, spacing)
        shuffled = generator.permutation(len(bucket))
        order = shuffled[np.argsort(bucket[shuffled], kind="stable")]
        first_of_bucket = np.searchsorted(bucket[order], bucket[order])
        keep = order[np.arange(len(order)) - first_of_bucket < per_bucket]
        each.append(every.selection("random", keep, bucket[keep]))
    return merge_selections(each)


def bucket_of(macs: NDArray, low: int, high: int, buckets: int, spacing: Spacing = "width") -> NDArray[np.int64]:
    """Bucket index (0 … buckets - 1) of each cost; the last bucket contains `high`. Buckets may be empty.

    Args:
        macs: `(candidates,)` integers, each between `low` and `high`.

    Raises:
        ValueError: fewer than one bucket, or an unknown spacing.
    """
    if buckets < 1:
        raise ValueError(f"got buckets={buckets}; expected at least 1")
    if spacing == "width":
        bucket = (macs - low) * buckets // max(high - low, 1)
    elif spacing == "quantile":
        bucket = np.searchsorted(np.sort(macs), macs, side="left") * buckets // len(macs)
    else:
        raise ValueError(f"got spacing={spacing!r}; expected 'width' or 'quantile'")
    return np.minimum(bucket, buckets - 1)


def near_bucket_minimum(
    values: NDArray, bucket: NDArray[np.int64], threshold: float, absolute: bool = False
) -> NDArray[np.int64]:
    """Eq. 3: positions of the values within the threshold of the lowest value of their bucket."""
    lowest = np.full(bucket.max(initial=-1) + 1, np.inf)
    np.minimum.at(lowest, bucket, values)
    lowest = lowest[bucket]
    limit = lowest + threshold if absolute else lowest + threshold * np.abs(lowest)
    return np.flatnonzero(values <= limit)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """What a rule chooses from: the possible stitches of two anchors that cost no less and no more than these do.

    Attributes:
        costs: of the anchors.
        rows, columns, values: `(candidates,)` place in `costs.macs`, and score (nan for none), of each.
        outside: number of stitches that were left out for their cost.
    """

    costs: StitchCosts
    rows: NDArray
    columns: NDArray
    values: NDArray
    outside: int

    @classmethod
    def of(cls, costs: StitchCosts, considered: NDArray[np.bool_], values: NDArray | None = None) -> "_Candidates":
        """`considered`: `(m, n)` which stitches the rule looks at; those that cannot be made are none of them."""
        costs.check_direction()
        considered = considered & costs.possible
        inside = (costs.macs >= costs.source_total) & (costs.macs <= costs.target_total)
        rows, columns = np.nonzero(considered & inside)
        if not len(rows):
            raise ValueError(
                f"got no stitch between the anchors' costs, {costs.source_total:,} and {costs.target_total:,} MACs, "
                f"among {int(considered.sum())} candidates; expected anchors of different sizes whose blocks differ "
                "in cost, so that some stitch lies between them"
            )
        scores = np.full(len(rows), np.nan) if values is None else values[rows, columns]
        return cls(costs, rows, columns, scores, int((considered & ~inside).sum()))

    @classmethod
    def scored(cls, scores: StitchScores) -> "_Candidates":
        """Every stitch that has a finite score."""
        return cls.of(scores.costs, np.isfinite(values := scores.values), values)

    @property
    def macs(self) -> NDArray:
        return self.costs.macs[self.rows, self.columns]

    def buckets(self, count: int, spacing: Spacing) -> NDArray[np.int64]:
        return bucket_of(self.macs, self.costs.source_total, self.costs.target_total, count, spacing)

    def selection(self, rule: str, keep: NDArray[np.int64], buckets: NDArray | None = None) -> StitchSelection:
        """The candidates at the places `keep`, cheapest first; `buckets` is the bucket of each of these."""
        buckets = np.full(len(keep), -1) if buckets is None else buckets
        macs = self.macs[keep]
        order = np.argsort(macs, kind="stable")
        keep = keep[order]
        places = zip(self.rows[keep].tolist(), self.columns[keep].tolist(), strict=True)
        return StitchSelection(
            rule,
            tuple(Stitch(i + 1, j, self.costs.source, self.costs.target) for i, j in places),
            tuple(macs[order].tolist()),
            tuple(self.values[keep].tolist()),
            tuple(buckets[order].tolist()),
            len(self.rows),
            self.outside,
        )
