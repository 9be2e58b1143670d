"""ConvNeXt: stages of residual blocks on maps, each but the first entered by a norm and a strided convolution."""

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .vision_features import Block, Features, VisionKind, on_map, staged_blocks


class ConvNextKind(VisionKind):
    """ConvNeXt."""

    layout = "map"
    norm_eps = 1e-6
    training = {"drop_path_rate": 0.0}
    embed = ("convnext.embeddings",)
    head = ("convnext.layernorm", "classifier")

    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        names: list[list[tuple[str, ...]]] = []
        for stage, depth in enumerate(config.depths):
            base = f"convnext.encoder.stages.{stage}"
            names.append([(f"{base}.layers.{n}",) for n in range(depth)])
            if stage > 0:
                entry = (f"{base}.downsampling_layer.0", f"{base}.downsampling_layer.1")
                names[stage][0] = entry + names[stage][0]
        return staged_blocks(names)

    def run_embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Features:
        return on_map(model.convnext.embeddings(pixel_values))

    def run_module(self, module: nn.Module, name: str, features: Features) -> Features:
        return on_map(module(features.hidden))

    def run_head(self, model: PreTrainedModel, features: Features) -> Tensor:
        return model.classifier(model.convnext.layernorm(features.hidden.mean((-2, -1))))
