"""Stitched vision models: two native classifiers, taken apart, joined by a linear stitching layer.

    pixels ─► source.embed ─► source.blocks[:i] ─► stitch ─► target.blocks[j:] ─► target's norm and head

Each side stays the classifier of its own family, under its own names, without the parts that are not used. A
stitching layer between tokens is linear, between maps a 1×1 convolution; from a map to tokens, or back, the grid is
flattened or folded, so both must have the same.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput

from .configuration_stitched_vision import StitchedVisionConfig
from .modeling_stitched import StitchedModel
from .vision_features import Features, VisionKind, drop_block, image_size
from .vision_kinds import vision_kind
from .vision_shapes import classifier, keep_blocks, trace


class StitchingLayer(nn.Module):
    """Features of one anchor to features of another, at the same grid.

    Args:
        source, target: kinds of the two anchors.
        source_channels, target_channels: widths.
        bias: whether the map has one.

    Raises:
        ValueError: the target has class tokens that the source lacks.
    """

    def __init__(
        self, source: VisionKind, target: VisionKind, source_channels: int, target_channels: int, bias: bool = True
    ):
        super().__init__()
        self.dropped = dropped_prefix(source, target)
        self.from_map, self.to_map = source.layout == "map", target.layout == "map"
        self.projection: nn.Module
        if self.from_map and self.to_map:
            self.projection = nn.Conv2d(source_channels, target_channels, 1, bias=bias)
        else:
            self.projection = nn.Linear(source_channels, target_channels, bias=bias)

    def forward(self, features: Features) -> Features:
        hidden, height, width = features
        if self.from_map and self.to_map:
            return Features(self.projection(hidden), height, width)
        tokens = hidden.flatten(2).transpose(1, 2) if self.from_map else hidden[:, self.dropped :]
        moved = self.projection(tokens)
        if self.to_map:
            moved = moved.transpose(1, 2).unflatten(2, (height, width)).contiguous()
        return Features(moved, height, width)


def dropped_prefix(source: VisionKind, target: VisionKind) -> int:
    """How many class tokens of the source a stitching layer leaves out.

    Raises:
        ValueError: the target has others than the source.
    """
    if source.prefix_tokens == target.prefix_tokens:
        return 0
    if target.prefix_tokens == 0:
        return source.prefix_tokens
    raise ValueError(
        f"got a source with {source.prefix_tokens} class tokens and a target with {target.prefix_tokens}, which "
        "nothing in the source can stand for; expected as many on both sides, or a target without any"
    )


class _StitchedVision(StitchedModel):
    """What the classifier and the backbone share: both sides, the stitching layer, and the path through them."""

    config_class = StitchedVisionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _skip_keys_device_placement: list[str] = []
    _can_compile_fullgraph = False
    # A checkpoint of an anchor, or of the classifier for the backbone, has more than is used here.
    _keys_to_ignore_on_load_unexpected = [r"^source\.", r"^target\."]

    def __init__(self, config: StitchedVisionConfig, *, head: bool):
        super().__init__(config)
        self.source = classifier(config.source_config)
        self.stitch = StitchingLayer(
            vision_kind(config.source_config),
            vision_kind(config.target_config),
            config.source_channels,
            config.target_channels,
            config.stitch_bias,
        )
        self.target = classifier(config.target_config)
        keep_blocks(self.source, 0, config.source_stop, embed=True, head=False)
        depth = len(vision_kind(config.target_config).blocks(config.target_config))
        keep_blocks(self.target, config.target_start, depth, embed=False, head=head)

    def stitching_layer(self) -> nn.Module:
        """The linear layer or 1×1 convolution."""
        return self.stitch.projection

    def get_input_embeddings(self) -> nn.Module:
        return self.source.get_input_embeddings()

    def _path(
        self, pixel_values: Tensor, drop_path: float | None = None
    ) -> tuple[list[Features], dict[tuple[int, int], Features]]:
        """Features after the embedding, every block and the stitch, in order, and by (side, block)."""
        config = self.config
        sides = [(self.source, vision_kind(config.source_config)), (self.target, vision_kind(config.target_config))]
        sides[0][1].check_pixels(pixel_values, config.source_config)
        sides[1][1].check_size(pixel_values, config.target_config)
        first, last = sides[0][1].blocks(config.source_config), sides[1][1].blocks(config.target_config)
        steps = [(0, n, first[n]) for n in range(config.source_stop)]
        steps += [(1, n, last[n]) for n in range(config.target_start, len(last))]
        rate = config.drop_path_rate if drop_path is None else drop_path
        rates = stochastic_depth(rate if self.training else 0.0, len(steps), *sides)
        features = sides[0][1].run_embed(self.source, pixel_values)
        path, by_block = [features], {}
        for step, (side, number, block) in enumerate(steps):
            if step == config.source_stop:
                features = self.stitch(features)
                path.append(features)
                by_block[1, number - 1] = features
            model, kind = sides[side]
            features = drop_block(features, kind.run_block(model, block, features), rates[step])
            path.append(features)
            by_block[side, number] = features
        return path, by_block


def stochastic_depth(rate: float, steps: int, *sides: tuple[PreTrainedModel, VisionKind]) -> list[float]:
    """Drop rate of each of `steps` blocks, from 0 at the first to `rate` at the last.

    Raises:
        ValueError: a side has no residual connections to fall back on.
    """
    plain = [model.config.model_type for model, kind in sides if not kind.residual]
    if rate and plain:
        raise ValueError(
            f"got a stochastic depth of {rate} for {plain[0]}, whose blocks have no residual connection; expected 0"
        )
    return [rate * step / max(steps - 1, 1) for step in range(steps)]


class StitchedForImageClassification(_StitchedVision):
    """A stitched image classifier, as any of transformers: pipelines, saving, loading, training.

    Args:
        config: `StitchedModel.from_anchors` makes it, and the model.

    Example:
        >>> model = StitchedModel.from_anchors(small, large, stitch=(2, 1), calibration=images)
        >>> output = model(**images[0])  # logits (batch, labels), loss in nats
        >>> output.logits.shape, output.loss.isfinite().item()
        (torch.Size([4, 3]), True)
    """

    _auto_class = "AutoModelForImageClassification"
    carried_classes = {"AutoBackbone": "modeling_stitched_vision.StitchedBackbone"}

    def __init__(self, config: StitchedVisionConfig):
        config.target_config.id2label, config.target_config.label2id = config.id2label, config.label2id
        super().__init__(config, head=True)
        self.num_labels = config.num_labels
        self.post_init()
        _describe(self)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        drop_path: float | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """Class logits, and their cross-entropy where labels are given.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised as the source wants them.
            labels: `(batch,)` class numbers.
            drop_path: stochastic depth of the last block in training; None takes the configuration's.

        Returns:
            logits `(batch, labels)`, loss in nats. `hidden_states` holds the output of the source's embedding, of
            every block and of the stitching layer, in the layouts of their sides.
        """
        path, _ = self._path(pixel_values, drop_path)
        logits = vision_kind(self.config.target_config).run_head(self.target, path[-1])
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = tuple(features.hidden for features in path) if wants_states else None
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class StitchedBackbone(BackboneMixin, _StitchedVision):
    """A stitched backbone for dense heads: a feature map `(batch, channels, height, width)` per stage.

    Its tensors have the names that they have in `StitchedForImageClassification`, without the head. Maps of families
    whose own backbones norm them go through a layer norm per stage, new as it is there.

    Args:
        config: of a stitched classifier, with `out_features` or `out_indices`.

    Example:
        >>> StitchedModel.from_anchors(small, large, stitch=(2, 3), calibration=images).save_pretrained(folder)
        >>> backbone = StitchedBackbone.from_pretrained(folder, out_features=["stage1", "stage3"])
        >>> [tuple(one.shape) for one in backbone(images[0]["pixel_values"]).feature_maps]
        [(4, 16, 2, 2), (4, 24, 2, 2)]
    """

    _auto_class = "AutoBackbone"
    has_attentions = False
    _keys_to_ignore_on_load_missing = [r"^norms\."]

    def __init__(self, config: StitchedVisionConfig):
        super().__init__(config, head=False)
        ends = config.stage_ends()
        size = image_size(config)
        shapes = trace(config.source_config, size), trace(config.target_config, size)
        self.num_features = [shapes[0][0].channels, *(shapes[side][number + 1].channels for side, number in ends)]
        kinds = vision_kind(config.source_config), vision_kind(config.target_config)
        self.norms = nn.ModuleDict(
            {
                name: nn.LayerNorm(channels)
                for name, channels, (side, _) in zip(self.stage_names[1:], self.num_features[1:], ends, strict=True)
                if name in self.out_features and kinds[side].normed_features
            }
        )
        self.post_init()
        _describe(self)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple:
        """Feature maps of the stages in `out_features`."""
        path, by_block = self._path(pixel_values)
        kinds = vision_kind(self.config.source_config), vision_kind(self.config.target_config)
        found = [(0, path[0]), *((end[0], by_block[end]) for end in self.config.stage_ends())]
        maps = []
        for name, (side, features) in zip(self.stage_names, found, strict=True):
            if name in self.out_features:
                one = as_map(kinds[side], features)
                if name in self.norms:
                    one = self.norms[name](one.movedim(1, -1)).movedim(-1, 1).contiguous()
                maps.append(one)
        states = tuple(features.hidden for features in path) if output_hidden_states else None
        output = BackboneOutput(feature_maps=tuple(maps), hidden_states=states)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def as_map(kind: VisionKind, features: Features) -> Tensor:
    """`(batch, channels, height, width)`, class tokens left out."""
    if kind.layout == "map":
        return features.hidden
    tokens = features.hidden[:, kind.prefix_tokens :]
    return tokens.transpose(1, 2).unflatten(2, (features.height, features.width)).contiguous()


def _describe(model: _StitchedVision) -> None:
    """What sharding and checkpointing need to know of both sides: blocks are run, stages as a whole are not."""
    blocks = [
        [side.get_submodule(name) for name in block.modules]
        for side in (model.source, model.target)
        for block in vision_kind(side.config).blocks(side.config)
    ]
    used = [modules for modules in blocks if not isinstance(modules[-1], nn.Identity)]
    model._no_split_modules = sorted({type(module).__name__ for modules in used for module in modules})
    # Families whose stages checkpoint as a whole, such as Swin V2, would not do so here, and not say it.
    model.supports_gradient_checkpointing = all(isinstance(modules[-1], GradientCheckpointingLayer) for modules in used)
