"""Which stitches to make: KLAS selection (Alg. 3, Eq. 3) and the rules it is compared with.

Every rule returns a `StitchSelection`. Candidates that cost less than the source or more than the target are no
interpolation between the anchors: they are dropped, and counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from klas_hf.scores import StitchScores
from klas_hf.stitches import Stitch, StitchCosts

Spacing = Literal["width", "quantile"]
Mapping = Literal["index", "proportional"]


@dataclass(frozen=True)
class StitchSelection:
    """Stitches that a rule chose, cheapest first. Iterates and indexes as a sequence of `Stitch`.

    Attributes:
        rule: name of the rule.
        stitches: the choice.
        macs: MACs of each.
        values: score of each, lower is better; nan where the rule uses no score.
        buckets: cost bucket of each, from 0; -1 where the rule uses no buckets.
        candidates: number of stitches inside the anchors' cost range that were considered.
        outside: number of stitches dropped because they cost less than the source or more than the target.
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
        """Keep the lowest value of each bucket (τ = 0)."""
        best: dict[int, int] = {}
        for place, (bucket, value) in enumerate(zip(self.buckets, self.values, strict=True)):
            if bucket not in best or value < self.values[best[bucket]]:
                best[bucket] = place
        return self._take(sorted(best.values()))

    def spread(self, count: int) -> "StitchSelection":
        """Keep `count` stitches, evenly spaced in rank by cost; all where there are fewer."""
        places = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        return self._take(sorted(set(places.tolist())))

    def _take(self, places: list[int]) -> "StitchSelection":
        def pick(field: tuple) -> tuple:
            return tuple(field[place] for place in places)

        return StitchSelection(
            self.rule,
            pick(self.stitches),
            pick(self.macs),
            pick(self.values),
            pick(self.buckets),
            self.candidates,
            self.outside,
        )


def select_stitches(
    scores: StitchScores,
    *,
    buckets: int = 20,
    threshold: float = 0.05,
    spacing: Spacing = "width",
    absolute: bool = False,
) -> StitchSelection:
    """KLAS selection (Alg. 3): in each cost bucket keep every stitch whose score is near the bucket's lowest.

    Args:
        scores: scores and costs of all candidates.
        buckets: number of cost buckets between the anchors' MACs.
        threshold: τ of Eq. 3. Relative, as the paper's text has it: keep score <= (1 + τ) · lowest.
        spacing: buckets of equal "width" in MACs (the paper), or of equal candidate counts ("quantile").
        absolute: keep score <= lowest + τ instead, as the printed Eq. 3 can be read.

    Raises:
        ValueError: fewer than one bucket, a negative threshold, or no candidate between the anchors' costs.
    """
    if not threshold >= 0:
        raise ValueError(f"got threshold={threshold}; expected 0 or more")
    rows, columns, outside = _inside(scores.costs, np.isfinite(scores.values))
    macs, values = scores.costs.macs[rows, columns], scores.values[rows, columns]
    bucket = bucket_of(macs, scores.costs.source_total, scores.costs.target_total, buckets, spacing)
    keep = near_bucket_minimum(values, bucket, threshold, absolute)
    places = rows[keep], columns[keep]
    return _selection(scores.score, *places, macs[keep], values[keep], bucket[keep], len(rows), outside)


def match_stitches(scores: StitchScores, reference: StitchSelection, *, tolerance: float = 0.05) -> StitchSelection:
    """For each stitch of another rule, the best-scored one of about its size: a comparison at equal cost.

    Args:
        scores: scores and costs of all candidates.
        reference: what to match, such as ESTA's stitches.
        tolerance: a match costs at most what the reference costs, and at least (1 - tolerance) times that.

    Returns:
        One match per reference stitch, cheapest first, a stitch twice where it matches two. The reference stitch
        itself is among the candidates.
    """
    rows, columns, outside = _inside(scores.costs, np.isfinite(scores.values))
    macs, values = scores.costs.macs[rows, columns], scores.values[rows, columns]
    near = [np.flatnonzero((macs <= cost) & (macs >= (1 - tolerance) * cost)) for cost in reference.macs]
    keep = np.array([places[np.argmin(values[places])] for places in near if len(places)], dtype=np.int64)
    none = np.full(len(keep), -1)
    return _selection(scores.score, rows[keep], columns[keep], macs[keep], values[keep], none, len(rows), outside)


