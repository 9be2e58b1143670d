"""Classifiers by configuration: building one, taking parts out of it, and the shapes that its blocks give."""

import copy
import json
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .vision_features import Features, image_size
from .vision_kinds import vision_kind


@dataclass(frozen=True)
class FeatureShape:
    """Shape of what a block gives, for one image.

    Attributes:
        channels: width.
        height, width: the grid, in positions.
        stage: the block's stage; 0 for the embedding.
    """

    channels: int
    height: int
    width: int
    stage: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.height, self.width


def classifier(config: PreTrainedConfig) -> PreTrainedModel:
    """The image classifier of a configuration, of the class that it names, or its family's first."""
    # LeViT adds to its configuration while it is built.
    config = copy.deepcopy(config)
    if not config.architectures:
        found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        config.architectures = [(found[0] if isinstance(found, tuple) else found).__name__]
    # Not in the dtype of its configuration: both sides of a stitched model are in that of the whole.
    return AutoModelForImageClassification.from_config(config, dtype=torch.get_default_dtype())


def keep_blocks(model: PreTrainedModel, start: int, stop: int, *, embed: bool, head: bool) -> None:
    """Take out of a classifier all but `blocks[start:stop]`, and what is before and behind them unless asked for."""
    kind = vision_kind(model.config)
    blocks = kind.blocks(model.config)
    unused = [name for n, block in enumerate(blocks) if not start <= n < stop for name in block.modules]
    unused += [] if embed else kind.embed
    unused += [] if head else kind.head
    present = {name for name, _ in model.named_modules()}
    for name in unused:
        if name in present:
            model.set_submodule(name, nn.Identity())


def trace(config: PreTrainedConfig, size: tuple[int, int] | None = None) -> tuple[FeatureShape, ...]:
    """Shapes of the embedding's output and of every block's, from one forward on the meta device.

    Args:
        size: (height, width) of the image in pixels; None takes the configuration's.
    """
    return _trace(type(config).model_type, config.to_json_string(use_diff=False), size or image_size(config))


@lru_cache(maxsize=64)
def _trace(model_type: str, settings: str, size: tuple[int, int]) -> tuple[FeatureShape, ...]:
    config = CONFIG_MAPPING[model_type].from_dict(json.loads(settings))
    kind = vision_kind(config)
    with torch.device("meta"):
        model = classifier(config).eval()
        pixels = torch.zeros(1, config.num_channels, *size, dtype=model.dtype)
    with torch.no_grad():
        kind.check_pixels(pixels, config)
        features = kind.run_embed(model, pixels)
        shapes = [_shape(features, kind.layout, 0)]
        for block in kind.blocks(config):
            features = kind.run_block(model, block, features)
            shapes.append(_shape(features, kind.layout, block.stage))
    return tuple(shapes)


def _shape(features: Features, layout: str, stage: int) -> FeatureShape:
    channels = features.hidden.shape[1 if layout == "map" else -1]
    return FeatureShape(channels, features.height, features.width, stage)
