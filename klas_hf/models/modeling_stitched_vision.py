"""Stitched vision models: slices of native classifiers, taken apart, with a linear stitching layer at each joint.

    pixels ─► embed ─► first slice's blocks ─► joint ─► next slice's blocks ─► … ─► last slice's norm and head

Each slice stays the classifier of its own family, under its own names, without the parts that are not used. A
stitching layer between tokens is linear, between maps a 1×1 convolution; from a map to tokens, or back, the grid is
flattened or folded, so both must have the same.
"""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput

from .configuration_stitched_vision import StitchedVisionConfig
from .modeling_base import Slices, StitchedModel
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
        hidden = features.hidden
        if self.from_map and self.to_map:
            return features._replace(hidden=self.projection(hidden))
        tokens = hidden.flatten(2).transpose(1, 2) if self.from_map else hidden[:, self.dropped :]
        moved = self.projection(tokens)
        if self.to_map:
            moved = moved.transpose(1, 2).unflatten(2, (features.height, features.width)).contiguous()
        return features._replace(hidden=moved)


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
    """What the classifier and the backbone share: slices, the joints between them, and the path through them."""

    config_class = StitchedVisionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _skip_keys_device_placement: list[str] = []
    _can_compile_fullgraph = False
    # A checkpoint of an anchor, or of the classifier for the backbone, has more than is used here.
    _keys_to_ignore_on_load_unexpected = [r"^slices\."]

    def __init__(self, config: StitchedVisionConfig, *, head: bool):
        super().__init__(config)
        configs = [config.slice_config(number) for number in range(len(config.slices))]
        self.slices = Slices(classifier(one) for one in configs)
        kinds = [vision_kind(one) for one in configs]
        self.joints = nn.ModuleList(
            nn.Identity()
            if config.identity_joints
            else StitchingLayer(one, other, channels[0], channels[1], config.joint_bias)
            for (one, other), channels in zip(pairwise(kinds), config.joint_channels, strict=True)
        )
        for number, (part, (_, start, stop)) in enumerate(zip(self.slices, config.slices, strict=True)):
            last = number == len(config.slices) - 1
            keep_blocks(part, start, stop, embed=number == 0, head=head and last)

    def stitching_layers(self) -> list[nn.Module]:
        """The linear layer or 1×1 convolution of every joint; none where joints are identities."""
        return [joint.projection for joint in self.joints if not isinstance(joint, nn.Identity)]

    def get_input_embeddings(self) -> nn.Module:
        return self.slices[0].get_input_embeddings()

    def run_slices(
        self, pixel_values: Tensor, count: int | None = None, drop_path: float | None = None
    ) -> tuple[list[Features], dict[tuple[int, int], Features]]:
        """Run the first `count` slices (None: all), with the joints between them.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            drop_path: as for the classifier's `forward`.

        Returns:
            Features after the embedding, every block and every joint, in order; and those of blocks and joints by
            (number of the slice, number of the block), where a joint stands for the block before its slice.
        """
        config = self.config
        sides = [(part, vision_kind(part.config)) for part in self.slices]
        sides[0][1].check_pixels(pixel_values, sides[0][0].config)
        for part, kind in sides[1:]:
            kind.check_size(pixel_values, part.config)
        rate = config.drop_path_rate if drop_path is None else drop_path
        depth = sum(stop - start for _, start, stop in config.slices)
        rates = iter(stochastic_depth(rate if self.training else 0.0, depth, *sides))
        path, by_block = [sides[0][1].run_embed(sides[0][0], pixel_values)], {}
        for number, ((part, kind), (_, start, stop)) in enumerate(list(zip(sides, config.slices, strict=True))[:count]):
            if number:
                path.append(self.joints[number - 1](path[-1]))
                by_block[number, start - 1] = path[-1]
            for n, block in enumerate(kind.blocks(part.config)[start:stop], start):
                path.append(drop_block(path[-1], kind.run_block(part, block, path[-1]), next(rates)))
                by_block[number, n] = path[-1]
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
        last = config.slice_config(-1)
        last.id2label, last.label2id = config.id2label, config.label2id
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
            pixel_values: `(batch, channels, height, width)`, normalised as the first slice's anchor wants them.
            labels: `(batch,)` class numbers.
            drop_path: stochastic depth of the last block in training; None takes the configuration's.

        Returns:
            logits `(batch, labels)`, loss in nats. `hidden_states` holds the output of the embedding, of every
            block and of every stitching layer, in the layouts of their slices.
        """
        path, _ = self.run_slices(pixel_values, drop_path=drop_path)
        last = self.slices[-1]
        logits = vision_kind(last.config).run_head(last, path[-1])
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = tuple(features.hidden for features in path) if wants_states else None
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class StitchedBackbone(BackboneMixin, _StitchedVision):
    """A stitched backbone for dense heads: a feature map `(batch, channels, height, width)` per stage.

    Its tensors have the names that they have in `StitchedForImageClassification`, without the head. Maps of families
    whose own backbones norm them go through a layer norm per stage, new as it is there. Maps that a dense head expects
    of another anchor's width go through a 1×1 convolution, a stitching layer beside the path.

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
        configs = [config.slice_config(number) for number in range(len(config.slices))]
        shapes = [trace(one, image_size(config)) for one in configs]
        ends = config.stage_ends()
        self.num_features = [shapes[0][0].channels, *(shapes[number][block + 1].channels for number, block in ends)]
        laterals = config.lateral_channels or {}
        self.norms = nn.ModuleDict(
            {
                name: nn.LayerNorm(channels, vision_kind(configs[number]).norm_eps)
                for name, channels, (number, _) in zip(self.stage_names[1:], self.num_features[1:], ends, strict=True)
                if name in self.out_features and vision_kind(configs[number]).normed_features
            }
        )
        self.lateral_joints = nn.ModuleDict({name: nn.Conv2d(one, to, 1) for name, (one, to) in laterals.items()})
        for name, (_, channels) in laterals.items():
            self.num_features[self.stage_names.index(name)] = channels
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
        path, by_block = self.run_slices(pixel_values)
        found = [(0, path[0]), *((end[0], by_block[end]) for end in self.config.stage_ends())]
        maps = []
        for name, (number, features) in zip(self.stage_names, found, strict=True):
            if name in self.out_features:
                one = as_map(vision_kind(self.slices[number].config), features)
                if name in self.norms:
                    one = self.norms[name](one.movedim(1, -1)).movedim(-1, 1).contiguous()
                maps.append(self.lateral_joints[name](one) if name in self.lateral_joints else one)
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
    """What sharding and checkpointing need to know of the slices: blocks are run, stages as a whole are not."""
    used = [
        [part.get_submodule(name) for name in block.modules]
        for part, (_, start, stop) in zip(model.slices, model.config.slices, strict=True)
        for block in vision_kind(part.config).blocks(part.config)[start:stop]
    ]
    model._no_split_modules = sorted({type(module).__name__ for modules in used for module in modules})
    # Families whose stages checkpoint as a whole, such as Swin V2, would not do so here, and not say it.
    model.supports_gradient_checkpointing = all(isinstance(modules[-1], GradientCheckpointingLayer) for modules in used)
