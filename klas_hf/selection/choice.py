"""Stitches that a rule has chosen, and what any rule chooses from.

Candidates that cost less than the source or more than the target are no interpolation between the anchors: they are
dropped, and counted.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klas_hf.maths.buckets import Spacing, bucket_of
from klas_hf.paths import Path, Stitch
from klas_hf.scores.values import StitchScores
from klas_hf.stitch_costs import StitchCosts


@dataclass(frozen=True)
class PathSelection:
    """Paths that a rule chose, cheapest first; iterates and indexes as a sequence of `Path`.

    Attributes:
        paths: the choice.
        macs: MACs of each.
        values: score of each, lower is better; nan where the rule uses no score.
        rule: name of the rule.
        joint: what the rule joins slices by, for `StitchedModel.from_path`.

    Example:
        >>> chosen = shortgpt_paths(target, batches)
        >>> model = StitchedModel.from_path([target], chosen[0], joint=chosen.joint, calibration=batches)
        >>> model.config.path == str(chosen.paths[0]), chosen.macs[0] == measure_costs(model).macs
        (True, True)
    """

    paths: tuple[Path, ...]
    macs: tuple[int, ...]
    values: tuple[float, ...]
    rule: str
    joint: str = "least_squares"

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def __getitem__(self, index: int) -> Path:
        return self.paths[index]


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

    def as_paths(self) -> PathSelection:
        """The same as any rule that chooses paths returns it."""
        return PathSelection(tuple(stitch.path for stitch in self.stitches), self.macs, self.values, self.rule)

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


@dataclass(frozen=True, eq=False)
class Candidates:
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
    def of(cls, costs: StitchCosts, considered: NDArray[np.bool_], values: NDArray | None = None) -> "Candidates":
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
    def scored(cls, scores: StitchScores) -> "Candidates":
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
