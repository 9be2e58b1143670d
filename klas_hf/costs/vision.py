"""Costs of image classifiers, stitched or not."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from klas_hf.budgets import Cost
from klas_hf.costs.counting import macs_by_module, parameter_count
from klas_hf.costs.measured import linear_weights
from klas_hf.costs.paths import AnchorCosts, stitch_costs
from klas_hf.models import StitchedForImageClassification, StitchedVisionConfig
from klas_hf.models.modeling_stitched_vision import dropped_prefix
from klas_hf.models.vision_kinds import VISION_KINDS, vision_kind
from klas_hf.models.vision_shapes import FeatureShape, classifier, trace, traced
from klas_hf.stitch_costs import StitchCosts


def classifier_costs(config: PreTrainedConfig, size: tuple[int, int]) -> Cost:
    """MACs and parameters of an image classifier of this configuration, for one image of (height, width)."""
    return _classifier_costs(type(config).model_type, config.to_json_string(use_diff=False), size)


@lru_cache(maxsize=64)
def _classifier_costs(model_type: str, settings: str, size: tuple[int, int]) -> Cost:
    # Every stitching of two anchors asks for their costs, and counting takes longer than loading a small model.
    config = CONFIG_MAPPING[model_type].from_dict(json.loads(settings))
    model = _on_meta(config)
    if config.model_type in VISION_KINDS:
        macs = sum(traced(config, size).macs)
    else:
        pixels = torch.zeros(1, config.num_channels, *size, device="meta", dtype=model.dtype)
        macs = sum(macs_by_module(model, pixel_values=pixels).values())
    return Cost(macs, parameter_count(model), image_height=size[0], image_width=size[1])


def vision_stitch_costs(
    parts: tuple[AnchorCosts, AnchorCosts],
    source: PreTrainedConfig,
    target: PreTrainedConfig,
    size: tuple[int, int],
    positions: tuple[int, int] = (0, 1),
) -> StitchCosts:
    """Costs of every stitch between two image classifiers or two dense models.

    Args:
        parts: what those of source and target cost, for such an image.
        source, target: configurations of the classifiers, or those that the backbones are the bodies of.
        size: (height, width) of the image.
        positions: of the two anchors among several.
    """
    dropped_prefix(vision_kind(source), vision_kind(target))
    outputs, inputs = trace(source, size)[1:], trace(target, size)[:-1]
    return stitch_costs(
        *parts,
        tokens=0,
        source=positions[0],
        target=positions[1],
        source_stages=np.array([shape.stage for shape in outputs]),
        target_stages=np.array([shape.stage for shape in trace(target, size)[1:]]),
        allowed=_equal_grids(outputs, inputs),
        image_height=size[0],
        image_width=size[1],
    )


def _equal_grids(outputs: tuple[FeatureShape, ...], inputs: tuple[FeatureShape, ...]) -> NDArray[np.bool_]:
    return np.array([[one.grid == other.grid for other in inputs] for one in outputs])


def anchor_costs(config: PreTrainedConfig, size: tuple[int, int]) -> AnchorCosts:
    """Costs of an image classifier's parts, for one image of (height, width), from one counted forward.

    Raises:
        ValueError: its kind is unknown.
    """
    found = traced(config, size)
    kind, model = vision_kind(config), _on_meta(config)
    embed, *blocks, head = found.macs
    return parts_of(
        config, model, embed, blocks, found.shapes,
        head_macs=head,
        head_parameters=sum(parameter_count(model.get_submodule(name)) for name in kind.head if _has(model, name)),
    )  # fmt: skip


def parts_of(
    config: PreTrainedConfig,
    model: nn.Module,
    embed_macs: int,
    block_macs: list[int],
    shapes: Sequence[FeatureShape],
    **head: Any,
) -> AnchorCosts:
    """Costs of an embedding and of blocks, beside what is known of the head.

    Args:
        config: of the classifier.
        model: it, or what is left of it as a backbone.
        embed_macs, block_macs: of the embedding and of every block.
        shapes: of all states.
        head: the fields of `AnchorCosts` that do not follow from embedding and blocks.
    """
    kind = vision_kind(config)
    blocks = kind.blocks(config)

    def parameters(names: tuple[str, ...]) -> int:
        return sum(parameter_count(model.get_submodule(name)) for name in names)

    return AnchorCosts(
        embed_macs=embed_macs,
        block_macs=block_macs,
        embed_parameters=parameters(kind.embed),
        block_parameters=[parameters(block.modules) for block in blocks],
        widths=[shape.channels for shape in shapes],
        positions=[shape.height * shape.width + kind.prefix_tokens for shape in shapes],
        block_linears=[sum(linear_weights(model.get_submodule(name)) for name in block.modules) for block in blocks],
        merges=kind.writer is not None,
        residual=kind.residual,
        **head,
    )


def _has(model: nn.Module, name: str) -> bool:
    return name in {known for known, _ in model.named_modules()}


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        if isinstance(config, StitchedVisionConfig):
            return StitchedForImageClassification(config).eval()
        return classifier(config).eval()
