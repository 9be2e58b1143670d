"""The vision models that can be stitched, one line each."""

from transformers import PreTrainedConfig

from .vision_convnext import ConvNextKind
from .vision_dinov2 import Dinov2Kind
from .vision_features import VisionKind
from .vision_levit import LevitKind
from .vision_mobilenet_v1 import MobileNetV1Kind
from .vision_resnet import ResNetKind
from .vision_swin import SwinKind
from .vision_vit import ViTKind

VISION_KINDS: dict[str, VisionKind] = {
    "vit": ViTKind("vit", prefix_tokens=1),
    "deit": ViTKind("deit", prefix_tokens=2),
    "dinov2": Dinov2Kind(),
    "swin": SwinKind("swin"),
    "swinv2": SwinKind("swinv2"),
    "levit": LevitKind(),
    "resnet": ResNetKind(),
    "convnext": ConvNextKind(),
    "mobilenet_v1": MobileNetV1Kind(),
}
# Those whose backbones run their blocks in another way than their classifiers, by the field AS_BACKBONE of a config.
BACKBONE_KINDS: dict[str, VisionKind] = {"swin": SwinKind("swin", always_partition=True)}
AS_BACKBONE = "klas_as_backbone"


def vision_kind(config: PreTrainedConfig) -> VisionKind:
    """The kind of a classifier's configuration.

    Raises:
        ValueError: it is not known here; the known ones are named.
    """
    if config.model_type not in VISION_KINDS:
        raise ValueError(
            f"got a vision anchor of unknown type {config.model_type!r}; expected one of {sorted(VISION_KINDS)}"
        )
    kinds = VISION_KINDS | (BACKBONE_KINDS if vars(config).get(AS_BACKBONE) else {})
    return kinds[config.model_type]
