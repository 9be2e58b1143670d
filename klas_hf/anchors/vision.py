"""An image classifier as an anchor: what each of its blocks gives, and its head on it."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from klas_hf.anchors.language import anchor_config, pretrained
from klas_hf.anchors.weights import evaluating, fingerprint
from klas_hf.models.vision_features import Block, Features, VisionKind
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.models.vision_shapes import FeatureShape, trace


class VisionAnchor:
    """A pretrained image classifier, read by blocks.

    Args:
        model: the model; it is not changed.
        revision: its commit on the Hub, where known.

    Raises:
        ValueError: its kind is unknown.
    """

    def __init__(self, model: PreTrainedModel, revision: str | None = None):
        self.kind: VisionKind = vision_kind(model.config)
        self.model = model
        self.config = model.config
        self.revision = revision
        self.path: str | None = str(model.config.name_or_path) or None
        self.name = self.path or type(model).__name__

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.kind.blocks(self.config)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def shapes(self, size: tuple[int, int] | None = None) -> tuple[FeatureShape, ...]:
        """Shapes after the embedding and after every block, for images of this (height, width)."""
        return trace(self.config, size)

    @torch.no_grad()
    def features(self, pixel_values: Tensor, stop: int | None = None) -> list[Features]:
        """What the embedding gives, and each of the first `stop` blocks (None: all): stop + 1 items.

        Dropout and stochastic depth are off meanwhile, and BatchNorm uses its running statistics.

        Args:
            pixel_values: `(batch, channels, height, width)`.
        """
        pixels = pixel_values.to(device=self.device, dtype=self.model.dtype)
        self.kind.check_pixels(pixels, self.config)
        with evaluating(self.model):
            found = [self.kind.run_embed(self.model, pixels)]
            for block in self.blocks[:stop]:
                found.append(self.kind.run_block(self.model, block, found[-1]))
        return found

    @torch.no_grad()
    def logits(self, features: Features) -> Tensor:
        """The model's own head on the last block's output: `(batch, labels)`."""
        with evaluating(self.model):
            return self.kind.run_head(self.model, features)

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the weights (see `fingerprint`)."""
        return fingerprint(self.model)


def load_vision_anchor(anchor: str | Path | PreTrainedModel | VisionAnchor, **kwargs: Any) -> VisionAnchor:
    """Load an image classifier by Hub id or folder, or take a model as it is.

    Args:
        anchor: Hub id, local folder, model, or an anchor already loaded.
        kwargs: for `AutoModelForImageClassification.from_pretrained` (dtype, device_map, revision, …).

    Raises:
        OSError: neither a folder nor to be had from the Hub.
        ValueError: its kind is unknown.
    """
    if isinstance(anchor, VisionAnchor):
        return anchor
    if isinstance(anchor, PreTrainedModel):
        return VisionAnchor(anchor)
    model = pretrained(AutoModelForImageClassification, anchor, vision_kind, **kwargs)
    return VisionAnchor(model, revision=kwargs.get("revision"))


def is_vision(anchor: Any, **hub: Any) -> bool:
    """Whether an anchor (Hub id, folder, model, configuration, or one already loaded) is an image classifier.

    Of any type that transformers has a classifier for: one that cannot be stitched is to be told the kinds that can.
    """
    if isinstance(anchor, VisionAnchor):
        return True
    if isinstance(anchor, str | Path):
        anchor = anchor_config(anchor, **hub)
    config = anchor if isinstance(anchor, PreTrainedConfig) else anchor.config
    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def check_labels(*anchors: VisionAnchor | PreTrainedConfig) -> None:
    """Raise ValueError unless all anchors know the same classes, in the same order."""
    configs = [anchor if isinstance(anchor, PreTrainedConfig) else anchor.config for anchor in anchors]
    for config in configs[1:]:
        if config.num_labels != configs[0].num_labels:
            raise ValueError(
                f"got anchors of {configs[0].num_labels} and {config.num_labels} classes; expected the same classes. "
                "Fine-tune both anchors on one dataset first"
            )
        differing = [n for n, name in configs[0].id2label.items() if not _same_label(name, config.id2label.get(n), n)]
        if differing:
            n = differing[0]
            raise ValueError(
                f"got anchors that name {len(differing)} classes differently, class {n} as {configs[0].id2label[n]!r} "
                f"and as {config.id2label.get(n)!r}; expected the same classes in the same order. If they are, give "
                "both configurations the same id2label"
            )


def check_anchors(anchors: Sequence[VisionAnchor]) -> None:
    """Raise ValueError unless there are two different anchors or more, of the same classes."""
    if len(anchors) < 2:
        raise ValueError(f"got {len(anchors)} anchor; expected at least two")
    seen: dict[str, str] = {}
    for anchor in anchors:
        if anchor.fingerprint in seen:
            raise ValueError(
                f"got the anchor {anchor.name} twice (as {seen[anchor.fingerprint]}); expected different anchors. "
                "List each one once"
            )
        seen[anchor.fingerprint] = anchor.name
    check_labels(*anchors)


def _same_label(one: str, other: str | None, number: int) -> bool:
    """Names are compared only where both are known: LABEL_0 is what transformers calls a class without a name."""
    unnamed = f"LABEL_{number}"
    return other is not None and (one == other or unnamed in (one, other))
