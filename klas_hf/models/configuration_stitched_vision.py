"""Configuration of a stitched vision model: the configurations of its anchors, and the slices that run.

Unlike a language model's, the anchors' configurations are not cut: windows shift and rates grow with a block's
place in the whole, so the models are built whole (on the meta device) and what is not used is taken out.
"""

from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_base import PathConfig, as_config
from .vision_features import image_size
from .vision_kinds import vision_kind
from .vision_shapes import trace


class StitchedVisionConfig(BackboneConfigMixin, PathConfig):
    """Configuration of `StitchedForImageClassification` and `StitchedBackbone`.

    Args:
        anchor_configs: configurations (or their dicts) of the whole anchors, in the order that the slices refer to.
        slices: `[anchor, start, stop]` of every slice; None takes the first anchor whole.
        anchor_blocks: depths of the anchors.
        joint_channels: `[from, to]` widths of every stitching layer.
        image_size: (height, width) in pixels; None takes that of the first slice's anchor.
        joint_bias: whether the stitching layers have a bias.
        identity_joints: whether slices follow each other as they are, without stitching layers.
        joint_fits: how each stitching layer was initialised (`r2`, `ridge`, `rows`; `joint` but for least squares), or
            None.
        drop_path_rate: stochastic depth of the last block in training; it grows linearly from 0 at the first.
        anchor_names, anchor_revisions: Hub ids or folders of the anchors, and their commits, where known.
        training: how the model was fine-tuned, or None.
        search: how the path was found (`budget`, `share` of the dearest anchor's MACs, `divergence` and its `error`,
            `paths` compared, `contenders` healed), or None.
        delta: of a checkpoint without the anchors' tensors, what is needed to assemble it (see `klas_hf.hub.delta`).
        out_features, out_indices: which stages `StitchedBackbone` returns.
        lateral_channels: stage → `[from, to]` widths, of the stages whose maps `StitchedBackbone` gives in another
            width than their slice's; None: of none.
        initializer_range: standard deviation of weights that are drawn at random.

    Example:
        >>> config = StitchedModel.from_anchors(small, large, stitch=(2, 3), calibration=images).config
        >>> config.path, config.joint_channels, config.image_size
        ('0[:2] 1[3:]', [[16, 24]], [16, 16])
        >>> config.stage_names  # the stem, then a stage per block of a ViT
        ['stem', 'stage1', 'stage2', 'stage3']
    """

    model_type = "stitched_vision"
    listed: ClassVar[str] = "anchor_configs"

    anchor_configs: Any = None
    joint_channels: Any = None
    image_size: list[int] | None = None
    drop_path_rate: float = 0.0
    lateral_channels: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.anchor_configs = [as_config(config) for config in self.anchor_configs or [None]]
        self.anchor_blocks = self.anchor_blocks or [len(_stages(config)) for config in self.anchor_configs]
        self.slices = [list(one) for one in self.slices or [[0, 0, self.anchor_blocks[0]]]]
        self.joint_channels = self.joint_channels or []
        self.image_size = list(self.image_size or image_size(self.slice_config(0)))
        self.stage_names = ["stem", *(f"stage{number + 1}" for number in range(len(self.stage_ends())))]
        kwargs.pop("stage_names", None)  # derived
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def num_channels(self) -> int:
        return self.slice_config(0).num_channels

    @property
    def hidden_size(self) -> int:
        """Width of what the head takes."""
        return trace(self.slice_config(-1), image_size(self))[-1].channels

    def slice_config(self, number: int) -> PreTrainedConfig:
        """The configuration of the anchor that the slice of this `number` is of; -1 is the last."""
        return self.anchor_configs[self.slices[number][0]]

    def stage_ends(self) -> list[tuple[int, int]]:
        """The last block of each stage of the path, as (number of the slice, number of the block in its anchor).

        The stage in which a slice is left goes on in the next, where it may have another number: both are on one grid.
        A joint stands for the block before its slice, which may be the last of its stage. Between anchors of a single
        stage each block is one, as in their backbones.
        """
        stages = [_stages(config) for config in self.anchor_configs]
        if all(stages[anchor][-1] == 0 for anchor, _, _ in self.slices):
            return [(place, n) for place, (_, start, stop) in enumerate(self.slices) for n in range(start, stop)]
        ends = []
        for place, (anchor, start, stop) in enumerate(self.slices):
            of_block, last = stages[anchor], place == len(self.slices) - 1
            first = start - 1 if place and start else start
            inside = range(first, stop if last else stop - 1)
            ends += [(place, n) for n in inside if of_block[n : n + 1] != of_block[n + 1 : n + 2]]
        return ends


def backbone_config(config: PreTrainedConfig | dict[str, Any] | None, default: str) -> PreTrainedConfig:
    """As `as_config`, of stitched backbones too, which transformers does not know where klas_hf is not installed."""
    if isinstance(config, dict) and config.get("model_type") == StitchedVisionConfig.model_type:
        return StitchedVisionConfig(**{name: value for name, value in config.items() if name != "model_type"})
    return as_config(config, default)


def _stages(config: PreTrainedConfig) -> list[int]:
    """The stage of each block."""
    return [block.stage for block in vision_kind(config).blocks(config)]
