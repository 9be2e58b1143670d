"""Stitching: build a stitched model from two anchors.

The stitching layer starts from the least-squares map between the two anchors' hidden states (KLAS Sec. 5; SN-Net's
pseudo-inverse initialisation).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from klas_hf.anchors.language import HUB_OPTIONS
from klas_hf.anchors.vision import is_vision
from klas_hf.models import StitchedModel
from klas_hf.paths import Stitch
from klas_hf.stitching.images import check_grids, stitch_classifiers
from klas_hf.stitching.language import stitch_decoders

__all__ = ["check_grids", "stitch_anchors", "stitch_classifiers", "stitch_decoders"]


def stitch_anchors(
    source: str | Path | PreTrainedModel,
    target: str | Path | PreTrainedModel,
    stitch: Stitch | tuple[int, int],
    *,
    calibration: Iterable[Any] | None = None,
    ridge: float | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    source_revision: str | None = None,
    target_revision: str | None = None,
    **kwargs: Any,
) -> StitchedModel:
    """Join `source.blocks[:i]` to `target.blocks[j:]` by a linear stitching layer.

    Args:
        source, target: Hub id, local folder or model in memory; the anchors are read, never changed. Both are causal
            language models, or both image classifiers.
        stitch: `Stitch(i, j)` or `(i, j)`.
        calibration: batches of token ids (see `token_batches`) or images (`image_batches`) on which the stitching layer
            is fitted by least squares; None leaves it random, with a warning.
        ridge: penalty of that fit; None chooses (see `LeastSquares.solve`).
        dtype: of the stitched model; None takes the target's.
        device_map: as for `from_pretrained`; None leaves the model on the CPU.
        source_revision, target_revision: commits on the Hub.
        kwargs: for `from_pretrained` (attn_implementation, quantization_config, token, cache_dir, …); for images also
            `image_size`, where the anchors' configurations are for different ones.

    Returns:
        A `StitchedForCausalLM` or a `StitchedForImageClassification` in eval mode.

    Raises:
        ValueError: stitch out of range, between different grids, or reversed; family unknown; vocabularies or classes
            differ; one anchor for text and one for images; nothing to calibrate on.
        OSError: an anchor cannot be reached.
    """
    hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
    images = [
        is_vision(anchor, **(hub | ({"revision": revision} if revision else {})))
        for anchor, revision in ((source, source_revision), (target, target_revision))
    ]
    if images[0] != images[1]:
        kinds = ["image classifier" if image else "language model" for image in images]
        raise ValueError(f"got the anchors {kinds[0]} and {kinds[1]}; expected two of one kind")
    join = stitch_classifiers if images[0] else stitch_decoders
    return join(
        source, target, Stitch.of(stitch), calibration=calibration, ridge=ridge, dtype=dtype, device_map=device_map,
        source_revision=source_revision, target_revision=target_revision, **kwargs,
    )  # fmt: skip
