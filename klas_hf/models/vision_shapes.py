"""Classifiers by configuration: building one, taking parts out of it, what its blocks give and what they cost."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

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


@dataclass(frozen=True)
class Trace:
    """What one forward on the meta device shows, for one image.

    Attributes:
        shapes: of the embedding's output and of every block's.
        macs: of the embedding, of every block and of the head.
    """

    shapes: tuple[FeatureShape, ...]
    macs: tuple[int, ...]


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
    """Shapes of the embedding's output and of every block's; arguments as for `traced`."""
    return traced(config, size).shapes


def traced(config: PreTrainedConfig, size: tuple[int, int] | None = None) -> Trace:
    """Shapes and MACs, from one forward on the meta device.

    Args:
        size: (height, width) of the image in pixels; None takes the configuration's.
    """
    return _traced(type(config).model_type, config.to_json_string(use_diff=False), size or image_size(config))


@lru_cache(maxsize=64)
def _traced(model_type: str, settings: str, size: tuple[int, int]) -> Trace:
    config = CONFIG_MAPPING[model_type].from_dict(json.loads(settings))
    kind = vision_kind(config)
    for name, value in kind.training.items():  # by its rate of stochastic depth alone a block would differ from others
        setattr(config, name, value)
    with no_init_weights(), torch.device("meta"):
        model = classifier(config).eval()
        pixels = torch.zeros(1, config.num_channels, *size, dtype=model.dtype)
    kind.check_pixels(pixels, config)
    features, embed = _counted(partial(kind.run_embed, model, pixels))
    shapes, macs = [_shape(features, kind.layout, 0)], [embed]
    known: dict[Any, tuple[Features, int]] = {}  # a forward on the meta device takes longer than loading a block
    for block in kind.blocks(config):
        macs.append(0)
        for name in block.modules:
            module = model.get_submodule(name)
            about = block.stage, features.hidden.shape, repr(module)
            if about not in known:
                known[about] = _counted(partial(kind.run_module, module, name, features))
            features, of_module = known[about]
            macs[-1] += of_module
        shapes.append(_shape(features, kind.layout, block.stage))
    macs.append(_counted(partial(kind.run_head, model, features))[1])
    return Trace(tuple(shapes), tuple(macs))


@torch.no_grad()
def _counted(run: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and its MACs: FlopCounterMode counts two operations for each."""
    counter = FlopCounterMode(display=False)
    with counter:
        result = run()
    return result, counter.get_total_flops() // 2


def _shape(features: Features, layout: str, stage: int) -> FeatureShape:
    channels = features.hidden.shape[1 if layout == "map" else -1]
    return FeatureShape(channels, features.height, features.width, stage)
