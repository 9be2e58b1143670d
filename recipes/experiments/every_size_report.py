"""What the study of every size found: who is best at each cost, by how much, and whether functional KL foretold it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import hypot, isnan
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.beside import QUANTISED, cascade
from experiments.every_size import ANCHORS, EQUAL, OURS, EverySize
from klas_hf.curves.regret import lowest_per_bucket
from klas_hf.curves.tradeoff import TradeoffCurve, higher_is_better, plot_curves
from klas_hf.files import write_atomically
from klas_hf.maths.correlations import spearman
from klas_hf.maths.estimates import RatioSums
from klas_hf.paths import Path
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow
from klas_hf.scores.path_scores import kind_of
from klas_hf.tables import format_mean, markdown_table, mean_and_error

Rows = list[ResultRow]


@dataclass(frozen=True)
class Advantage:
    """By how much ours is better than a rival at one cost, or in the mean over several.

    Attributes:
        rival: its rule.
        by: difference of the means over seeds, in the metric's unit; above 0 where ours is better.
        of_seeds: its standard error over seeds, paired where both have the same; 0 of one seed.
        items: the difference on each test image or sequence.
        weights: of these.
        equal: whether the rival costs as much, within 2 %, under every seed.
    """

    rival: str
    by: float
    of_seeds: float
    items: NDArray[np.float64]
    weights: NDArray[np.float64]
    equal: bool

    @property
    def error(self) -> float:
        """Standard error over seeds and test items, which are paired; on the large side: what a seed does to single
        items counts in both."""
        sums = RatioSums(())
        sums.update(self.weights * self.items, self.weights)
        return hypot(self.of_seeds, float(sums.standard_error))

    def __str__(self) -> str:
        told = f"{self.by:+.4f}"
        return f"{told} ± {self.error:.4f} ({self.by / self.error:+.1f} errors)" if self.error > 0 else told

    @classmethod
    def mean(cls, each: Sequence["Advantage"]) -> "Advantage":
        """Over a rival at several costs, on the same test items."""
        of_seeds = hypot(*(one.of_seeds for one in each)) / len(each)
        items = np.mean([one.items for one in each], axis=0)
        equal = all(one.equal for one in each)
        return cls(each[0].rival, fmean(one.by for one in each), of_seeds, items, each[0].weights, equal)


class Foretold(NamedTuple):
    """A model's bucket, functional KL of its start and of its path as the search scores it, and its mean quality.

    A loss counts negatively.
    """

    bucket: int
    start: float
    score: float
    quality: float


class Outcome:
    """All that was measured at one length of healing.

    Args:
        study: of one family, whose rows at this length and at length 0 are there.
        length: optimiser steps.

    Attributes:
        rows: bucket → rule → its rows, one per seed; where nothing is trained, one per model.
        anchors: rows of the cheap and of the dear anchor.
    """

    def __init__(self, study: EverySize, length: int):
        self.study, self.length = study, length
        self.metric = study.family.metric
        self.sign = 1.0 if higher_is_better(self.metric) else -1.0
        chosen = {seed: study.chosen(length, seed) for seed in study.settings.seeds}
        self.rows: list[dict[str, Rows]] = []
        for bucket in range(study.settings.buckets):
            of_bucket: dict[str, dict[str, ResultRow]] = {}
            for seed, by_bucket in chosen.items():
                for rule, choice in by_bucket[bucket].items():
                    row = study.row(rule, choice, length, seed)
                    of_bucket.setdefault(rule, {})[row.measurement] = row
            self.rows.append({rule: list(rows.values()) for rule, rows in of_bucket.items()})
        pairs = [study.anchor_rows(length, seed) for seed in (study.settings.seeds if length else [0])]
        self.anchors: tuple[Rows, Rows] = [small for small, _ in pairs], [large for _, large in pairs]

    def values(self, rows: Rows) -> list[float]:
        return [row.value(self.metric) for row in rows]

    def line(self, bucket: int) -> list[float] | None:
        """The straight line between the anchors at the cost of ours, by seed; None outside it."""
        share = self.along(bucket)
        if share is None:
            return None
        return [(1 - share) * a + share * b for a, b in zip(*map(self.values, self.anchors), strict=True)]

    def cascade(self, bucket: int) -> list[float] | None:
        """The best cascade of the anchors at no more than the cost of ours, by seed; None below the cheap one."""
        most = self.rows[bucket][OURS][0].macs
        if most < self.anchors[0][0].macs:
            return None
        points = [cascade(small, large) for small, large in zip(*self.anchors, strict=True)]
        return [self.sign * max(self.sign * one.quality for one in each if one.macs <= most) for each in points]

    def closed(self, bucket: int) -> float | None:
        """Share of the gap between the anchors' means that ours closes; None where there is no gap."""
        small, large = (fmean(self.values(rows)) for rows in self.anchors)
        ours = fmean(self.values(self.rows[bucket][OURS]))
        return (ours - small) / (large - small) if abs(large - small) > 1e-9 else None

    def advantages(self, bucket: int) -> list[Advantage]:
        """Of ours over every rival in a bucket, the strongest first; 0 where a rival takes the same model."""
        ours = self.rows[bucket][OURS]
        found = [self._advantage(rule, ours, rows) for rule, rows in self.rows[bucket].items() if rule != OURS]
        return sorted(found, key=lambda one: one.by)

    def _advantage(self, rule: str, ours: Rows, rows: Rows) -> Advantage:
        weights = np.array(self.anchors[0][0].details["items"]["weights"])
        if [row.measurement for row in rows] == [row.measurement for row in ours]:
            return Advantage(rule, 0.0, 0.0, np.zeros(len(weights)), weights, equal=True)
        values, others = self.values(ours), self.values(rows)
        if [row.seed for row in ours] == [row.seed for row in rows]:  # which sees the same batches in one order
            _, error = mean_and_error([a - b for a, b in zip(values, others, strict=True)])
            pairs = list(zip(ours, rows, strict=True))
        else:
            error = hypot(*(mean_and_error(each)[1] for each in (values, others)))
            pairs = list(product(ours, rows))
        items, of_items = (np.mean([row.details["items"]["quality"] for row in each], axis=0) for each in (ours, rows))
        by, of_seeds = self.sign * (fmean(values) - fmean(others)), 0.0 if isnan(error) else error
        equal = all(abs(one.macs - other.macs) <= EQUAL * one.macs for one, other in pairs)
        return Advantage(rule, by, of_seeds, self.sign * (items - of_items), weights, equal)

    @cached_property
    def models(self) -> list[Foretold]:
        """Every model once."""
        found: dict[tuple[int, str, str], Rows] = {}
        for bucket, of_bucket in enumerate(self.rows):
            for rows in of_bucket.values():
                for row in rows:
                    if row.joints:
                        found.setdefault((bucket, str(row.path), row.setting["joint"]), []).append(row)
        starts = {(row.path, row.setting["joint"]): row for row in self.study.rows if "divergence" in row.metrics}
        return [
            Foretold(
                bucket, starts[path, joint].metrics["divergence"], self.study.score(Path.parse(path)),
                self.sign * fmean(self.values(_once(rows))),
            )
            for (bucket, path, joint), rows in found.items()
        ]  # fmt: skip

    @property
    def spearman(self) -> tuple[float, float]:
        """Of functional KL, of the start and of the score, with the loss of quality over all models; 1 is best."""
        distinct = sorted({one[1:] for one in self.models})
        starts, scores, qualities = zip(*distinct, strict=True)
        lost = [-quality for quality in qualities]
        return spearman(starts, lost), spearman(scores, lost)

    @property
    def regrets(self) -> list[float]:
        """By bucket, how far the model of least functional KL lies below the best one, in the metric's unit."""
        bucket, divergence, _, quality = (np.array(column) for column in zip(*self.models, strict=True))
        picked, best = (quality[lowest_per_bucket(one, bucket)] for one in (divergence, -quality))
        return [float(one) for one in best - picked]

    def along(self, bucket: int) -> float | None:
        """Where the cost of ours lies between those of the anchors, 0 to 1; None outside them."""
        ours, small, large = (rows[0].macs for rows in (self.rows[bucket][OURS], *self.anchors))
        share = (ours - small) / (large - small)
        return share if 0 <= share <= 1 else None


