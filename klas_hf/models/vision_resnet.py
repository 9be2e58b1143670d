"""ResNet, basic and bottleneck: stages of residual blocks on maps; the first block of a stage strides."""

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .vision_features import Block, Features, VisionKind, on_map, staged_blocks


class ResNetKind(VisionKind):
    """ResNet-18 to ResNet-152."""

    layout = "map"
    normed_features = False
    embed = ("resnet.embedder",)
    head = ("classifier",)

    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        return staged_blocks(
            [
                [(f"resnet.encoder.stages.{stage}.layers.{n}",) for n in range(depth)]
                for stage, depth in enumerate(config.depths)
            ]
        )

    def run_embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Features:
        return on_map(model.resnet.embedder(pixel_values))

    def run_module(self, module: nn.Module, name: str, features: Features) -> Features:
        return on_map(module(features.hidden))

    def run_head(self, model: PreTrainedModel, features: Features) -> Tensor:
        return model.classifier(model.resnet.pooler(features.hidden))
