"""Functional KL: what a stitched network answers at its least-squares start, against what the target answers.

    F(i, j) = mean over x of KL(target(x) ‖ stitched_ij(x)),  stitched_ij by the least-squares map of block i to block j

No probes, no labels, no training. One pass over the calibration data gives the normal equations of all pairs of blocks
at once (a Gram matrix per block, a cross-Gram matrix per pair), from which all maps are solved. Then, on each batch of
held-out data, both anchors run once, and the rears of all stitches that enter the target at one block run together.
Where the matrices of all pairs do not fit into the memory allowed, pairs are taken in groups, one pass for each.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klas_hf.anchors.images import image_batches
from klas_hf.anchors.language import load_anchor
from klas_hf.anchors.vision import check_labels, is_vision, load_vision_anchor
from klas_hf.anchors.vocabularies import check_vocabularies
from klas_hf.costs import measure_stitch_costs
from klas_hf.maths.divergences import kl_divergence
from klas_hf.maths.estimates import RatioSums
from klas_hf.maths.least_squares import RIDGE, LinearFit
from klas_hf.maths.similarities import PairMoments
from klas_hf.paths import Stitch, StitchCosts
from klas_hf.processes import progress, shared_out, sum_array_over_processes, sum_over_processes
from klas_hf.rows import library_versions
from klas_hf.scores.sides import AnchorPair, ClassifierPair, DecoderPair
from klas_hf.scores.values import StitchScores

Array = NDArray[np.float64]
Pair = tuple[int, int]


@dataclass(frozen=True)
class FunctionalScoring:
    """How functional KL is measured: a score of ours, the target's answers against an untrained stitched network's.

    Attributes:
        calibration: batches that the least-squares maps are fitted to; None takes as many from the front of the data as
            are scored behind them, at most the first half.
        candidates: the stitches to score; None scores all that are possible with target_start >= 1.
        temperature: softens both distributions; 4 foretold best of 0.5, 1, 2 and 4 (LOG.md).
        ridge: penalty of the fits, relative to the variance of a standardised feature.
        moment_bytes: memory that the sums of one group of pairs may take.
        rear_items: images or sequences that one forward of a rear takes at most.
        scored_items: images or sequences to score on, in whole batches at least so many; None takes all.

    Raises:
        ValueError: a temperature that is not above 0.

    Example:
        >>> settings = FunctionalScoring(calibration=batches[:3], candidates=[Stitch(1, 2), Stitch(3, 1)])
        >>> scores = score_stitches(source, target, batches[3:], score="functional", functional=settings)
        >>> scores.stitches == (Stitch(1, 2), Stitch(3, 1))
        True
    """

    calibration: Iterable[Any] | None = None
    candidates: Iterable[Stitch] | None = None
    temperature: float = 4.0
    ridge: float = RIDGE
    moment_bytes: int = 4 << 30
    rear_items: int = 256
    scored_items: int | None = 128

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"got temperature={self.temperature}; expected a number above 0")
        if self.scored_items is not None and self.scored_items < 1:
            raise ValueError(f"got scored_items={self.scored_items}; expected at least 1, or None for all")


@dataclass(frozen=True)
class FunctionalResult:
    """What functional scoring found; matrices are `(m, n)` as `StitchScores.cross`, nan where nothing was measured.

    Attributes:
        divergence, divergence_error: functional KL in nats per image or token, and its standard error.
        loss: cross-entropy of the stitched networks with the labels, or the next tokens, in nats; None without labels.
        unexplained: 1 − R² of each least-squares map.
        items: images or sequences that the means are over.
        units: images or tokens of these.
        passes: passes over the calibration data, one per group of pairs.
    """

    divergence: Array
    divergence_error: Array
    loss: Array | None
    unexplained: Array
    items: int
    units: int
    passes: int

    def statistics(self) -> dict[str, Array]:
        """As entries of `StitchScores.statistics`."""
        found = {"functional": self.divergence, "functional_error": self.divergence_error, "dm": self.unexplained}
        return found if self.loss is None else found | {"stitched_loss": self.loss}


def score_functionally(
    source: Any,
    target: Any,
    data: Iterable[Any],
    *,
    settings: FunctionalScoring,
    tokens: int = 128,
    positions: tuple[int, int] = (0, 1),
) -> StitchScores:
    """Functional KL as `StitchScores` without probes: Θ and the capacity are nan; see `score_stitches`."""
    anchors, costs, provenance = _pair(source, target, data, tokens, positions)
    costs.check_direction()
    pairs = _candidates(costs, settings)
    calibration, scored = _parts(anchors, data, settings)
    found = functional_statistics(anchors, pairs, calibration, scored, settings)
    nothing = np.full(costs.macs.shape, np.nan)
    return StitchScores(
        score="functional",
        cross=nothing,
        capacity=nothing[0, :-1],
        cross_error=nothing,
        capacity_error=nothing[0, :-1],
        gamma_error=nothing[:, :-1],
        sequences=found.items,
        tokens=found.units,
        costs=costs,
        provenance=provenance | {"functional": {"temperature": settings.temperature, "passes": found.passes}},
        statistics=found.statistics(),
    )


def _pair(
    source: Any, target: Any, data: Iterable[Any], tokens: int, positions: tuple[int, int]
) -> tuple[AnchorPair, StitchCosts, dict[str, Any]]:
    """Both anchors ready to be stitched on trial, what all stitches cost, and where the scores come from."""
    anchors: AnchorPair
    if is_vision(source):
        classifiers = load_vision_anchor(source), load_vision_anchor(target)
        check_labels(*classifiers)
        anchors, configs = ClassifierPair(*classifiers), [one.config for one in classifiers]
        batch = next(image_batches(data), None)
        size = None if batch is None else batch.pixel_values.shape[-2:]
        costs = measure_stitch_costs(configs[0], configs[1], image_size=size, positions=positions)
        names = [{"name": one.name, "revision": one.revision, "fingerprint": one.fingerprint} for one in classifiers]
    else:
        decoders = load_anchor(source), load_anchor(target)
        check_vocabularies(decoders[0].path, decoders[0].config, decoders[1].path, decoders[1].config)
        anchors, configs = DecoderPair(*decoders), [one.config for one in decoders]
        costs = measure_stitch_costs(configs[0], configs[1], tokens=tokens)
        names = [{"name": one.name, "revision": one.revision, "fingerprint": one.fingerprint} for one in decoders]
    return anchors, costs, {"source": names[0], "target": names[1], "versions": library_versions()}


def _parts(
    anchors: AnchorPair, data: Iterable[Any], settings: FunctionalScoring
) -> tuple[Iterable[Any], Iterable[Any]]:
    """Batches to fit to and batches to score on; no more are held in memory than are used."""
    items = settings.scored_items
    if settings.calibration is not None:
        calibration = list(anchors.read(settings.calibration))
        scored: Iterable[Any] = _Batches(anchors, data) if items is None else _first(anchors, data, items)
        if not calibration:
            raise ValueError("got no batches to calibrate on; expected at least one. Was an iterator used up before?")
        return calibration, scored
    taken = _first(anchors, data, None if items is None else 2 * items)
    half = len(taken) // 2
    if not half:
        raise ValueError(
            f"got {len(taken)} batches; expected at least two, one to calibrate on and one to score on. Pass smaller "
            "batches, or calibration=batches"
        )
    return taken[:half], taken[half:]


def _first(anchors: AnchorPair, data: Iterable[Any], items: int | None) -> list[Any]:
    """The first batches, until they hold so many images or sequences."""
    taken, seen = [], 0
    for batch in anchors.read(data):
        taken.append(batch)
        seen += anchors.items(batch)
        if items is not None and seen >= items:
            break
    return taken


class _Batches:
    """All batches, read anew for every group of pairs."""

    def __init__(self, anchors: AnchorPair, data: Iterable[Any]):
        self.anchors, self.data = anchors, data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.anchors.read(self.data))


def _candidates(costs: StitchCosts, settings: FunctionalScoring) -> list[Pair]:
    """(i, j) of the stitches to score, all possible with j >= 1 unless some are named."""
    if settings.candidates is None:
        return [(i + 1, j) for i, j in np.argwhere(costs.possible).tolist() if j > 0]
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


@torch.no_grad()
def functional_statistics(
    anchors: AnchorPair,
    pairs: Sequence[Pair],
    calibration: Iterable[Any],
    data: Iterable[Any],
    settings: FunctionalScoring,
) -> FunctionalResult:
    """Functional KL of every pair of blocks asked for.

    Args:
        anchors: the two anchors.
        pairs: (i, j) of the stitches, i and j from 1.
        calibration, data: batches, read once for each group of pairs.
        settings: temperature, memory.

    Raises:
        ValueError: nothing to fit to or to score on, a budget below one pair, or activations that are not finite.
    """
    shape = len(anchors.widths[0]) - 1, len(anchors.widths[1]) - 1
    divergence, loss, unexplained = RatioSums(shape), RatioSums(shape), np.full(shape, np.nan)
    groups = pair_groups(pairs, anchors.widths, settings.moment_bytes)
    units = 0
    for number, group in enumerate(groups):
        of = f" {number + 1} of {len(groups)}" if len(groups) > 1 else ""
        fits = fit_pairs(anchors, group, calibration, settings.ridge, f"calibrating stitches{of}")
        for (i, j), fit in fits.items():
            unexplained[i - 1, j - 1] = max(0.0, 1 - fit.r2)
        for batch in progress(shared_out(data), f"running stitched networks{of}"):
            units += _add_batch(anchors, fits, batch, settings, divergence, loss)
    for sums in (divergence, loss):
        sums.set_moments(sum_array_over_processes(sums.moments()))
    if not divergence.sequences:
        raise ValueError("got no data to score on; expected batches. Check that an iterator was not used up before")
    has_loss = bool(np.isfinite(loss.value).any())
    items = divergence.sequences // len(groups)
    units = int(sum_over_processes(torch.tensor(float(units), dtype=torch.float64))) // len(groups)
    divergence.sequences = loss.sequences = items
    return FunctionalResult(
        divergence.value, divergence.standard_error, loss.value if has_loss else None, unexplained, items, units,
        len(groups),
    )  # fmt: skip


def fit_pairs(
    anchors: AnchorPair, pairs: Sequence[Pair], calibration: Iterable[Any], ridge: float, description: str
) -> dict[Pair, LinearFit]:
    """The least-squares map of every pair, in the source's dtype, from one pass over the calibration data."""
    moments = PairMoments(pairs, anchors.widths[0], anchors.widths[1])
    seen = 0
    for batch in progress(shared_out(calibration), description):
        source, target = anchors.rows(anchors.states(batch), batch)
        moments.update(source, target)
        seen += anchors.items(batch)
    moments.combine(sum_over_processes)
    if not int(sum_over_processes(torch.tensor(float(seen)))):
        raise ValueError("got no data to calibrate on; expected batches. Check that an iterator was not used up before")
    return {pair: _narrowed(moments.least_squares(*pair, ridge=ridge), anchors.dtype) for pair in pairs}