def report(study: EverySize, lengths: Sequence[int]) -> str:
    """The study as Markdown, in `report.md` too, with a picture per length; all its rows must be there."""
    parts = [f"# The best model of every size: {study.family.name}", _about(study)]
    for length in lengths:
        outcome = Outcome(study, length)
        name = f"{length} steps" if length else "the least-squares start"
        parts += [
            f"## {name}", f"{outcome.metric} by share of the dear anchor's MACs (the cost of each in brackets):",
            qualities(outcome), "What the search offers, beside the best rival and the straight line:", offers(outcome),
            "Over all buckets that both reach:", totals(outcome), foretold(outcome), in_few_bits(outcome),
        ]  # fmt: skip
        if process_state().is_main_process:
            plot(outcome, name)
    text = "\n\n".join(parts) + "\n"
    if process_state().is_main_process:
        write_atomically(study.output / "report.md", lambda part: part.write_text(text, encoding="utf-8"))
    return text


def qualities(outcome: Outcome) -> str:
    """A row per rule, a column per bucket: mean ± standard error over seeds."""
    study = outcome.study
    edges = study.edges / study.dearest
    lines = [["rule", *(f"{low:.0%}–{high:.0%}" for low, high in zip(edges, edges[1:], strict=False))]]
    for rule in (OURS, *study.settings.rivals):
        cells = [one.get(rule) for one in outcome.rows]
        if any(cells):
            lines.append([rule, *(_cell(outcome, rows) if rows else "–" for rows in cells)])
    between = [outcome.line(n) if of_bucket else None for n, of_bucket in enumerate(outcome.rows)]
    lines.append(["straight line", *(format_mean(one) if one else "–" for one in between)])
    cascades = [outcome.cascade(n) if of_bucket else None for n, of_bucket in enumerate(outcome.rows)]
    lines.append(["cascade of the anchors", *(format_mean(one) if one else "–" for one in cascades)])
    small, large = (_cell(outcome, rows) for rows in outcome.anchors)
    return f"{markdown_table(lines)}\n\nThe anchors, {_treated(outcome)}: {small} and {large}."


