"""ViT and DeiT: one stage of transformer blocks over class, distillation and patch tokens."""

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .vision_features import Block, Features, VisionKind


class ViTKind(VisionKind):
    """ViT (one class token) and DeiT (a distillation token too; with one head, or a second head averaged in)."""

    fixed_size = True
    writer = "mlp.fc2"

    def __init__(self, prefix: str, prefix_tokens: int):
        self.base = prefix
        self.prefix_tokens = prefix_tokens
        self.embed = (f"{prefix}.embeddings",)
        self.head = (f"{prefix}.layernorm", "classifier", "cls_classifier", "distillation_classifier")

    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        return tuple(Block((f"{self.base}.layers.{n}",), 0) for n in range(config.num_hidden_layers))

    def run_embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Features:
        embeddings = model.get_submodule(self.embed[0])
        height, width = pixel_values.shape[-2:]
        rows, columns = embeddings.patch_embeddings.patch_size
        return Features(embeddings(pixel_values), height // rows, width // columns)

    def run_module(self, module: nn.Module, name: str, features: Features) -> Features:
        return features._replace(hidden=module(features.hidden))

    def run_head(self, model: PreTrainedModel, features: Features) -> Tensor:
        normed = model.get_submodule(f"{self.base}.layernorm")(features.hidden)
        modules = dict(model.named_children())
        if "classifier" in modules:
            return modules["classifier"](normed[:, 0])
        by_class, by_teacher = modules["cls_classifier"](normed[:, 0]), modules["distillation_classifier"](normed[:, 1])
        return (by_class + by_teacher) / 2