def _narrowed(fit: LinearFit, dtype: torch.dtype) -> LinearFit:
    """A map as stitched networks run it; kept for all pairs at once, in float64 it would fill the memory."""
    return replace(fit, weight=fit.weight.to(dtype), bias=fit.bias.to(dtype))


def _add_batch(
    anchors: AnchorPair,
    fits: dict[Pair, LinearFit],
    batch: Any,
    settings: FunctionalScoring,
    divergence: RatioSums,
    loss: RatioSums,
) -> int:
    """Add one batch: the anchors run once, stitches into one target block together. The number of its units."""
    source, target = anchors.states(batch)
    log_p = _log_probs(anchors.answer(target[-1], batch), settings.temperature)
    labels, items, count = anchors.labels(batch), anchors.unit_items(batch), anchors.items(batch)
    at_once = max(1, settings.rear_items // count)
    for start in sorted({j for _, j in fits}):
        stops = sorted(i for i, j in fits if j == start)
        for first in range(0, len(stops), at_once):
            part = stops[first : first + at_once]
            answers = anchors.stitched_answers([source[i] for i in part], [fits[i, start] for i in part], start, batch)
            for stop, logits in zip(part, answers, strict=True):
                place = stop - 1, start - 1
                terms = kl_divergence(log_p, _log_probs(logits, settings.temperature))
                _add(divergence, place, terms, torch.ones_like(terms), items, count)
                if labels is not None:
                    known = (labels >= 0).to(logits.device)
                    picked = _log_probs(logits, 1.0).gather(-1, labels.clamp_min(0).to(logits.device)[:, None])[:, 0]
                    _add(loss, place, -picked * known, known.to(picked), items, count)
    divergence.sequences += count
    loss.sequences += count
    return len(log_p)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() / temperature).log_softmax(-1)


def _add(sums: RatioSums, place: Pair, terms: Tensor, weights: Tensor, items: Tensor, count: int) -> None:
    """Add the terms of one stitch, summed over the units of each item."""
    if not terms.isfinite().all():
        raise ValueError("got NaN or infinite divergences; expected finite activations. Check the anchors' weights")
    totals = torch.zeros(2, count, dtype=torch.float64)
    totals.index_add_(1, items.cpu(), torch.stack([terms, weights]).double().cpu())
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
