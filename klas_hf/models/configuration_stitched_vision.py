"""Configuration of a stitched vision model: the configurations of its anchors, and the slices that run.

Unlike a language model's, the anchors' configurations are not cut: windows shift and rates grow with a block's
place in the whole, so the models are built whole (on the meta device) and what is not used is taken out.
"""

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .checkpoint_files import FORMAT_VERSION, check_format, path_text
from .vision_features import image_size
from .vision_kinds import vision_kind
from .vision_shapes import trace

_DERIVED = ("format_version", "path")


def _derived(value: Any) -> Any:
    """A property with a setter, because PreTrainedConfig assigns every key of a JSON file: there stands the same."""
    return property(value, lambda self, same: None)


class StitchedVisionConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of `StitchedForImageClassification` and `StitchedBackbone`.

    Args:
        anchor_configs: configurations (or their dicts) of the whole anchors, in the order that the slices refer to.
        slices: `[anchor, start, stop]` of every slice; None takes the first anchor whole.
        anchor_blocks: depths of the anchors.
        joint_channels: `[from, to]` widths of every stitching layer.
        image_size: (height, width) in pixels; None takes that of the first slice's anchor.
        joint_bias: whether the stitching layers have a bias.
        joint_fits: how each stitching layer was initialised by least squares (`r2`, `ridge`, `rows`), or None.
        drop_path_rate: stochastic depth of the last block in training; it grows linearly from 0 at the first.
        anchor_names, anchor_revisions: Hub ids or folders of the anchors, and their commits, where known.
        training: how the model was fine-tuned, or None.
        delta: of a checkpoint without the anchors' tensors, what is needed to assemble it (see `klas_hf.hub.delta`).
        out_features, out_indices: which stages `StitchedBackbone` returns.
        initializer_range: standard deviation of weights that are drawn at random.

    Example:
        >>> config = StitchedModel.from_anchors(small, large, stitch=(2, 3), calibration=images).config
        >>> config.path, config.joint_channels, config.image_size
        ('0[:2] 1[3:]', [[16, 24]], [16, 16])
        >>> config.stage_names  # the stem, then a stage per block of a ViT
        ['stem', 'stage1', 'stage2', 'stage3']
    """

    model_type = "stitched_vision"
    _auto_class = "AutoConfig"  # a checkpoint carries its code
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}

    anchor_configs: Any = None
    slices: Any = None
    anchor_blocks: list[int] | None = None
    joint_channels: Any = None
    image_size: list[int] | None = None
    joint_bias: bool = True
    joint_fits: list[dict[str, Any]] | None = None
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    anchor_names: list[Any] | None = None
    anchor_revisions: list[Any] | None = None
    training: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None

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
    def sub_configs(self) -> dict[str, Any]:
        """`anchor_0`, `anchor_1`, …: where transformers sets attention implementations, by these names."""
        return {f"anchor_{number}": AutoConfig for number in range(len(self.anchor_configs or ()))}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("anchor_") and name[7:].isdigit() and int(name[7:]) < len(self.anchor_configs):
            return self.anchor_configs[int(name[7:])]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        check_format(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the derived ones."""
        return super().to_dict() | self._own_fields()

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: differences from the defaults, and the derived fields."""
        return super().to_diff_dict() | self._own_fields()

    def _own_fields(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in _DERIVED}
        return derived | {"anchor_configs": [config.to_dict() for config in self.anchor_configs]}

    format_version = _derived(lambda self: FORMAT_VERSION)
    path = _derived(lambda self: path_text(self.slices))

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


def as_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """A configuration from its dict; transformers makes default instances too, to compare with."""
    if config is None:
        return CONFIG_MAPPING["vit"]()
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config)
    return CONFIG_MAPPING[config.pop("model_type")](**config)


def _stages(config: PreTrainedConfig) -> list[int]:
    """The stage of each block."""
    return [block.stage for block in vision_kind(config).blocks(config)]
