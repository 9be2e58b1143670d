"""Dense heads: segmentation models of transformers whose backbone is one of the vision families, or a stitched one.

A dense model is taken apart into its backbone, which is read by blocks as a classifier is, and the rest, its head. In
the form that everything here works with the backbone is a `StitchedBackbone`: of a whole anchor the path of one slice.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.checkpoints import AnchorCheckpoint, UnreadTensor
from klas_hf.models import StitchedBackbone, StitchedVisionConfig
from klas_hf.models.vision_features import image_size
from klas_hf.models.vision_kinds import AS_BACKBONE, BACKBONE_KINDS, VISION_KINDS, vision_kind
from klas_hf.models.vision_shapes import trace

STRIDES = (4, 8, 16, 32)  # pixels; of the maps that heads take which say nothing else
Size = tuple[int, int]  # (height, width)
_LEAST = 1e-8  # share of a pixel that no query claims


@dataclass(frozen=True)
class DenseHead:
    """One kind of dense model.

    Attributes:
        model_class: its name in transformers.
        backbone: name of the backbone within the model.
        scores: the model's output, and (height, width) or None for the output's own → scores of the classes at every
            position, `(batch, classes, height, width)`, whose softmax over classes is the semantic segmentation.
        by_mask: whether the model learns from a mask for each class of an image, else from one mask of classes.
    """

    model_class: str
    backbone: str
    scores: Callable[[Any, Size | None], Tensor]
    by_mask: bool

    @property
    def kind(self) -> type[PreTrainedModel]:
        """The class of transformers."""
        return getattr(transformers, self.model_class)


def _of_queries(output: Any, size: Size | None) -> Tensor:
    """Mask2Former's semantic inference (Cheng et al. 2022): each query's mask in the shares of its classes."""
    classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
    masks = _resized(output.masks_queries_logits.float(), size).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", classes, masks).clamp_min(_LEAST).log()


def _of_pixels(output: Any, size: Size | None) -> Tensor:
    return _resized(output.logits.float(), size)


def _resized(maps: Tensor, size: Size | None) -> Tensor:
    if size is None or size == tuple(maps.shape[-2:]):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


DENSE_HEADS = {
    "mask2former": DenseHead(
        "Mask2FormerForUniversalSegmentation", "model.pixel_level_module.encoder", _of_queries, by_mask=True
    ),
    "upernet": DenseHead("UperNetForSemanticSegmentation", "backbone", _of_pixels, by_mask=False),
}
DENSE_HEADS |= {f"stitched_{name}": head for name, head in DENSE_HEADS.items()}  # on a `StitchedBackbone`


def is_dense(anchor: Any) -> bool:
    """Whether a model or configuration is one of the dense models that can be stitched."""
    config = anchor if isinstance(anchor, PreTrainedConfig) else getattr(anchor, "config", None)
    return isinstance(config, PreTrainedConfig) and config.model_type in DENSE_HEADS


def dense_head(config: PreTrainedConfig) -> DenseHead:
    """The kind of a dense model's configuration.

    Raises:
        ValueError: it is not known here; the known ones are named.
    """
    if config.model_type not in DENSE_HEADS:
        raise ValueError(
            f"got a dense head of unknown type {config.model_type!r}; expected one of {sorted(DENSE_HEADS)}, whose "
            "backbone transformers' AutoBackbone makes"
        )
    return DENSE_HEADS[config.model_type]


def backbone_of(model: PreTrainedModel) -> Any:
    """The backbone of a dense model."""
    return model.get_submodule(dense_head(model.config).backbone)


def on_stitched_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """A dense anchor in the form that everything here works with, on the very same tensors."""
    if isinstance(backbone_of(model), StitchedBackbone):
        body_config(model.config)
        return model
    config, kind = copy.deepcopy(model.config), dense_head(model.config)
    body, states = body_config(config), wanted_maps(config)
    config.backbone_config = StitchedVisionConfig(
        anchor_configs=[body], out_features=[norm_name(body, state) for state in states]
    )
    with torch.device(model.device):
        found = kind.kind(config).to(model.dtype)
    own = model.state_dict()
    theirs = {name: own[name] for name in own if not name.startswith(f"{kind.backbone}.")}
    for name, key in body_keys(set(own), body, kind.backbone).items():
        prefix = kind.backbone if name.startswith("norms.") else f"{kind.backbone}.slices.0"
        theirs[f"{prefix}.{name}"] = own[key]
    wanted = found.state_dict().keys()
    found.load_state_dict({name: theirs[name] for name in wanted if name in theirs}, assign=True)
    return found.train(model.training)


def body_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the classifier that a dense anchor's backbone is the body of.

    Raises:
        ValueError: the backbone is of an unknown family, is stitched of several slices, or lies on one grid throughout.
    """
    backbone = config.backbone_config
    if isinstance(backbone, StitchedVisionConfig):
        if len(backbone.slices) > 1:
            raise ValueError(
                f"got the anchor {config.name_or_path or config.model_type!r}, whose backbone is the path "
                f"{backbone.path}; expected one with a backbone of its own. Pass the anchors of that path"
            )
        backbone = backbone.slice_config(0)
    return as_backbone(backbone)