def offers(outcome: Outcome) -> str:
    """A row per bucket: our path, the share of the gap that it closes, and its advantage over the best rival."""
    lines = [["cost", "path", "kind", "closes of the gap", "line closes", "best rival", "ours better by"]]
    for bucket, of_bucket in enumerate(outcome.rows):
        if not of_bucket:
            continue
        ours, best = of_bucket[OURS][0], next(iter(outcome.advantages(bucket)), None)
        closed, along = (
            "–" if share is None else f"{share:.0%}" for share in (outcome.closed(bucket), outcome.along(bucket))
        )
        path, rival = Path.of(str(ours.path)), (best.rival, str(best)) if best else ("–", "–")
        lines.append([f"{ours.macs / outcome.study.dearest:.1%}", str(path), kind_of(path), closed, along, *rival])
    return markdown_table(lines)


def totals(outcome: Outcome) -> str:
    """A row per rival: mean advantage of ours over the buckets, and in how many it is not behind by over one error.

    And the mean over those buckets alone in which the rival has a path as dear as ours.
    """
    by_rival: dict[str, list[Advantage]] = {}
    for bucket, of_bucket in enumerate(outcome.rows):
        for one in outcome.advantages(bucket) if of_bucket else []:
            by_rival.setdefault(one.rival, []).append(one)
    lines = [
        ["rival", "buckets", "ours better by, mean", "ours better in", "no worse within one error in"]
        + ["of equal cost", "ours better by there"]
    ]
    for rival, each in sorted(by_rival.items(), key=lambda pair: fmean(one.by for one in pair[1])):
        within = sum(one.by >= -one.error for one in each)
        alike = [one for one in each if one.equal]
        lines.append(
            [rival, str(len(each)), _mean(each), str(sum(one.by > 0 for one in each)), str(within)]
            + [str(len(alike)), _mean(alike) if alike else "–"]
        )
    return markdown_table(lines)


