"""Scores of all stitches between two anchors (KLAS Alg. 2)."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.language import hub_options
from klas_hf.anchors.loading import check_different, load_pair
from klas_hf.anchors.streaming import stream
from klas_hf.anchors.vision import VisionAnchor, is_vision
from klas_hf.costs import measure_stitch_costs
from klas_hf.probes import ProbeNet, fit_probes
from klas_hf.rows import library_versions
from klas_hf.scores.answers import WORKSPACE_BYTES
from klas_hf.scores.compared import ComparedSums, ImageScoring
from klas_hf.scores.functional import FunctionalResult, score_functionally
from klas_hf.scores.functional_settings import FunctionalScoring
from klas_hf.scores.probed import Distributions, ProbedSums
from klas_hf.scores.values import NEEDED, PROBED, SCORES, STITCHED, StitchScores, check_score
from klas_hf.stitch_costs import StitchCosts


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
    revisions: Sequence[str | None] | None = None,
    **loading: Any,
) -> StitchScores:
    """Score every stitch (i, j) between two anchors (KLAS Alg. 2); lower is better.

    Args:
        source, target: Hub id, folder or model; the source is the cheaper one.
        data: batches of token ids, whole sequences, of which padding and BOS are left out of all averages; or batches
            of images, whose labels only class-conditional CKA needs. At least 4 calibration tokens (or positions of
            images) per feature: fewer are warned of.
        probes: of source and target, trained on other data (`train_probes`). For language models None fits ridge
            probes to the first half of the batches and scores on the second.
        score: which statistic ranks the stitches: "functional" (no probes, labels or training), "klas" (Γ, Eq. 2),
            "theta" (Θ, Eq. 1), "functional_theta" (the geometric mean of the first and Θ), and for images all of
            `SCORES`; LOG.md compares them. All that the data allow are computed, the functional ones only where they
            are asked for, and only of stitches that cost no less than the source and no more than the target, of many
            the best at their cost (all others are nan; `FunctionalScoring.candidates` names some, its `survivors` says
            how many are left); `StitchScores.with_score` changes the ranking
            later.
        tokens: sequence length that a language model's costs are counted for.
        workspace_bytes: memory for a language model's distributions; more is faster up to a point.
        images: what else is measured on images.
        functional: how functional KL is measured, beside the rest; None measures it only where `score` wants it.
        positions: of the two anchors in a list of more.
        revisions: of the anchors on the Hub.
        loading: of anchors named by Hub id or folder, as for `from_pretrained`: dtype, device_map, attn_implementation,
            quantization_config, token, …; by themselves they lie on accelerate's device, in their checkpoints' dtype.

    Returns:
        Θ, capacity and Γ with standard errors over sequences or images, and the costs of all stitches.

    Raises:
        ValueError: one anchor twice; unknown score, or one that lacks its data; vocabularies or classes that differ;
            probes of another model or none for images; source dearer than target; no data; activations that are not
            finite.

    Example:
        >>> scores = score_stitches(source, target, batches, score="functional")  # anchors of 3 and 4 blocks
        >>> scores.values.shape, len(scores.stitches)  # those between the anchors' costs
        ((3, 4), 6)
        >>> probes = [train_probes(anchor, batches[:2]) for anchor in (source, target)]
        >>> score_stitches(source, target, batches[2:], probes=probes, score="klas").available
        ('klas', 'klas_staged', 'theta')
    """
    if score not in SCORES:
        raise ValueError(f"got score={score!r}; expected one of {sorted(SCORES)}")
    check_different(source, target)
    needs_probes = not set(NEEDED[score]) <= set(STITCHED)
    if needs_probes and probes is None and is_vision(source, **hub_options(loading, (revisions or [None])[0])):
        raise ValueError(
            "got no probes for two image classifiers; expected probes=(of source, of target), made by train_probes on "
            "labelled images other than those that are scored on"
        )
    if functional is None and set(NEEDED[score]) & set(STITCHED):
        functional = FunctionalScoring()
    anchors = load_pair(source, target, revisions, **loading)
    data = list(data) if functional and iter(data) is data else data  # an iterator can be read once
    batches = anchors[1].read(data, probed=True)
    first: Any = next(batches, None)
    of_images = isinstance(anchors[0], VisionAnchor)
    if of_images and first is None:
        raise ValueError("got no images to score on; expected batches. Check that an iterator was not used up before")
    size = tuple(first.pixel_values.shape[-2:]) if of_images else None
    costs = measure_stitch_costs(
        *(anchor.model for anchor in anchors), tokens=tokens, image_size=size, positions=positions
    )
    costs.check_direction()
    if probes is not None:
        for probe, anchor in zip(probes, anchors, strict=True):
            probe.check(anchor)
    probing = probes is not None or needs_probes
    distributions = Distributions(anchors, workspace_bytes)
    compared = None
    if probing and of_images:
        labelled = first.unit_labels is not None
        compared = ComparedSums(distributions, probes, images or ImageScoring(), costs, labelled)
    check_score(
        score,
        {*(PROBED if probing else ()), *(compared.will_have if compared else ()), *(STITCHED if functional else ())},
    )
    stitched = score_functionally(anchors, data, costs, functional) if functional else None
    if not probing:
        return _scores(score, anchors, costs, None, None, stitched)
    every: Iterable[Any] = batches if first is None else chain([first], batches)
    if probes is None:
        probes, every = _own_probes(anchors, every)
    probed = ProbedSums(distributions, probes)
    stream(anchors, every, [probed, compared] if compared else [probed], "scoring stitches")
    return _scores(score, anchors, costs, probed, compared, stitched)


def _own_probes(anchors: tuple[Anchor, Anchor], batches: Iterable[Any]) -> tuple[list[ProbeNet], Sequence[Any]]:
    """Ridge probes of two language models, fitted to the first half of the batches, and the second half."""
    every = list(batches)
    half = len(every) // 2
    if not half:
        raise ValueError(
            f"got {len(every)} batches; expected at least two, one to fit probes and one to score on. Pass smaller "
            "batches, or probes=(…, …) trained on other data"
        )
    return [fit_probes(anchor, every[:half]) for anchor in anchors], every[half:]


def _scores(
    score: str,
    anchors: tuple[Anchor, Anchor],
    costs: StitchCosts,
    probed: ProbedSums | None,
    compared: ComparedSums | None,
    stitched: FunctionalResult | None,
) -> StitchScores:
    """All that the passes found, as one value."""
    nothing = np.full(costs.macs.shape, np.nan)
    provenance: dict[str, Any] = {"versions": library_versions()}
    for place, (side, anchor) in enumerate(zip(("source", "target"), anchors, strict=True)):
        provenance[side] = {
            "name": anchor.name, "revision": anchor.revision, "fingerprint": anchor.fingerprint,
            "parameters": anchor.model.num_parameters(), "bytes_per_parameter": anchor.model.dtype.itemsize,
        }  # fmt: skip
        if probed:
            provenance[side]["probes"] = probed.probes[place].summary
    if stitched:
        provenance["functional"] = {
            "temperature": stitched.temperature, "passes": stitched.passes, "eliminated": stitched.eliminated,
        }  # fmt: skip
    return StitchScores(
        score=score,
        cross=probed.cross.value if probed else nothing,
        capacity=probed.capacity.value if probed else nothing[0, :-1],
        cross_error=probed.cross.standard_error if probed else nothing,
        capacity_error=probed.capacity.standard_error if probed else nothing[0, :-1],
        gamma_error=probed.gamma.standard_error if probed else nothing[:, :-1],
        sequences=probed.cross.sequences if probed else stitched.items if stitched else 0,
        tokens=probed.units if probed else stitched.units if stitched else 0,
        costs=costs,
        provenance=provenance,
        statistics=(stitched.statistics() if stitched else {}) | (compared.statistics() if compared else {}),
    )
