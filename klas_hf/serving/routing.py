"""Routing between two paths of one supernet by confidence: a cascade that shares its weights and its beginning.

A sequence is read on the first path; where its tokens are less likely to it than a threshold says, the second reads it,
from the block on where the two part. What that yields stands beside the paths' own curve: a rule that chooses nothing
but a threshold, which any single path must beat to be worth its place.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from klas_hf.curves.cascades import CascadeMember, best_per_bucket, cascade_curve, to_rows
from klas_hf.evaluation.language import predict_sequences
from klas_hf.paths import Path
from klas_hf.rows import AnyPath, ResultRow
from klas_hf.stitching import StitchedSupernetForCausalLM
from klas_hf.stitching.supernet_budgets import path_costs
from klas_hf.stitching.supernet_joints import costs_of


def route_paths(
    supernet: StitchedSupernetForCausalLM,
    batches: Iterable[Any],
    first: AnyPath,
    second: AnyPath,
    *,
    thresholds: Sequence[float] | None = None,
    buckets: int = 20,
) -> list[ResultRow]:
    """Loss and MACs of sending sequences on from one path to another, the best of every size.

    Args:
        supernet: that has both.
        batches: text with labels, as for `evaluate`; of `config.tokens` tokens, which MACs are counted for.
        first, second: the cheaper path and the dearer.
        thresholds: a sequence is sent on where the mean of its tokens' highest probabilities is below; None takes one
            between each two sequences, which choices made on other data will not all reach.
        buckets: of cost, of each of which the best point is kept.

    Returns:
        Rows of the rule "routing" for a `TradeoffCurve`, cheapest first: from the first path alone to both for all.

    Raises:
        ValueError: a first path dearer than the second, paths that are not the supernet's, or no text.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([source, target], [(2, 2)], calibration=batches)
        >>> rows = route_paths(supernet, batches, (2, 2), "1[:]")
        >>> rows[0].rule, rows[0].details["sent"], rows[-1].details["sent"]
        ('routing', 0.0, 1.0)
    """
    costs, _ = path_costs(supernet)
    one, other = supernet.check_path(first), supernet.check_path(second)
    batches = list(batches)
    weights = {w.data_ptr(): w.numel() for path in (one, other) for w in supernet.path_model(path).parameters()}
    # What both use is held once.
    cheap = _member(supernet, one, batches, costs[one].macs, sum(weights.values()))
    dear = _member(supernet, other, batches, costs[other].macs, 0)
    if thresholds is None:
        confidence = np.unique(cheap.confidence)
        thresholds = [0.0, *((confidence[1:] + confidence[:-1]) / 2).tolist(), 2.0]
    points = cascade_curve(cheap, dear, thresholds, shared=shared_macs(supernet, one, other))
    return to_rows(best_per_bucket(points, buckets=buckets), metric="loss", rule="routing")


def shared_macs(supernet: StitchedSupernetForCausalLM, first: Path, second: Path) -> int:
    """MACs of what two paths do alike, from the embedding to where they part."""
    costs, slices = (
        costs_of(supernet.config).anchors,
        list(zip(supernet.bounds(first), supernet.bounds(second), strict=False)),
    )
    joints = [supernet.config.joint_of[supernet.numbers[path]] if path.joints else [] for path in (first, second)]
    total, width = 0, 0
    for number, ((place, start, stop), (other, begin, end)) in enumerate(slices):
        if number and joints[0][number - 1] != joints[1][number - 1]:
            break
        if (place, start) != (other, begin):
            break
        anchor = costs[place]
        total += anchor.positions[start] * width * anchor.widths[start] if number else anchor.embed_macs
        total += sum(anchor.block_macs[start : min(stop, end)])
        if stop != end:
            break
        width = anchor.widths[stop]
    return total


def _member(
    supernet: StitchedSupernetForCausalLM, path: Path, batches: Iterable[Any], macs: int, parameters: int
) -> CascadeMember:
    losses, confidence, labels = predict_sequences(supernet.path_model(path), batches)
    return CascadeMember(losses, confidence, macs, parameters, weights=labels.astype(np.float64))
