"""Which anchors to stitch: the KL divergence between their outputs (KLAS Sec. 4.2, Alg. 3 line 2)."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from klas_hf.anchors.anchor import check_anchors
from klas_hf.anchors.images import image_batches
from klas_hf.anchors.vision import VisionAnchor, load_vision_anchor
from klas_hf.costs import measure_costs
from klas_hf.maths.divergences import pairwise_kl
from klas_hf.processes import progress, shared_out, sum_array_over_processes
from klas_hf.selection.anchors import AnchorRule, AnchorSelection, choose_pairs


@torch.no_grad()
def select_anchors(
    anchors: Sequence[Any],
    data: Iterable[Any],
    *,
    rule: AnchorRule = "least_kl",
    revisions: Sequence[str | None] | None = None,
    **loading: Any,
) -> AnchorSelection:
    """Choose which of several image classifiers to stitch, by the KL divergence between their own outputs.

    KLAS Alg. 3, line 2, for which the paper gives no formula.

    Args:
        anchors: Hub ids, folders or models of one label set.
        data: batches of images; labels are not needed.
        rule: "least_kl", the path from the cheapest to the dearest anchor whose summed divergence is least (KLAS, our
            reading); "nearest", neighbours by cost (SN-Net); "all", every pair.
        revisions: of the anchors on the Hub.
        loading: of anchors named by Hub id or folder, as for `from_pretrained`: dtype, device_map, attn_implementation,
            quantization_config, token, …; by themselves they lie on accelerate's device, in their checkpoints' dtype.

    Returns:
        The pairs, cheaper first, and the matrix of divergences in nats.

    Raises:
        ValueError: fewer than two anchors, one listed twice, different classes, no images, an unknown rule.

    Example:
        >>> chosen = select_anchors([small, large], images, rule="least_kl")
        >>> chosen.pairs, chosen.divergence.shape, bool(chosen.divergence[0, 1] > 0)
        (((0, 1),), (2, 2), True)
    """
    commits = [{} if one is None else {"revision": one} for one in revisions or [None] * len(anchors)]
    loaded = [load_vision_anchor(one, **loading, **commit) for one, commit in zip(anchors, commits, strict=True)]
    check_anchors(loaded)
    batches = image_batches(data)
    first = next(batches, None)
    if first is None:
        raise ValueError("got no images to compare anchors on; expected batches")
    size = (first.pixel_values.shape[-2], first.pixel_values.shape[-1])
    macs = [measure_costs(anchor.model, image_size=size).macs for anchor in loaded]
    sums, images = np.zeros((len(loaded), len(loaded))), 0
    choose_pairs(sums, macs, rule)  # raises now what it would raise after the pass
    for batch in progress(shared_out(chain([first], batches)), "comparing anchors"):
        logits = [anchor.answers(anchor.states(batch)[-1], batch).cpu() for anchor in loaded]
        log_probs = torch.stack(logits).float().log_softmax(-1)
        sums += pairwise_kl(log_probs, log_probs).sum(0).numpy()
        images += len(batch)
    total = sum_array_over_processes(np.array([float(images)]))[0]
    divergence = sum_array_over_processes(sums) / total
    return AnchorSelection(
        names=_names(loaded),
        macs=tuple(macs),
        divergence=divergence,
        pairs=tuple(choose_pairs(divergence, macs, rule)),
        rule=rule,
    )


def _names(anchors: Sequence[VisionAnchor]) -> tuple[str, ...]:
    """Names of the anchors; models that were never saved have that of their class, and are told apart by position."""
    names = [anchor.name for anchor in anchors]
    return tuple(f"{name} #{place}" if names.count(name) > 1 else name for place, name in enumerate(names))