def foretold(outcome: Outcome) -> str:
    """How well functional KL at the start foretells the quality."""
    if len(outcome.models) < 3:
        return f"{len(outcome.models)} models: too few to correlate with functional KL."
    regrets, count = outcome.regrets, len({one[1:] for one in outcome.models})
    start, score = outcome.spearman
    return (
        f"Functional KL of the start against quality here: Spearman {start:.3f} over {count} models of every kind; "
        f"regret per bucket {fmean(regrets):.4f} in the mean, {max(regrets):.4f} at most. As the search scores these "
        f"paths, with joints at least squares however they were joined: Spearman {score:.3f}."
    )


def in_few_bits(outcome: Outcome) -> str:
    """The dear anchor with its blocks' linear layers quantised: as many MACs, fewer bytes."""
    rows = outcome.anchors[1]
    known = [name for name in QUANTISED if name in rows[0].details["quantised"]]
    if not known:
        return "The dear anchor was not quantised: that takes torchao, and most of its weights in linear layers."
    told = []
    for name in known:
        found = [row.details["quantised"][name] for row in rows]
        quality = format_mean([one["quality"] for one in found])
        told.append(f"{quality} in {name} ({found[0]['bytes']:.0%} of its bytes at 16 bits)")
    return f"The dear anchor quantised afterwards, of all its MACs: {', '.join(told)}."


def plot(outcome: Outcome, name: str) -> None:
    """Quality against MACs of every rule, and the straight line between the anchors."""
    better = outcome.sign > 0
    draw: Callable[[Rows, str], TradeoffCurve] = lambda rows, label: TradeoffCurve(  # noqa: E731
        rows, outcome.metric, higher_is_better=better, label=label
    )
    curves = [draw([*outcome.anchors[0], *outcome.anchors[1]], ANCHORS)]
    for rule in (*outcome.study.settings.rivals, OURS):  # ours above all
        rows = _once([row for of_bucket in outcome.rows for row in of_bucket.get(rule, [])])
        if rows:
            curves.append(draw(rows, rule))
    title = f"{outcome.study.family.name}, {name}"
    plot_curves(curves, title=title, path=outcome.study.output / f"curve-{outcome.length}")


def _about(study: EverySize) -> str:
    seeds, least = len(study.settings.seeds), study.edges[0] / study.dearest
    text = (
        f"{study.settings.buckets} buckets from {least:.0%} to 100 % of the dear anchor's {study.dearest / 1e6:,.2f} "
        f"M MACs, {seeds} seed(s). Qualities are means ± standard errors over seeds; what ours is better by has its "
        "standard error over seeds and test items, both paired. Rivals stand at the cost of ours where they have a "
        f"path of it (± {EQUAL:.0%}), else at the nearest one in the bucket."
    )
    return text + "".join(f"\n\n{rule} chooses nothing here: {why}." for rule, why in study.absent.items())


def _mean(each: Sequence[Advantage]) -> str:
    mean = Advantage.mean(each)
    return f"{mean.by:+.4f} ± {mean.error:.4f}"


def _treated(outcome: Outcome) -> str:
    return f"healed for {outcome.length} steps" if outcome.length else "as they are"


def _once(rows: Rows) -> Rows:
    """Rows of several rules, each measurement once."""
    return list({row.measurement: row for row in rows}.values())


def _cell(outcome: Outcome, rows: Rows) -> str:
    shares = sorted({row.macs / outcome.study.dearest for row in rows})
    told = "–".join(dict.fromkeys(f"{share:.1%}" for share in (shares[0], shares[-1])))
    return f"{format_mean(outcome.values(rows))} ({told})"
