"""Configurations of dense models on a stitched backbone: transformers' own, which bring the backbone's code along.

The model stays of transformers' own class: its Auto classes find that by the name of the configuration's class, so
these have the names of their bases. Their types are their own: what loads them is the code that a checkpoint carries.
"""

from typing import Any

import transformers
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig

from .configuration_stitched_vision import StitchedVisionConfig, backbone_config
from .modeling_stitched_vision import StitchedBackbone


class _OnStitchedBackbone:
    """The backbone's configuration is read without transformers knowing its type."""

    _auto_class = "AutoConfig"  # a checkpoint carries its code
    backbone_config: Any

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = backbone_config(self.backbone_config, "resnet")
        super().__post_init__(**kwargs)  # type: ignore[misc]


class Mask2FormerConfig(_OnStitchedBackbone, transformers.Mask2FormerConfig):
    """Configuration of a `Mask2FormerForUniversalSegmentation` on a `StitchedBackbone`."""

    model_type = "stitched_mask2former"
    backbones_supported = ["stitched_vision"]


class UperNetConfig(_OnStitchedBackbone, transformers.UperNetConfig):
    """Configuration of a `UperNetForSemanticSegmentation` on a `StitchedBackbone`."""

    model_type = "stitched_upernet"


class DetrConfig(_OnStitchedBackbone, transformers.DetrConfig):
    """Configuration of a `DetrForObjectDetection` on a `StitchedBackbone`.

    Example:
        >>> from klas_hf.models.configuration_stitched_dense import DetrConfig
        >>> backbone = StitchedModel.from_anchors(small, large, stitch=(2, 1), calibration=images).config
        >>> DetrConfig(backbone_config=backbone, num_labels=3).backbone_config.path
        '0[:2] 1[1:]'
    """

    model_type = "stitched_detr"


class RTDetrConfig(_OnStitchedBackbone, transformers.RTDetrConfig):
    """Configuration of an `RTDetrForObjectDetection` on a `StitchedBackbone`."""

    model_type = "stitched_rt_detr"


_KINDS: tuple[type[PreTrainedConfig], ...] = (Mask2FormerConfig, UperNetConfig, DetrConfig, RTDetrConfig)
STITCHED_DENSE = {kind.model_type.removeprefix("stitched_"): kind for kind in _KINDS}

# The pipeline of segmentation loads Mask2Former by its own class, which looks the backbone's type up.
AutoConfig.register(StitchedVisionConfig.model_type, StitchedVisionConfig, exist_ok=True)
AutoBackbone.register(StitchedVisionConfig, StitchedBackbone)


def on_stitched(config: PreTrainedConfig, backbone: StitchedVisionConfig) -> PreTrainedConfig:
    """A dense model's configuration with a stitched backbone in place of its own."""
    kind = STITCHED_DENSE[config.model_type.removeprefix("stitched_")]
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "backbone_config")}
    made = kind(**fields, backbone_config=backbone)
    made.name_or_path = config.name_or_path
    return made
