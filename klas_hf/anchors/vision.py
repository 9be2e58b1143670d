"""An image classifier as an anchor: what each of its blocks gives, and its head on it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.images import ImageBatch, image_batches
from klas_hf.anchors.language import anchor_config, pretrained
from klas_hf.anchors.weights import evaluating
from klas_hf.models.modeling_stitched_vision import StitchingLayer, dropped_prefix
from klas_hf.models.vision_features import Block, Features, VisionKind, drop_block
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.models.vision_shapes import FeatureShape, trace


class VisionAnchor(Anchor[ImageBatch, Features]):
    """A pretrained image classifier, read by blocks; BatchNorm uses its running statistics, unless it is in training.

    Raises:
        ValueError: its kind is unknown.
    """

    unit = "image"

    def __init__(self, model: PreTrainedModel, revision: str | None = None):
        self.kind: VisionKind = vision_kind(model.config)
        super().__init__(model, revision)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.kind.blocks(self.config)

    def writer(self, block: int) -> nn.Module | None:
        name = self.kind.writer
        return None if name is None else self.model.get_submodule(f"{self.blocks[block].modules[-1]}.{name}")

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def widths(self) -> list[int]:
        return [shape.channels for shape in self.shapes()]

    @property
    def classes(self) -> int:
        return self.config.num_labels

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def shapes(self, size: tuple[int, int] | None = None) -> tuple[FeatureShape, ...]:
        """Shapes of all states, for images of this (height, width)."""
        return trace(self.config, size)

    def read(self, data: Iterable[Any]) -> Iterator[ImageBatch]:
        return image_batches(data)

    def check_like(self, other: "VisionAnchor") -> None:
        check_labels(self.config, other.config)

    def front(self, inputs: Mapping[str, Any], stop: int) -> Features:
        """As of every anchor; `inputs` may have `rates`, an iterator over the blocks' rates of stochastic depth."""
        self.kind.check_pixels(inputs["pixel_values"], self.config)
        return self.run(self.kind.run_embed(self.model, inputs["pixel_values"]), inputs, 0, stop)

    def run(self, state: Features, inputs: Mapping[str, Any], start: int, stop: int) -> Features:
        self.kind.check_size(inputs["pixel_values"], self.config)
        for block in self.blocks[start:stop]:
            after = self.kind.run_block(self.model, block, state)
            state = drop_block(state, after, next(inputs["rates"])) if "rates" in inputs else after
        return state

    @torch.no_grad()
    def states(self, batch: ImageBatch, stop: int | None = None) -> list[Features]:
        inputs = {"pixel_values": batch.pixel_values.to(device=self.device, dtype=self.model.dtype)}
        with evaluating(self.model):
            found = [self.front(inputs, 0)]
            for number in range(self.num_blocks if stop is None else stop):
                found.append(self.run(found[-1], inputs, number, number + 1))
        return found

    def logits(self, state: Features) -> Tensor:
        return self.kind.run_head(self.model, state)

    @torch.no_grad()
    def answers(self, state: Features, batch: ImageBatch, units: slice = slice(None)) -> Tensor:
        with evaluating(self.model):
            return self.logits(state)[units]

    def rows(self, state: Features, batch: ImageBatch, into: "VisionAnchor | None" = None) -> Tensor:
        return feature_rows(state, self.kind, 0 if into is None else dropped_prefix(self.kind, into.kind))

    def probed(self, state: Features, batch: ImageBatch, units: slice = slice(None)) -> Tensor:
        return self.kind.pooled(state)[units]

    def grids(self, batch: ImageBatch) -> list[tuple[int, int, int]]:
        shapes = self.shapes((batch.pixel_values.shape[-2], batch.pixel_values.shape[-1]))
        return [(shape.height, shape.width, self.kind.prefix_tokens) for shape in shapes]

    def joint(self, stop: int, into: "VisionAnchor", start: int, bias: bool = True) -> StitchingLayer:
        return StitchingLayer(self.kind, into.kind, self.widths[stop], into.widths[start], bias)

    def take(self, state: Features) -> Features:
        return state._replace(hidden=state.hidden.to(device=self.device, dtype=self.model.dtype))

    @staticmethod
    def stacked(states: Sequence[Features]) -> Features:
        return states[0]._replace(hidden=torch.cat([one.hidden for one in states]))

    @staticmethod
    def split(state: Features, count: int) -> list[Features]:
        return [state._replace(hidden=hidden) for hidden in state.hidden.chunk(count)]


def feature_rows(features: Features, kind: VisionKind, dropped: int = 0) -> Tensor:
    """One row per position and image, `(batch · positions, channels)`, as a stitching layer sees them."""
    if kind.layout == "map":
        return features.hidden.movedim(1, -1).flatten(0, 2)
    return features.hidden[:, dropped:].flatten(0, 1)


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


def check_labels(*configs: PreTrainedConfig) -> None:
    """Raise ValueError unless anchors of these configurations know the same classes, in the same order."""
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


def _same_label(one: str, other: str | None, number: int) -> bool:
    """Names are compared only where both are known: LABEL_0 is what transformers calls a class without a name."""
    unnamed = f"LABEL_{number}"
    return other is not None and (one == other or unnamed in (one, other))
