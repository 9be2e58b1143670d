"""Tiny random dense models: Mask2Former and UperNet on backbones of transformers' own."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    ConvNextConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

CLASSES = 4
NAMES = ["road", "sky", "tree", "wall"]
SIZE = (64, 64)
STAGES = ["stage1", "stage2", "stage3", "stage4"]
_LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}
_SMALL: dict[str, dict[str, Any]] = {
    "swin": {
        "drop_path_rate": 0.0,
        "embed_dim": 8,
        "depths": [1, 2, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 3,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]},
}
_LARGE: dict[str, dict[str, Any]] = {
    "swin": {
        "drop_path_rate": 0.0,
        "embed_dim": 12,
        "depths": [2, 2, 2, 1],
        "num_heads": [1, 1, 2, 3],
        "window_size": 3,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [12, 16, 24, 28], "depths": [2, 2, 2, 1], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [12, 16, 24, 28], "depths": [2, 2, 2, 1]},
}
_CONFIGS = {"swin": SwinConfig, "resnet": ResNetConfig, "convnext": ConvNextConfig}


def tiny_backbone(kind: str, *, large: bool = False, **changes: Any) -> PreTrainedConfig:
    """The configuration of a backbone of four stages."""
    settings = (_LARGE if large else _SMALL)[kind] | ({} if kind == "resnet" else {"image_size": SIZE[0]})
    return _CONFIGS[kind](**settings | {"out_features": STAGES} | changes)


def head_config(head: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a head, on a backbone that is yet to come."""
    if head == "upernet":
        return UperNetConfig(**_LABELS | {"hidden_size": 16, "auxiliary_channels": 8} | changes)
    widths = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "dim_feedforward": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "encoder_feedforward_dim": 32}
    return Mask2FormerConfig(**_LABELS | widths | layers | {"num_queries": 6, "train_num_points": 64} | changes)


def tiny_dense(head: str, kind: str = "swin", *, large: bool = False, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random dense model in eval mode, none of whose norms is at a special value."""
    config = head_config(head, **{"backbone_config": tiny_backbone(kind, large=large)} | changes)
    torch.manual_seed(seed)
    model = (UperNetForSemanticSegmentation if head == "upernet" else Mask2FormerForUniversalSegmentation)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def tiny_dense_pair(
    head: str, source: str = "swin", target: str | None = None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A small and a large anchor."""
    return tiny_dense(head, source, seed=1), tiny_dense(head, target or source, large=True, seed=2)


def dense_images(
    batches: int = 3, count: int = 4, size: tuple[int, int] = SIZE, *, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Batches of random pixels with masks of random blocks of classes, some of them void."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        coarse = torch.randint(0, CLASSES + 1, (count, 1, size[0] // 8, size[1] // 8), generator=generator).float()
        masks = torch.nn.functional.interpolate(coarse, size, mode="nearest")[:, 0].long()
        pixels = torch.randn(count, 3, *size, generator=generator)
        found.append({"pixel_values": pixels, "labels": masks.masked_fill(masks == CLASSES, 255)})
    return found


@torch.no_grad()
def outputs(model: PreTrainedModel, pixels: Tensor) -> list[Tensor]:
    """The tensors that a dense model answers with."""
    output = model(pixel_values=pixels)
    names = ("masks_queries_logits", "class_queries_logits", "logits")
    return [output[name] for name in names if name in output]
