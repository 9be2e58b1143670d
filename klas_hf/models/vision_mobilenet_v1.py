"""MobileNetV1: thirteen blocks on maps, each a depthwise and a pointwise convolution; a strided one begins a stage."""

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .vision_features import Block, Features, VisionKind, on_map

# Strides of the depthwise convolutions (Howard et al. 2017, Tab. 1); transformers has them as a constant too.
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class MobileNetV1Kind(VisionKind):
    """MobileNetV1 of any width. It has no residual connections, so no block can be skipped."""

    layout = "map"
    residual = False
    normed_features = False
    # Published configs carry .999, which was TensorFlow's share to keep; as a dropout rate it leaves nothing to learn.
    training = {"classifier_dropout_prob": 0.0}
    embed = ("mobilenet_v1.conv_stem",)
    head = ("classifier",)

    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        names = [(f"mobilenet_v1.layer.{2 * n}", f"mobilenet_v1.layer.{2 * n + 1}") for n in range(len(_STRIDES))]
        stages = [sum(stride == 2 for stride in _STRIDES[: n + 1]) for n in range(len(_STRIDES))]
        return tuple(Block(modules, stage) for modules, stage in zip(names, stages, strict=True))

    def run_embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Features:
        return on_map(model.mobilenet_v1.conv_stem(pixel_values))

    def run_module(self, module: nn.Module, name: str, features: Features) -> Features:
        return on_map(module(features.hidden))

    def run_head(self, model: PreTrainedModel, features: Features) -> Tensor:
        pooled = model.mobilenet_v1.pooler(features.hidden).flatten(1)
        return model.classifier(model.dropout(pooled))
