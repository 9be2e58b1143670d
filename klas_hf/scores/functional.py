"""Functional KL: what a stitched network answers at its least-squares start, against what the target answers.

    F(i, j) = mean over x of KL(target(x) ‖ stitched_ij(x)),  stitched_ij by the least-squares map of block i to block j

No probes, no labels, no training. One pass over the calibration data gives the normal equations of all pairs of blocks
at once (a Gram matrix per block, a cross-Gram matrix per pair), from which all maps are solved. Then, on each batch of
held-out data, both anchors run once, and the rears of all stitches that enter the target at one block run together.
Where the matrices of all pairs do not fit into the memory allowed, pairs are taken in groups, one pass for each. Where
there are many pairs, all are measured on a few items, and those that do best at their cost on all.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klas_hf.anchors.anchor import Anchor, hidden_of
from klas_hf.anchors.fitting import fit_stitches, fitted_joint
from klas_hf.anchors.streaming import Gathered, stream
from klas_hf.anchors.weights import evaluating
from klas_hf.maths.buckets import best_of_buckets, bucket_of
from klas_hf.maths.estimates import RatioSums
from klas_hf.maths.least_squares import LinearFit, warn_of_few_rows
from klas_hf.maths.similarities import PairMoments
from klas_hf.paths import Stitch
from klas_hf.processes import sum_array_over_processes
from klas_hf.scores.answers import Reference
from klas_hf.scores.functional_settings import FunctionalScoring, calibration_and_scored, enough_rows
from klas_hf.stitch_costs import StitchCosts

Array = NDArray[np.float64]
Pair = tuple[int, int]
Anchors = tuple[Anchor, Anchor]  # source and target
BUCKETS = 20  # by cost, of which each keeps its best stitches
SCREENED = 0.25  # share of the scored batches on which all candidates are measured first


@dataclass(frozen=True)
class FunctionalResult:
    """What functional scoring found; matrices are `(m, n)` as `StitchScores.cross`, nan where nothing was measured.

    Attributes:
        divergence, divergence_error: functional KL in nats per image or token, at least 0, and its standard error.
        loss: cross-entropy of the stitched networks with the labels, or the next tokens, in nats; None without labels.
        unexplained: 1 − R² of each least-squares map.
        items: images or sequences that the means are over.
        units: images or tokens of these.
        passes: passes over the calibration data, one per group of pairs.
        temperature: that softened both distributions.
        eliminated: candidates that were measured on a few items only, and are nan.
    """

    divergence: Array
    divergence_error: Array
    loss: Array | None
    unexplained: Array
    items: int
    units: int
    passes: int
    temperature: float
    eliminated: int = 0

    def statistics(self) -> dict[str, Array]:
        """As entries of `StitchScores.statistics`."""
        found = {"functional": self.divergence, "functional_error": self.divergence_error, "dm": self.unexplained}
        return found if self.loss is None else found | {"stitched_loss": self.loss}


def score_functionally(
    anchors: Anchors, data: Iterable[Any], costs: StitchCosts, settings: FunctionalScoring
) -> FunctionalResult:
    """Functional KL of the candidates that the settings name, or of all; data and errors as for `score_stitches`."""
    pairs = _candidates(costs, settings)
    calibration, scored = calibration_and_scored(anchors[1], data, settings)
    anchors[1].meet(anchors[:1], calibration)
    kept = pairs
    if settings.candidates is None and settings.survivors is not None and settings.scored_items is not None:
        kept = _survivors(anchors, pairs, list(calibration), list(scored), costs, settings.survivors, settings)
    found = functional_statistics(anchors, kept, calibration, scored, settings)
    return replace(found, eliminated=len(pairs) - len(kept))


def _survivors(
    anchors: Anchors, pairs: list[Pair], calibration: list[Any], scored: list[Any], costs: StitchCosts, count: int,
    settings: FunctionalScoring,
) -> list[Pair]:  # fmt: skip
    """The pairs that go on to all items: of every cost bucket so many, the best on a few.

    Successive halving, as a search over paths screens them.
    """
    if len(pairs) <= BUCKETS * count:
        return pairs
    fitted = calibration[: enough_rows(calibration, max(*anchors[0].widths, *anchors[1].widths))]
    few = scored[: max(1, round(len(scored) * SCREENED))]
    with warnings.catch_warnings():  # what is said of few rows is said again when all are fitted to
        warnings.simplefilter("ignore")
        found = functional_statistics(anchors, pairs, fitted, few, settings)
    macs = np.array([costs.macs[i - 1, j] for i, j in pairs])
    values = np.array([found.divergence[i - 1, j - 1] for i, j in pairs])
    bucket = bucket_of(macs, costs.source_total, costs.target_total, BUCKETS)
    return [pairs[place] for place in best_of_buckets(values, bucket, count)]


def _candidates(costs: StitchCosts, settings: FunctionalScoring) -> list[Pair]:
    """(i, j) of the stitches to score: unless some are named, all with j >= 1 between the anchors' costs."""
    if settings.candidates is None:
        inside = (costs.macs >= costs.source_total) & (costs.macs <= costs.target_total)
        pairs = [(i + 1, j) for i, j in np.argwhere(costs.possible & inside).tolist() if j > 0]
        if not pairs:
            raise ValueError(
                f"got no stitch between the anchors' costs, {costs.source_total:,} and {costs.target_total:,} MACs; "
                "expected anchors of different sizes. Name others with FunctionalScoring(candidates=…)"
            )
        return pairs
    chosen = [
        stitch for stitch in settings.candidates if (stitch.source, stitch.target) == (costs.source, costs.target)
    ]
    for stitch in chosen:
        stitch.check(*costs.macs.shape)
        if stitch.target_start < 1 or not costs.possible[stitch.source_stop - 1, stitch.target_start]:
            raise ValueError(
                f"got the candidate {stitch}; expected stitches between equal grids with target_start >= 1"
            )
    if not chosen:
        raise ValueError("got no candidates between these two anchors; expected at least one")
    return [(stitch.source_stop, stitch.target_start) for stitch in chosen]