def as_backbone(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a vision model's configuration whose blocks run as in the family's backbone.

    Raises:
        ValueError: an unknown family, or one whose blocks all lie on one grid.
    """
    if config.model_type not in VISION_KINDS or not vision_kind(config).blocks(config)[-1].stage:
        staged = sorted(name for name in VISION_KINDS if name not in ("vit", "deit", "dinov2"))
        raise ValueError(
            f"got a backbone of type {config.model_type!r} for a dense head; expected one of several stages, {staged}"
        )
    found = copy.deepcopy(config)
    found.architectures = None
    if found.model_type in BACKBONE_KINDS:
        setattr(found, AS_BACKBONE, True)
    return found


def wanted_maps(config: PreTrainedConfig) -> list[int]:
    """The states of a dense anchor's backbone that its head takes as maps, from 0 at the embedding."""
    backbone = config.backbone_config
    names = list(backbone.out_features)
    if isinstance(backbone, StitchedVisionConfig):
        ends = [0, *(block + 1 for _, block in backbone.stage_ends())]
        return [ends[backbone.stage_names.index(name)] for name in names]
    blocks = vision_kind(backbone).blocks(backbone)
    last = {block.stage: number + 1 for number, block in enumerate(blocks)}
    ends = [0, *(last[stage] for stage in sorted(last))]
    return [ends[list(backbone.stage_names).index(name)] for name in names]


def norm_name(config: PreTrainedConfig, state: int) -> str:
    """How a family's backbone calls the stage that ends with a state."""
    return f"stage{vision_kind(config).blocks(config)[state - 1].stage + 1}" if state else "stem"


def strided_maps(config: PreTrainedConfig, head: PreTrainedConfig) -> list[int]:
    """The states of a classifier that a new head takes as maps: the last of each stride that it needs.

    Raises:
        ValueError: the family has no map of some stride; it is named.
    """
    strides = tuple(head.to_dict().get("feature_strides") or STRIDES)
    size = image_size(config)
    found: dict[int, int] = {}
    for state, shape in enumerate(trace(config, size)):
        found[round(size[0] / shape.height)] = state
    missing = [stride for stride in strides if stride not in found]
    if missing:
        raise ValueError(
            f"got a {config.model_type} with maps of the strides {sorted(found)} for {head.model_type}, which needs "
            f"{list(strides)}; expected those of {missing} too. Choose a backbone of such stages"
        )
    return [found[stride] for stride in strides]


def body_keys(keys: Mapping[str, Any] | set[str], config: PreTrainedConfig, prefix: str) -> dict[str, str]:
    """Name within the classifier, or `norms.<stage>.…` → key of a dense model's tensors, of those of its backbone.

    Args:
        keys: of the whole model.
        config: of the classifier that the backbone is the body of.
        prefix: name of the backbone within the model.
    """
    base = vision_kind(config).embed[0].split(".")[0]
    found = {}
    for key in keys:
        if not key.startswith(f"{prefix}."):
            continue
        name = key.removeprefix(f"{prefix}.").removeprefix("slices.0.")
        if name.startswith(("hidden_states_norms.", "norms.")):
            found["norms." + name.partition(".")[2]] = key
        else:  # some families' backbones leave out the name of the body
            found[name if name.startswith(f"{base}.") else f"{base}.{name}"] = key
    return found


class DenseCheckpoint(AnchorCheckpoint):
    """Tensors of a dense anchor; `config` and `keys` are those of the classifier that its backbone is the body of.

    Attributes:
        whole: configuration of the dense model.
        head_keys: tensors that are not its backbone's.

    Raises:
        ValueError: its head or its backbone cannot be stitched.
    """

    def __init__(self, anchor: str | Path | PreTrainedModel, **hub: Any):
        super().__init__(anchor, **hub)
        self.whole = self.config
        self.config = body_config(self.whole)
        self.kind = vision_kind(self.config)
        prefix = dense_head(self.whole).backbone
        self.head_keys = {key for key in self.keys if not key.startswith(f"{prefix}.")}
        self.names = body_keys(self.keys, self.config, prefix)
        self.keys = set(self.names)


def norms_state(anchor: AnchorCheckpoint, states: Mapping[str, int]) -> dict[str, Any]:
    """The norms of a stitched backbone's stages from an anchor's: name there → tensor.

    Args:
        states: stage of the backbone → the state of the anchor that it ends with.

    Raises:
        ValueError: the anchor's head does not take the map of such a state, so that there is no norm of it.
    """
    found: dict[str, Any] = {}
    for name, state in states.items():
        if vision_kind(anchor.config).normed_features:
            theirs = f"norms.{norm_name(anchor.config, state)}"
            keys = sorted(key for key in anchor.keys if key.startswith(f"{theirs}."))
            if not keys:
                raise ValueError(
                    f"got the anchor {anchor.name}, whose head does not take the map of its {theirs[6:]}, for a path "
                    f"that gives it to another head; expected anchors whose heads take maps of the same strides"
                )
            found |= {key.replace(theirs, f"norms.{name}", 1): UnreadTensor(anchor, key) for key in keys}
    return found
