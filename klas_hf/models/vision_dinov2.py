"""DINOv2: as ViT, with layer scale inside its blocks and a head on class token and mean patch together."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .vision_features import Block, Features, VisionKind


class Dinov2Kind(VisionKind):
    """DINOv2 interpolates its position embeddings, so images of any multiple of the patch size will do."""

    prefix_tokens = 1
    training = {"drop_path_rate": 0.0}
    embed = ("dinov2.embeddings",)
    head = ("dinov2.layernorm", "classifier")

    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        return tuple(Block((f"dinov2.encoder.layer.{n}",), 0) for n in range(config.num_hidden_layers))

    def run_embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Features:
        patch = model.config.patch_size
        height, width = pixel_values.shape[-2:]
        return Features(model.dinov2.embeddings(pixel_values), height // patch, width // patch)

    def run_module(self, module: nn.Module, name: str, features: Features) -> Features:
        return features._replace(hidden=module(features.hidden))

    def run_head(self, model: PreTrainedModel, features: Features) -> Tensor:
        normed = model.dinov2.layernorm(features.hidden)
        return model.classifier(torch.cat([normed[:, 0], normed[:, 1:].mean(1)], 1))
