"""Costs of dense models: a backbone taken apart as a classifier is, and a head that takes some of its maps."""

import copy
import json
from functools import lru_cache

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.dense import body_config, dense_head, norm_name, wanted_maps
from klas_hf.budgets import Cost
from klas_hf.costs.counting import macs_by_module, parameter_count
from klas_hf.costs.paths import AnchorCosts
from klas_hf.costs.vision import parts_of
from klas_hf.models import StitchedVisionConfig
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.models.vision_shapes import trace


def dense_costs(config: PreTrainedConfig, size: tuple[int, int]) -> Cost:
    """MACs and parameters of a dense model of this configuration, for one image of (height, width)."""
    return _dense_costs(config.model_type, config.to_json_string(use_diff=False), size)


@lru_cache(maxsize=64)
def _dense_costs(model_type: str, settings: str, size: tuple[int, int]) -> Cost:
    model = _on_meta(CONFIG_MAPPING[model_type].from_dict(json.loads(settings)))
    counted = macs_by_module(model, pixel_values=_blank(model, size))
    return Cost(sum(counted.values()), parameter_count(model), image_height=size[0], image_width=size[1])


def dense_anchor_costs(config: PreTrainedConfig, size: tuple[int, int]) -> AnchorCosts:
    """Costs of a dense anchor's parts, for one image of (height, width), from one counted forward.

    Raises:
        ValueError: its head or its backbone cannot be stitched.
    """
    body, states = body_config(config), wanted_maps(config)
    whole = copy.deepcopy(config)
    whole.backbone_config = StitchedVisionConfig(
        anchor_configs=[body], out_features=[norm_name(body, state) for state in states]
    )
    model = _on_meta(whole)
    counted = macs_by_module(model, pixel_values=_blank(model, size))
    backbone = model.get_submodule(dense_head(config).backbone)
    slices = backbone.slices[0]
    kind = vision_kind(body)

    def macs(names: tuple[str, ...]) -> int:
        return sum(counted[module] for name in names for module in slices.get_submodule(name).modules())

    embed, blocks = macs(kind.embed), [macs(block.modules) for block in kind.blocks(body)]
    parameters = parameter_count(model) - parameter_count(slices) - parameter_count(backbone.norms)
    return parts_of(
        body, slices, embed, blocks, trace(body, size), head_macs=sum(counted.values()) - embed - sum(blocks),
        head_parameters=parameters, maps=tuple(states), map_norms=kind.normed_features,
    )  # fmt: skip


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model = dense_head(config).kind(config)
    return model.to("meta").eval()  # Mask2Former makes some tensors past the context


def _blank(model: PreTrainedModel, size: tuple[int, int]) -> torch.Tensor:
    channels = model.config.backbone_config.num_channels
    return torch.zeros(1, channels, *size, device="meta", dtype=model.dtype)