def functional_statistics(
    anchors: Anchors,
    pairs: Sequence[Pair],
    calibration: Iterable[Any],
    data: Iterable[Any],
    settings: FunctionalScoring,
) -> FunctionalResult:
    """Functional KL of every pair of blocks asked for; warns where the maps have few calibration rows per feature.

    Args:
        anchors: the two anchors.
        pairs: (i, j) of the stitches, i and j from 1.
        calibration, data: batches, read once for each group of pairs.
        settings: temperature, memory.

    Raises:
        ValueError: nothing to fit to or to score on, a budget below one pair, or activations that are not finite.
    """
    widths = anchors[0].widths, anchors[1].widths
    shape = anchors[0].num_blocks, anchors[1].num_blocks
    divergence, loss, unexplained = RatioSums(shape), RatioSums(shape), np.full(shape, np.nan)
    groups = pair_groups(pairs, widths, settings.moment_bytes)
    fewest: list[tuple[int, int]] = []
    items = units = 0
    for number, group in enumerate(groups):
        of = f" {number + 1} of {len(groups)}" if len(groups) > 1 else ""
        fits = fit_pairs(anchors, group, calibration, settings.ridge, f"calibrating stitches{of}")
        fewest.append(min(((fit.rows, fit.weight.shape[1]) for fit in fits.values()), key=_rows_per_feature))
        for (i, j), fit in fits.items():
            unexplained[i - 1, j - 1] = max(0.0, 1 - fit.r2)
        answers = _StitchedAnswers(anchors, fits, settings)
        items = stream(anchors, data, [answers], f"running stitched networks{of}")
        if not items:
            raise ValueError("got no data to score on; expected batches. Check that an iterator was not used up before")
        for sums, of_group in ((divergence, answers.divergence), (loss, answers.loss)):
            sums.set_moments(sums.moments() + of_group.moments())  # groups have no pair in common
            sums.sequences = items
        units = answers.units
    warn_of_few_rows(*min(fewest, key=_rows_per_feature))
    return FunctionalResult(
        divergence=np.maximum(divergence.value, 0.0),  # rounding; keeps nans
        divergence_error=divergence.standard_error,
        loss=loss.value if np.isfinite(loss.value).any() else None,
        unexplained=unexplained,
        items=items,
        units=units,
        passes=len(groups),
        temperature=settings.temperature,
    )


def _rows_per_feature(fit: tuple[int, int]) -> float:
    return fit[0] / fit[1]


