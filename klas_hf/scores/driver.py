"""Scores of all stitches between two anchors (KLAS Alg. 2)."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from klas_hf.anchors.vision import is_vision
from klas_hf.scores.functional import FunctionalScoring, score_functionally
from klas_hf.scores.images import ImageScoring, score_classifiers
from klas_hf.scores.language import WORKSPACE_BYTES, score_decoders
from klas_hf.scores.values import NEEDED, SCORES, STITCHED, StitchScores


def score_stitches(
    source: Any,
    target: Any,
    data: Iterable[Any],
    *,
    probes: Any = None,
    score: str = "functional",
    tokens: int = 128,
    workspace_bytes: int = WORKSPACE_BYTES,
    images: ImageScoring | None = None,
    functional: FunctionalScoring | None = None,
    positions: tuple[int, int] = (0, 1),
) -> StitchScores:
    """Score every stitch (i, j) between two anchors (KLAS Alg. 2); lower is better.

    Args:
        source, target: Hub id, folder or model; the source is the cheaper one.
        data: batches of token ids, whole sequences, of which padding and BOS are left out of all averages; or batches
            of images, whose labels only class-conditional CKA needs.
        probes: of source and target, trained on other data (`train_probes`). For language models None fits ridge
            probes to the first half of the batches and scores on the second.
        score: which statistic ranks the stitches: "functional" (no probes, labels or training), "klas" (Γ, Eq. 2),
            "theta" (Θ, Eq. 1), "functional_theta" (the geometric mean of the first and Θ), and for images all of
            `SCORES`; LOG.md compares them. All that the data allow are computed, the functional ones only where they
            are asked for; `StitchScores.with_score` changes the ranking later.
        tokens: sequence length that a language model's costs are counted for.
        workspace_bytes: memory for a language model's distributions; more is faster up to a point.
        images: what else is measured on images.
        functional: how functional KL is measured, beside the rest; None measures it only where `score` wants it.
        positions: of the two anchors in a list of more.

    Returns:
        Θ, capacity and Γ with standard errors over sequences or images, and the costs of all stitches.

    Raises:
        ValueError: unknown score, or one that lacks its data; vocabularies or classes that differ; probes of another
            model or none for images; source dearer than target; no data; activations that are not finite.

    Example:
        >>> scores = score_stitches(source, target, batches, score="functional")  # anchors of 3 and 4 blocks
        >>> scores.values.shape, len(scores.stitches)  # column 0, where all target blocks run, has no score
        ((3, 4), 9)
        >>> probes = [train_probes(anchor, batches[:2]) for anchor in (source, target)]
        >>> score_stitches(source, target, batches[2:], probes=probes, score="klas").available
        ('klas', 'klas_staged', 'theta')
    """
    if score not in SCORES:
        raise ValueError(f"got score={score!r}; expected one of {sorted(SCORES)}")
    vision = is_vision(source)
    needed = set(NEEDED[score])
    runs, probed = needed & set(STITCHED), needed - set(STITCHED)
    if vision and probes is None and probed:
        raise ValueError(
            "got no probes for two image classifiers; expected probes=(of source, of target), made by train_probes on "
            "labelled images other than those that are scored on"
        )
    if functional is None and not runs:
        return _probed(vision, source, target, data, probes, score, tokens, workspace_bytes, images, positions)
    batches = list(data) if iter(data) is data else data  # an iterator can be read once
    found = score_functionally(
        source, target, batches, settings=functional or FunctionalScoring(), tokens=tokens, positions=positions
    )
    if probes is None and not probed:
        return found.with_score(score)
    first = "klas" if runs else score
    scores = _probed(vision, source, target, batches, probes, first, tokens, workspace_bytes, images, positions)
    return replace(scores, score=score, statistics=found.statistics | scores.statistics)


def _probed(
    vision: bool,
    source: Any,
    target: Any,
    data: Iterable[Any],
    probes: Any,
    score: str,
    tokens: int,
    workspace_bytes: int,
    images: ImageScoring | None,
    positions: tuple[int, int],
) -> StitchScores:
    if not vision:
        return score_decoders(
            source, target, data, probes=probes, score=score, tokens=tokens, workspace_bytes=workspace_bytes
        )
    return score_classifiers(source, target, data, probes=probes, score=score, settings=images, positions=positions)