def min_kl_stitches(scores: StitchScores, count: int) -> StitchSelection:
    """Min-KL, the paper's ablation (App. C): the `count` stitches of lowest Θ, with no capacity and no buckets."""
    if count < 1:
        raise ValueError(f"got count={count}; expected at least 1")
    theta = scores.cross[:, :-1]
    rows, columns, outside = _inside(scores.costs, np.isfinite(_after_first(theta)))
    values = _after_first(theta)[rows, columns]
    lowest = np.argsort(values, kind="stable")[:count]
    macs = scores.costs.macs[rows, columns]
    none = np.full(len(lowest), -1)
    return _selection("min_kl", rows[lowest], columns[lowest], macs[lowest], values[lowest], none, len(rows), outside)


def esta_stitches(costs: StitchCosts, *, mapping: Mapping = "proportional") -> StitchSelection:
    """ESTA: by layer count, the first i blocks of the small anchor and the rest of the large one.

    Args:
        costs: costs of all candidates.
        mapping: which target block stands at the depth of source block i of m, the target having n blocks:
            "index" takes j = i, "proportional" j = round(i · n / m). He et al. (2024) do not say; both are run.
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
    rows, columns, outside = _inside(costs, chosen)
    macs = costs.macs[rows, columns]
    unscored = np.full(len(rows), np.nan)
    none = np.full(len(rows), -1)
    return _selection(f"esta_{mapping}", rows, columns, macs, unscored, none, len(rows), outside)


def random_stitches(
    costs: StitchCosts, *, buckets: int = 20, per_bucket: int = 1, seed: int = 0, spacing: Spacing = "width"
) -> StitchSelection:
    """Uniform choice of `per_bucket` stitches in each cost bucket, the floor that any rule must beat.

    Only stitches with target_start >= 1 are drawn: the candidates of KLAS. A bucket that holds fewer gives all it has.
    """
    if per_bucket < 1:
        raise ValueError(f"got per_bucket={per_bucket}; expected at least 1")
    rows, columns, outside = _inside(costs, _after_first(np.ones((costs.macs.shape[0], costs.macs.shape[1] - 1))) == 1)
    macs = costs.macs[rows, columns]
    bucket = bucket_of(macs, costs.source_total, costs.target_total, buckets, spacing)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(rows))
    order = shuffled[np.argsort(bucket[shuffled], kind="stable")]
    first_of_bucket = np.searchsorted(bucket[order], bucket[order])
    keep = order[np.arange(len(order)) - first_of_bucket < per_bucket]
    unscored = np.full(len(keep), np.nan)
    return _selection("random", rows[keep], columns[keep], macs[keep], unscored, bucket[keep], len(rows), outside)


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


def _inside(costs: StitchCosts, candidates: NDArray[np.bool_]) -> tuple[NDArray, NDArray, int]:
    """Rows and columns of the candidates between the anchors' costs, and how many others there are."""
    costs.check_direction()
    inside = (costs.macs >= costs.source_total) & (costs.macs <= costs.target_total)
    rows, columns = np.nonzero(candidates & inside)
    if not len(rows):
        raise ValueError(
            f"got no stitch between the anchors' costs, {costs.source_total:,} and {costs.target_total:,} MACs, "
            f"among {int(candidates.sum())} candidates; expected anchors of different sizes whose blocks differ in "
            "cost, so that some stitch lies between them"
        )
    return rows, columns, int((candidates & ~inside).sum())


def _after_first(matrix: NDArray) -> NDArray:
    """Lay an (m, n - 1) matrix over j = 1…n-1 out as the (m, n) of StitchCosts, with nan at j = 0."""
    return np.pad(matrix, ((0, 0), (1, 0)), constant_values=np.nan)


def _selection(
    rule: str,
    rows: NDArray,
    columns: NDArray,
    macs: NDArray,
    values: NDArray,
    buckets: NDArray,
    candidates: int,
    outside: int,
) -> StitchSelection:
    order = np.argsort(macs, kind="stable")
    stitches = tuple(Stitch(int(i) + 1, int(j)) for i, j in zip(rows[order], columns[order], strict=True))
    return StitchSelection(
        rule,
        stitches,
        tuple(macs[order].tolist()),
        tuple(values[order].tolist()),
        tuple(buckets[order].tolist()),
        candidates,
        outside,
    )
