"""Swin and Swin V2: stages of windowed transformer blocks, each but the first entered by merging patches."""

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .vision_features import Block, Features, VisionKind, staged_blocks


class SwinKind(VisionKind):
    """Swin and Swin V2. Blocks take their grid as an argument, and shrink their window on a grid below it.

    Args:
        prefix: name of the body in the classifier.
        always_partition: windows keep their size, and grids are padded to it, as in Swin's backbone.
    """

    training = {"drop_path_rate": 0.0}

    def __init__(self, prefix: str, always_partition: bool = False):
        self.base, self.always_partition = prefix, always_partition
        self.writer = "mlp.fc2" if prefix == "swin" else None  # Swin V2 norms what it adds
        self.normed_features = prefix == "swin"
        self.embed = (f"{prefix}.embeddings",)
        self.head = (f"{prefix}.layernorm", "classifier")

    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        layers = f"{self.base}.encoder.layers"
        names: list[list[tuple[str, ...]]] = []
        for stage, depth in enumerate(config.depths):
            names.append([(f"{layers}.{stage}.blocks.{n}",) for n in range(depth)])
            if stage > 0:
                names[stage][0] = (f"{layers}.{stage - 1}.downsample", *names[stage][0])
        return staged_blocks(names)

    def run_embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Features:
        hidden, (height, width) = model.get_submodule(self.embed[0])(pixel_values)
        return Features(hidden, height, width)

    def run_module(self, module: nn.Module, name: str, features: Features) -> Features:
        hidden, height, width = features
        if name.endswith("downsample"):
            return Features(module(hidden, (height, width)), (height + 1) // 2, (width + 1) // 2)
        options = {"always_partition": True} if self.always_partition else {}  # Swin V2 has no such option
        return features._replace(hidden=module(hidden, (height, width), **options)[0])

    def run_head(self, model: PreTrainedModel, features: Features) -> Tensor:
        normed = model.get_submodule(f"{self.base}.layernorm")(features.hidden)
        pooler = model.get_submodule(f"{self.base}.pooler")
        return model.classifier(pooler(normed.transpose(1, 2)).flatten(1))