def fit_pairs(
    anchors: Anchors, pairs: Sequence[Pair], calibration: Iterable[Any], ridge: float, description: str
) -> dict[Pair, LinearFit]:
    """The least-squares map of every pair, in the target's dtype, from one pass over the calibration data."""
    groups = [[Stitch(*pair)] for pair in pairs]
    fits = fit_stitches(anchors, groups, calibration, ridge, description, dtype=anchors[1].model.dtype)
    return dict(zip(pairs, fits, strict=True))


class _StitchedAnswers(Gathered):
    """Divergence and loss of the networks stitched by these fits."""

    def __init__(self, anchors: Anchors, fits: dict[Pair, LinearFit], settings: FunctionalScoring):
        self.anchors, self.fits, self.settings, self.units = anchors, fits, settings, 0
        shape = anchors[0].num_blocks, anchors[1].num_blocks
        self.divergence, self.loss = RatioSums(shape), RatioSums(shape)

    def update(self, states: Sequence[list[Any]], batch: Any) -> None:
        """Add one batch: stitches into one target block run together."""
        last, settings, labels = self.anchors[1], self.settings, batch.unit_labels
        reference = Reference(last, states[1][-1], batch, settings.temperature, settings.workspace_bytes)
        for start in sorted({j for _, j in self.fits}):
            stops = sorted(i for i, j in self.fits if j == start)
            at_once = max(1, settings.rear_bytes // hidden_of(states[1][start]).nbytes)
            for first in range(0, len(stops), at_once):
                part = stops[first : first + at_once]
                terms, picked = reference.compare(
                    [(last, state) for state in self._stitched(states[0], part, start, batch)], labels
                )
                for place, stop in enumerate(part):
                    self._add((stop - 1, start - 1), terms[place], None if picked is None else picked[place], batch)
        self.divergence.sequences += len(batch)
        self.loss.sequences += len(batch)
        self.units += len(batch.unit_items)

    def _stitched(self, states: Sequence[Any], stops: Sequence[int], start: int, batch: Any) -> list[Any]:
        """Last states of what is stitched into one target block, which run together."""
        first, last = self.anchors
        moved = []
        for stop in stops:
            joint = fitted_joint(first, stop, last, start, self.fits[stop, start])
            moved.append(joint(last.take(states[stop])))
        with evaluating(last.model):
            return last.split(last.run(last.stacked(moved), batch.inputs, start, last.num_blocks), len(stops))

    def _add(self, place: Pair, terms: Tensor, picked: Tensor | None, batch: Any) -> None:
        items, count = batch.unit_items, len(batch)
        _add(self.divergence, place, terms, torch.ones_like(terms), items, count)
        if picked is not None:
            known = batch.unit_labels >= 0
            _add(self.loss, place, -picked * known, known.to(picked), items, count)

    def combine(self) -> None:
        for sums in (self.divergence, self.loss):
            sums.set_moments(sum_array_over_processes(sums.moments()))
        self.units = int(sum_array_over_processes(np.array([float(self.units)]))[0])


def _add(sums: RatioSums, place: Pair, terms: Tensor, weights: Tensor, items: Tensor, count: int) -> None:
    """Add the terms of one stitch, summed over the units of each item."""
    if not terms.isfinite().all():
        raise ValueError("got NaN or infinite divergences; expected finite activations. Check the anchors' weights")
    totals = torch.zeros(2, count, dtype=torch.float64)
    totals.index_add_(1, items, torch.stack([terms, weights]).double())
    sums.add_at(place, totals[0].numpy(), totals[1].numpy())


def pair_groups(pairs: Sequence[Pair], widths: tuple[Sequence[int], Sequence[int]], allowed: int) -> list[list[Pair]]:
    """Pairs in groups whose second moments fit into the memory allowed; pairs of one target block stay together.

    Raises:
        ValueError: a single pair does not fit.
    """
    groups: list[list[Pair]] = []
    for pair in sorted(pairs, key=lambda pair: (pair[1], pair[0])):
        if groups and PairMoments.bytes_needed([*groups[-1], pair], widths[0], widths[1]) <= allowed:
            groups[-1].append(pair)
            continue
        needed = PairMoments.bytes_needed([pair], widths[0], widths[1])
        if needed > allowed:
            raise ValueError(
                f"got moment_bytes={allowed:,} for blocks {widths[0][pair[0]]} and {widths[1][pair[1]]} wide, of which "
                f"one pair takes {needed:,}; expected at least that much"
            )
        groups.append([pair])
    return groups
